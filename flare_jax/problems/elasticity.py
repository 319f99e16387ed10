"""Elasticity: from the shape of a cell with a void to the von Mises stress in it, when pulled.

The benchmark of Li et al., "Fourier neural operator with learned deformations" (Geo-FNO,
arXiv 2207.05209); the equations and how samples are made are in `solvers/elasticity.py`. Inputs of
a point are its raw position (x, y) in the unit square; the target is the stress sigma. All a
surrogate knows of the void is where points are.

Two sources, `ElasticityConfig.data`:

- None: samples are generated and kept in a cache folder. Training, validation and test samples
  have disjoint indices, and asking for more of one changes none of the others.
- a folder with the published `Random_UnitCell_XY_10.npy` [972, 2, 2000] and
  `Random_UnitCell_sigma_10.npy` [972, 2000], in it, or below it in `elasticity/Meshes/` or
  `Meshes/`.

From files, training samples are the first `num_train`, test samples the last `num_test`, and
validation samples the `num_valid` after the training samples. The paper trains on the first 1000,
tests on the last 200 and has no validation; samples that it leaves unused serve as validation here,
so that the training set stays whole. The test split chooses nothing, neither checkpoint nor
setting.
"""

import dataclasses
import functools
from pathlib import Path

import numpy as np
from jaxtyping import Float

from flare_jax.data.arrays import DataFileError, read_array
from flare_jax.data.cache import Arrays, cached
from flare_jax.problems.metrics import rel_l2
from flare_jax.problems.problem import Normalizer, Problem, Split
from flare_jax.solvers import elasticity as solver

FILES = ("Random_UnitCell_XY_10.npy", "Random_UnitCell_sigma_10.npy")
FOLDERS = ("", "elasticity/Meshes", "Meshes")  # of the published archives
INPUTS, TARGETS = ("x", "y"), ("sigma",)  # columns of model inputs and outputs
LONGEST_EDGE = 0.1  # between neighbouring points, for figures
FIRST_INDEX = {"train": 0, "valid": 1_000_000, "test": 2_000_000}  # of generated samples


@dataclasses.dataclass(frozen=True)
class ElasticityConfig:
    """Elasticity: where the samples come from and how many there are."""

    data: Path | None = None  # folder of published data; None generates samples
    stride: int = 1  # keep every stride-th of the 972 points
    num_train: int = 1000  # training samples
    num_valid: int = 200  # validation samples; may be 0
    num_test: int = 200  # test samples
    data_seed: int = 0  # seed of generated samples
    cache: Path | None = None  # folder for generated samples; None: $FLARE_JAX_CACHE or user cache

    def __post_init__(self):
        least = {"stride": 1, "num_train": 1, "num_valid": 0, "num_test": 1, "data_seed": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} must be at least {value}, got {getattr(self, name)}")


PRESETS = {
    # Three to seven minutes on two CPU cores, by their speed; about 10 s of it make samples. A
    # quarter of the points hold the stress nearly as well, and give four times the epochs.
    "small": {
        "stride": 4,
        "num_train": 1000,
        "num_valid": 100,
        "num_test": 200,
        "channel_dim": 32,
        "num_blocks": 2,
        "num_heads": 4,
        "num_latents": 32,
        "epochs": 48,
        "eval_every": 8,
        "batch_size": 2,
        "learning_rate": 2e-3,
        "weight_decay": 1e-5,
    },
    # FLARE's recipe (arXiv 2508.12594).
    "paper": {
        "num_train": 1000,
        "num_valid": 200,
        "num_test": 200,
        "channel_dim": 64,
        "num_blocks": 8,
        "num_heads": 8,
        "num_latents": 64,
        "epochs": 500,
        "eval_every": 20,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "weight_decay": 1e-5,
    },
}


