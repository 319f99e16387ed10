"""A trained surrogate on new inputs, in physical units."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Array, Bool, Float

from flare_jax.models.functional import Params
from flare_jax.problems.problem import Normalizer
from flare_jax.train.checkpoint import CheckpointError, Checkpoints
from flare_jax.train.config import Config, config_class, from_dict
from flare_jax.train.loop import MATMUL, build

Which = Literal["best", "last", "ema"]


@dataclasses.dataclass(frozen=True)
class Surrogate:
    """A model with its normalisers: raw inputs to physical fields."""

    problem: str
    config: Config
    apply: Callable
    params: Params
    x_normalizer: Normalizer
    y_normalizer: Normalizer

    def __call__(
        self, x: Float[Array, "n N in"], mask: Bool[Array, "n N"] | None = None
    ) -> Float[np.ndarray, "n N O"]:
        """Predicted fields in physical units, one sample at a time on the device."""
        x = np.asarray(x, np.float32)
        if x.ndim != 3 or x.shape[-1] != len(self.x_normalizer.mean):
            raise ValueError(
                f"x must be [n, N, {len(self.x_normalizer.mean)}], got shape {x.shape}"
            )
        if not np.isfinite(x if mask is None else x[np.asarray(mask)]).all():
            raise ValueError("x holds values that are not finite")
        masks = [None] * len(x) if mask is None else mask[:, None]
        with jax.default_matmul_precision(MATMUL[self.config.train.precision]):
            return np.concatenate(
                [self._decoded(self.params, x[i : i + 1], m) for i, m in enumerate(masks)]
            )

    @functools.cached_property
    def _decoded(self):
        encode, decode = self.x_normalizer.encode, self.y_normalizer.decode
        return jax.jit(lambda params, x, mask: decode(self.apply(params, encode(x), mask)))


def load_run(folder: Path | str, which: Which = "best") -> Surrogate:
    """The surrogate of a finished or interrupted run.

    Args:
        folder: the run's folder, with config.json and checkpoints/.
        which: the parameters with the smallest validation error, the last ones, or their running
            average. Of several seeds, the one with the smallest validation error.

    Raises:
        FileNotFoundError, CheckpointError: the folder holds no run, or no checkpoint.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} holds no run: there is no config.json")
    values = json.loads((folder / "config.json").read_text())
    problem = values.pop("name")
    config = from_dict(config_class(problem), values)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        if checkpoints.latest is None:
            raise CheckpointError(f"{folder} holds no checkpoint yet")
        saved = checkpoints.manager.restore(
            checkpoints.latest, args=ocp.args.Composite(state=ocp.args.StandardRestore())
        )["state"]
    best, state = saved["best"], saved["state"]
    seed = int(np.argmin(best["error"]))
    if which == "best" and not np.isfinite(best["error"][seed]):
        which = "last"  # a run without validation samples chooses nothing
    params = {"best": best["params"], "last": state["params"], "ema": state["ema"]}[which]
    params = jax.tree.map(lambda x: x[seed], params)
    x_norm, y_norm = (Normalizer(**saved[f"{name}_normalizer"]) for name in "xy")
    apply, _ = build(config, len(x_norm.mean), len(y_norm.mean))
    return Surrogate(problem, config, apply, params, x_norm, y_norm)
