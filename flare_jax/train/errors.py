"""Errors of a model's predictions on samples of any sizes, for the parameters of several seeds."""

import functools
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flare_jax import parallel
from flare_jax.data.buckets import take_samples
from flare_jax.problems.metrics import rel_l2
from flare_jax.problems.problem import Normalizer, Samples, buckets_of

EVAL_TOKENS = 2**17  # points in one batch of an evaluation


def make_errors(
    apply: Callable,
    y_normalizer: Normalizer,
    mesh: Mesh | None = None,
    metrics: Mapping[str, Callable] | None = None,
) -> Callable:
    """`(params of all seeds, samples) -> {metric: [seeds, n]}` for each sample, bucket by bucket.

    `metrics` are further ones beside rel_l2. Samples go to the device in batches of EVAL_TOKENS.
    """
    metrics = {"rel_l2": rel_l2, **(metrics or {})}
    options = {} if mesh is None else {"out_shardings": NamedSharding(mesh, PartitionSpec())}

    @functools.cache
    def program(points: int):
        over = {name: parallel.loss_over(f, mesh, points) for name, f in metrics.items()}

        def batch_errors(params, s):
            prediction = y_normalizer.decode(parallel.model_over(apply, mesh)(params, s.x, s.mask))
            return {name: f(prediction, s.y, s.mask) for name, f in over.items()}

        batch_errors = parallel.over_samples(batch_errors, mesh)
        return jax.jit(jax.vmap(batch_errors, in_axes=(0, None)), **options)

    def errors(params, samples: Samples) -> dict[str, np.ndarray]:
        parts = []
        for split in buckets_of(samples):
            count, points = split.y.shape[:2]
            devices, ranks = (1, 1) if mesh is None else (mesh.size, mesh.shape[parallel.DATA])
            size = max(1, min(count, EVAL_TOKENS * devices // points))
            size = -(-size // ranks) * ranks
            for first in range(0, count, size):
                rows = np.arange(first, first + size) % count  # the last ones may come twice
                batch = parallel.place_samples(take_samples(split, rows), mesh)
                parts.append((program(points)(params, batch), count - first))
        cut = [{k: e[:, :n] for k, e in jax.device_get(part).items()} for part, n in parts]
        return {name: np.concatenate([part[name] for part in cut], 1) for name in metrics}

    return errors