def load(config: ElasticityConfig, progress: bool = True) -> Problem:
    """Reads or generates the samples and makes the problem of them.

    Positions stay as they are; the stress is normalised by one mean and one standard deviation over
    all training samples and points. `progress` shows a bar while samples are generated.
    """
    if config.data is None:
        names = [name for name in FIRST_INDEX if getattr(config, f"num_{name}")]
        arrays = {name: generated(config, name, progress) for name in names}
        fields = {name: (a["points"], a["sigma"]) for name, a in arrays.items()}
    else:
        fields = _published(config)
    keep = slice(None, None, config.stride)
    split = {name: Split(x[:, keep], s[:, keep, None]) for name, (x, s) in fields.items()}
    train = split["train"]
    return Problem(
        name="elasticity",
        train=train,
        valid=split.get("valid"),
        test=split["test"],
        x_normalizer=Normalizer.fit(train.x, raw=(0, 1)),
        y_normalizer=Normalizer.fit(train.y),
        loss=rel_l2,
        inputs=INPUTS,
        targets=TARGETS,
        generated=config.data is None,
    )


def generated(config: ElasticityConfig, name: str, progress: bool = True) -> Arrays:
    """The generated samples of one split, cached: points, sigma and displacement (float32)."""
    first, count = FIRST_INDEX[name], getattr(config, f"num_{name}")
    seed = config.data_seed
    parameters = {"version": solver.VERSION, "seed": seed, "first": first, "count": count}
    generate = functools.partial(
        solver.generate, range(first, first + count), seed=seed, progress=progress
    )
    return cached(generate, f"elasticity-{name}", parameters, folder=config.cache)


def inputs_from(path: Path | str) -> tuple[Float[np.ndarray, "n N 2"], None]:
    """Raw model inputs (x, y) from a file; None, for there is no grid.

    The file is a .npz with `points`, [n, N, 2] or [N, 2], or a .npy as published, [N, 2, n].
    """
    path = Path(path)
    if path.suffix == ".npy":
        x = np.moveaxis(_checked(path, _read(path), (None, 2, None)), -1, 0)
    else:
        x = read_array(path, "points")
        x = x[None] if x.ndim == 2 else x
    if x.ndim != 3 or x.shape[-1] != 2 or 0 in x.shape:
        raise DataFileError(f"{path}: points must be [n, N, 2] or [N, 2], got {list(x.shape)}")
    return np.ascontiguousarray(x, np.float32), None


def _published(config):
    """{split: (points [n, N, 2], stress [n, N])} from files."""
    xy_file, sigma_file = _files(Path(config.data))
    xy = _checked(xy_file, _read(xy_file), (solver.POINTS, 2, None))
    sigma = _checked(sigma_file, _read(sigma_file), (solver.POINTS, xy.shape[2]))
    bad = ~(sigma > 0).all(axis=0)
    if bad.any():
        raise DataFileError(f"{sigma_file}: stress of sample {np.argmax(bad)} is not positive")
    sizes = [getattr(config, f"num_{name}") for name in ("train", "valid", "test")]
    if sum(sizes) > xy.shape[2]:
        raise ValueError(
            f"{xy_file} holds {xy.shape[2]} samples, num_train + num_valid + num_test asks for "
            f"{sum(sizes)}"
        )
    train, valid, test = sizes
    part = {"train": slice(train), "test": slice(-test, None)}
    part |= {"valid": slice(train, train + valid)} if valid else {}
    x = np.ascontiguousarray(np.moveaxis(xy, -1, 0), np.float32)
    sigma = np.ascontiguousarray(sigma.T, np.float32)
    return {name: (x[rows], sigma[rows]) for name, rows in part.items()}


def _files(folder):
    """The two published files of a data folder."""
    for below in FOLDERS:
        files = [folder / below / name for name in FILES]
        if all(file.is_file() for file in files):
            return files
    raise FileNotFoundError(
        f"the data folder {folder} holds no {' and '.join(FILES)}, nor do "
        + " and ".join(str(folder / below) for below in FOLDERS[1:])
    )


def _read(path):
    """The array of a .npy file."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as e:
        raise DataFileError(f"{path} is damaged, cut short or not a .npy file: {e}") from e


def _checked(path, array, shape):
    """`array`, if it has this shape (None: any length) and holds finite real numbers."""
    fits = array.ndim == len(shape) and array.dtype.kind in "biuf"
    if not fits or any(want not in (None, n) for n, want in zip(array.shape, shape, strict=True)):
        wanted = ", ".join("n" if want is None else str(want) for want in shape)
        raise DataFileError(
            f"{path}: expected real numbers [{wanted}], got {array.dtype} {list(array.shape)}"
        )
    finite = np.isfinite(array)
    if not finite.all():
        where = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise DataFileError(f"{path} holds NaN or infinity, first at {where}")
    return array
