"""A trained surrogate on new inputs, in physical units."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from flare_jax.data.buckets import take_samples
from flare_jax.models.functional import Params
from flare_jax.problems.metrics import rel_l2_on_host
from flare_jax.problems.problem import Normalizer, Problem, buckets_of
from flare_jax.stream import make_streamed
from flare_jax.train.checkpoint import load
from flare_jax.train.config import PROBLEMS, Config, config_class, from_dict, read_config
from flare_jax.train.loop import MATMUL, build

log = logging.getLogger(__name__)

Which = Literal["best", "last", "ema"]
CHUNK = 2**20  # points on the device at once
FAR = 4  # times the points of any training sample: worth a word


@dataclasses.dataclass(frozen=True)
class Surrogate:
    """A model with its normalisers: raw inputs to physical fields."""

    problem: str
    config: Config
    apply: Callable
    params: Params
    x_normalizer: Normalizer
    y_normalizer: Normalizer
    inputs: tuple[str, ...] = ()  # names of the columns of x
    targets: tuple[str, ...] = ()  # and of the fields
    points: int | None = None  # of the largest training sample
    contents: dict[str, dict] | None = None  # of its problem: `Problem.contents`
    which: Which | None = None  # the parameters; "last" where a run has none that are best
    seed: int | None = None  # of the run's seeds the one that they are of

    def __call__(
        self,
        x: Float[Array, "n N in"],
        mask: Bool[Array, "n N"] | None = None,
        *,
        chunk: int = CHUNK,
    ) -> Float[np.ndarray, "n N O"]:
        """Predicted fields in physical units, one sample at a time on the device.

        A sample of more than `chunk` points goes through it in parts, see stream.py, which takes
        longer and gives the same fields to rounding.
        """
        x = np.asarray(x, np.float32)
        if x.ndim != 3 or x.shape[-1] != len(self.x_normalizer.mean):
            raise ValueError(
                f"x must be [n, N, {len(self.x_normalizer.mean)}], got shape {x.shape}"
            )
        if not np.isfinite(x if mask is None else x[np.asarray(mask)]).all():
            raise ValueError("x holds values that are not finite")
        masks = [None] * len(x) if mask is None else mask[:, None]
        decoded = self._decoded
        most = x.shape[1] if mask is None else int(np.sum(mask, 1).max())
        if self.points is not None and most > FAR * self.points:
            log.warning(
                "%d points are far more than the %d of the largest training sample: "
                "trust these predictions less",
                most,
                self.points,
            )
        if x.shape[1] > chunk:
            log.warning("%d points: streamed, %d at a time", x.shape[1], chunk)
            decoded = self._streamed(chunk)
        with jax.default_matmul_precision(MATMUL[self.config.train.precision]):
            return np.concatenate(
                [decoded(self.params, x[i : i + 1], m) for i, m in enumerate(masks)]
            )

    @functools.cached_property
    def _decoded(self):
        encode, decode = self.x_normalizer.encode, self.y_normalizer.decode
        return jax.jit(lambda params, x, mask: decode(self.apply(params, encode(x), mask)))

    def _streamed(self, chunk: int) -> Callable:
        if chunk not in self._streams:
            self._streams[chunk] = self._make_streamed(chunk)
        return self._streams[chunk]

    @functools.cached_property
    def _streams(self) -> dict[int, Callable]:
        """Programs by the points of a chunk."""
        return {}

    def _make_streamed(self, chunk: int) -> Callable:
        widths = len(self.x_normalizer.mean), len(self.y_normalizer.mean)
        dtype = jnp.bfloat16 if self.config.train.precision == "bfloat16" else jnp.float32
        streamed = make_streamed(self.config.model, *widths, chunk, dtype)
        encode, decode = self.x_normalizer.encode, self.y_normalizer.decode
        return lambda params, x, mask: decode(streamed(params, encode(x), mask))


def load_run(folder: Path | str, which: Which = "best") -> Surrogate:
    """The surrogate of a finished or interrupted run.

    Args:
        folder: the run's folder, with config.json and checkpoints/.
        which: the parameters with the smallest validation error, the last ones, or their running
            average. Of several seeds, the one with the smallest validation error. Without
            validation there are no best ones: the last ones, of the first seed.

    Raises:
        FileNotFoundError, CheckpointError: the folder holds no run, or no checkpoint.
        ValueError: its config.json is damaged, or there are no parameters `which`.
    """
    folder, values = Path(folder), read_config(folder)
    problem = values.pop("name")
    if problem not in PROBLEMS:
        raise ValueError(f"{folder} is a run of {problem}, which is none of {list(PROBLEMS)}")
    if which not in get_args(Which):
        raise ValueError(f"which must be of {get_args(Which)}, got {which!r}")
    module, _ = PROBLEMS[problem]
    fields = values.pop("fields", None)  # older runs have none
    fields = fields or {"inputs": module.INPUTS, "targets": module.TARGETS, "points": None}
    config = from_dict(config_class(problem), values)
    saved = load(folder / "checkpoints")
    best, state = saved["best"], saved["state"]
    seed = int(np.argmin(best["error"]))
    if which == "best" and not np.isfinite(best["error"][seed]):
        which = "last"  # a run without validation samples chooses nothing
    params = {"best": best["params"], "last": state["params"], "ema": state["ema"]}[which]
    params = jax.device_put(jax.tree.map(lambda x: x[seed], params))  # once for all samples
    x_norm, y_norm = (Normalizer(**saved[f"{name}_normalizer"]) for name in "xy")
    apply, _ = build(config, len(x_norm.mean), len(y_norm.mean))
    names = tuple(fields["inputs"]), tuple(fields["targets"])
    facts = fields["points"], fields.get("samples"), which, config.train.seed + seed
    return Surrogate(problem, config, apply, params, x_norm, y_norm, *names, *facts)


def parameters_of(surrogate: Surrogate) -> str:
    """Which parameters these are, and of which seed where there are several: for what is printed.

    A surrogate holds the parameters of one seed, as `load_run` says, where a run's result.json has
    the mean over all.
    """
    seeds = surrogate.config.train.seeds
    seed = "" if seeds == 1 else f", seed {surrogate.seed} alone of {seeds}"
    return f"{surrogate.which}{seed}"


def load_data(surrogate: Surrogate, cache: Path | None = None) -> Problem:
    """The data that a surrogate was trained and tested on.

    Args:
        surrogate: of a run.
        cache: where generated samples were kept, for a run does not say; None: in the default one.

    Raises:
        ValueError: the problem generates no samples, and takes no cache; or the samples are not
            those of the run, as where files were added to its folder.
    """
    config = surrogate.config.problem
    if cache is not None:
        if not hasattr(config, "cache"):
            raise ValueError(f"{surrogate.problem} generates no samples: it takes no cache")
        config = dataclasses.replace(config, cache=cache)
    data = PROBLEMS[surrogate.problem][0].load(config)
    data.check_contents(surrogate.contents, config.data)
    return data


def test_errors(surrogate: Surrogate, data: Problem) -> np.ndarray:
    """rel-L2 of every test sample."""
    errors = []
    for split in buckets_of(data.test):
        prediction = surrogate(data.x_normalizer.decode(split.x), split.mask)
        errors.append(rel_l2_on_host(prediction, split.y, split.mask, data.units))
    return np.concatenate(errors)


def one_sample(surrogate: Surrogate, data: Problem, row: int) -> tuple[np.ndarray, ...]:
    """Raw inputs, predicted and true fields at the real points of one test sample."""
    starts = np.cumsum([0, *(len(split.x) for split in buckets_of(data.test))])
    bucket = int(np.searchsorted(starts, row, side="right")) - 1
    split = take_samples(buckets_of(data.test)[bucket], np.array([row - starts[bucket]]))
    x = np.asarray(data.x_normalizer.decode(split.x))
    real = slice(None) if split.mask is None else split.mask[0]
    return x[0][real], surrogate(x, split.mask)[0][real], split.y[0][real]
