"""Errors of a model's predictions on samples of any sizes, for the parameters of several seeds."""

from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flare_jax import parallel
from flare_jax.data.buckets import take_samples
from flare_jax.problems.metrics import rel_l2
from flare_jax.problems.problem import Normalizer, Samples, Split, buckets_of
from flare_jax.train.programs import compiled

EVAL_TOKENS = 2**17  # points in one batch of an evaluation


class Errors:
    """`(params of all seeds, samples) -> {metric: [seeds, n]}` for each sample, bucket by bucket.

    Samples go to the device in batches of EVAL_TOKENS, or of as many as there are of their size
    when it first comes: a size is compiled once, and those that come together side by side.

    Args:
        apply: the model, `(params, x, mask) -> normalised prediction`.
        y_normalizer: decodes predictions.
        mesh: devices to spread samples and points over.
        metrics: further ones beside rel_l2.
    """

    def __init__(
        self,
        apply: Callable,
        y_normalizer: Normalizer,
        mesh: Mesh | None = None,
        metrics: Mapping[str, Callable] | None = None,
    ):
        self.model, self.y_normalizer = parallel.model_over(apply, mesh), y_normalizer
        self.metrics = {"rel_l2": rel_l2, **(metrics or {})}
        self.mesh = mesh
        self.programs: dict[tuple, tuple[Callable, int]] = {}  # and the samples in its batches

    def __call__(self, params, samples: Samples) -> dict[str, np.ndarray]:
        buckets, parts = buckets_of(samples), []
        self._compile(params, buckets)
        for split in buckets:
            program, count = self.programs[size_of(split)]
            for first in range(0, len(split.y), count):
                batch = self._batch(split, first, count)
                parts.append((program(params, batch), len(split.y) - first))
        cut = [{k: e[:, :n] for k, e in jax.device_get(part).items()} for part, n in parts]
        return {name: np.concatenate([part[name] for part in cut], 1) for name in self.metrics}

    def _compile(self, params, buckets: Sequence[Split]) -> None:
        """The programs of sizes that come for the first time."""
        new = {size_of(split): split for split in buckets if size_of(split) not in self.programs}
        counts = [self._count(split) for split in new.values()]
        programs = [self._program(split.y.shape[1]) for split in new.values()]
        batches = [self._batch(s, 0, n) for s, n in zip(new.values(), counts, strict=True)]
        programs = compiled(programs, [(params, batch) for batch in batches])
        self.programs.update(zip(new, zip(programs, counts, strict=True), strict=True))

    def _count(self, split: Split) -> int:
        """Samples in a batch, a multiple of the devices that samples are spread over."""
        mesh = self.mesh
        devices, ranks = (1, 1) if mesh is None else (mesh.size, mesh.shape[parallel.DATA])
        count = max(1, min(len(split.y), EVAL_TOKENS * devices // split.y.shape[1]))
        return -(-count // ranks) * ranks

    def _program(self, points: int) -> Callable:
        over = {name: parallel.loss_over(f, self.mesh, points) for name, f in self.metrics.items()}

        def batch_errors(params, s):
            prediction = self.y_normalizer.decode(self.model(params, s.x, s.mask))
            return {name: f(prediction, s.y, s.mask) for name, f in over.items()}

        batch_errors = parallel.over_samples(batch_errors, self.mesh)
        whole = None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())
        return jax.jit(jax.vmap(batch_errors, in_axes=(0, None)), out_shardings=whole)

    def _batch(self, split: Split, first: int, count: int) -> Split:
        """`count` samples from `first` on; where these are too few, first ones again."""
        rows = np.arange(first, first + count) % len(split.y)
        return parallel.place_samples(take_samples(split, rows), self.mesh)


def size_of(split: Split) -> tuple[int, bool]:
    """What a program is compiled for: the points of a sample, and whether some are masked."""
    return split.y.shape[1], split.mask is not None
