"""Darcy flow: from the permeability a(x, y) of a porous square to the pressure u(x, y) in it.

The benchmark of Li et al., "Fourier neural operator for parametric partial differential
equations" (arXiv 2010.08895); the equation and how samples are made are in `solvers/darcy.py`.
Inputs of a point are (x, y, a), with raw positions in [0, 1] and normalised a; the target is u.

Three sources, `DarcyConfig.data`:

- None: samples are generated and kept in a cache folder. Training, validation and test samples
  have disjoint indices, and asking for more of one changes none of the others.
- a folder with the published `piececonst_r421_N1024_smooth1.mat` and `..._smooth2.mat`
  (variables `coeff` and `sol`, [1024, 421, 421]).
- a folder with `darcy_train_16.npz` and `darcy_test_16.npz` (arrays `coefficient` and `solution`,
  [n, 16, 16]). Their statistics are not those of the published files.

From files, training samples are the first `num_train` of the training file, validation samples
the `num_valid` after them, test samples the first `num_test` of the test file. The paper's split
is 1000 of smooth1 and 200 of smooth2 at stride 5, 85 x 85 points, without validation; the `paper`
preset adds as validation the 24 samples of smooth1 that the paper leaves unused. The test split
chooses nothing, neither checkpoint nor setting.
"""

import dataclasses
import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from flare_jax.data.arrays import DataFileError, array_shape, read_array
from flare_jax.data.cache import cached
from flare_jax.problems.metrics import AnyArray, rel_l2
from flare_jax.problems.problem import Normalizer, Problem, Split
from flare_jax.solvers import darcy as solver

FILES = (  # (training file, test file) of a data folder
    ("piececonst_r421_N1024_smooth1.mat", "piececonst_r421_N1024_smooth2.mat"),
    ("darcy_train_16.npz", "darcy_test_16.npz"),
)
KEYS = {".mat": ("coeff", "sol"), ".npz": ("coefficient", "solution")}
INPUTS, TARGETS = ("x", "y", "a"), ("u",)  # columns of model inputs and outputs
WEIGHT = 0.1  # of each derivative in the training loss
FIRST_INDEX = {"train": 0, "valid": 1_000_000, "test": 2_000_000}  # of generated samples


@dataclasses.dataclass(frozen=True)
class DarcyConfig:
    """Darcy flow: where the samples come from and how many there are."""

    data: Path | None = None  # folder of published data; None generates samples
    grid: int = 141  # nodes per side on which samples are solved (generated data only)
    stride: int | None = None  # keep every stride-th node; None: 5 above 100 a side, else 1
    num_train: int = 600  # training samples
    num_valid: int = 50  # validation samples, cut from the training data; may be 0
    num_test: int = 200  # test samples
    data_seed: int = 0  # seed of generated samples
    cache: Path | None = None  # folder for generated samples; None: $FLARE_JAX_CACHE or user cache

    def __post_init__(self):
        least = {"grid": 3, "num_train": 1, "num_valid": 0, "num_test": 1, "data_seed": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} must be at least {value}, got {getattr(self, name)}")


PRESETS = {
    # Three to seven minutes on two CPU cores, by their speed; about 6 s of it make samples.
    "small": {
        "grid": 141,
        "stride": 5,
        "num_train": 600,
        "num_valid": 50,
        "num_test": 200,
        "channel_dim": 32,
        "num_blocks": 2,
        "num_heads": 4,
        "num_latents": 64,
        "epochs": 24,
        "batch_size": 2,
        "learning_rate": 2e-3,
        "weight_decay": 1e-5,
    },
    # FLARE's recipe (arXiv 2508.12594).
    "paper": {
        "grid": 421,
        "stride": 5,
        "num_train": 1000,
        "num_valid": 24,
        "num_test": 200,
        "channel_dim": 64,
        "num_blocks": 8,
        "num_heads": 16,
        "num_latents": 256,
        "epochs": 500,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "weight_decay": 1e-5,
    },
}


def load(config: DarcyConfig, progress: bool = True) -> Problem:
    """Reads or generates the samples and makes the problem of them.

    Coefficient and solution are each normalised by one mean and one standard deviation over all
    training samples and points. `progress` shows a bar while samples are generated.
    """
    fields = _generated(config, progress) if config.data is None else _published(config)
    shape = fields["test"][0].shape[1:]
    x = {name: grid_inputs(a) for name, (a, _) in fields.items() if len(a)}
    y = {name: u.reshape(len(u), -1, 1) for name, (_, u) in fields.items() if len(u)}
    x_normalizer = Normalizer.fit(x["train"], raw=(0, 1))
    split = {name: Split(x_normalizer.encode(x[name]), y[name]) for name in x}
    return Problem(
        name="darcy",
        train=split["train"],
        valid=split.get("valid"),
        test=split["test"],
        x_normalizer=x_normalizer,
        y_normalizer=Normalizer.fit(y["train"]),
        loss=functools.partial(derivative_loss, shape=shape),
        inputs=INPUTS,
        targets=TARGETS,
        shape=shape,
        generated=config.data is None,
    )


def inputs_from(path: Path | str) -> tuple[Float[np.ndarray, "n N 3"], tuple[int, int]]:
    """Raw model inputs (x, y, a) and grid shape for the coefficients in a file, all its points.

    The file is a .npz with `coefficient` or a .mat with `coeff`, [n, s, s] or [s, s].
    """
    path = Path(path)
    key, _ = _keys(path)
    a = read_array(path, key)
    if a.ndim == 2:
        a = a[None]
    _check_grids(path, key, a.shape)
    return grid_inputs(a), a.shape[1:]


def grid_inputs(a: Shaped[np.ndarray, "n s t"]) -> Float[np.ndarray, "n N 3"]:
    """Points of the unit square with their coefficient, (x, y, a), x along the first grid axis."""
    axes = (np.linspace(0, 1, size, dtype=np.float32) for size in a.shape[1:])
    x, y = (np.broadcast_to(p, a.shape) for p in np.meshgrid(*axes, indexing="ij"))
    return np.stack([x, y, a.astype(np.float32)], axis=-1).reshape(len(a), -1, 3)


def derivative_loss(
    prediction: Float[AnyArray, "B N O"],
    target: Float[AnyArray, "B N O"],
    mask: Bool[AnyArray, "B N"] | None = None,
    *,
    shape: tuple[int, int],
) -> Float[Array, "B"]:
    """Training loss: rel-L2 of u, plus WEIGHT times the rel-L2 of du/dx and of du/dy.

    Derivatives are central differences on the grid `shape` (N = rows x columns) with zeros outside
    it; the spacing cancels. The metric that is reported is `rel_l2` alone.
    """
    loss = rel_l2(prediction, target, mask)
    for axis in (1, 2):
        difference = functools.partial(_central_difference, shape=shape, axis=axis)
        loss += WEIGHT * rel_l2(difference(prediction), difference(target), mask)
    return loss


def _central_difference(u, *, shape, axis):
    """u[i+1] - u[i-1] along grid axis 1 (x) or 2 (y), zeros outside: [B, N, O] to [B, N, O]."""
    grid = u.reshape(u.shape[0], *shape, u.shape[-1])
    pad = [(0, 0)] * 4
    pad[axis] = (1, 1)
    padded = jnp.moveaxis(jnp.pad(grid, pad), axis, 0)
    return jnp.moveaxis(padded[2:] - padded[:-2], 0, axis).reshape(u.shape)


def _generated(config, progress):
    """{split: (a, u)} from the solver, each split cached by itself."""
    stride = _stride(config, config.grid)
    fields = {}
    for name in ("train", "valid", "test"):
        first, count = FIRST_INDEX[name], getattr(config, f"num_{name}")
        if count == 0:
            continue
        parameters = {
            "version": solver.VERSION,
            "seed": config.data_seed,
            "grid": config.grid,
            "stride": stride,
            "first": first,
            "count": count,
        }
        generate = functools.partial(
            solver.generate,
            range(first, first + count),
            seed=config.data_seed,
            grid=config.grid,
            stride=stride,
            progress=progress,
        )
        arrays = cached(
            lambda generate=generate: dict(zip("au", generate(), strict=True)),
            f"darcy-{name}",
            parameters,
            folder=config.cache,
        )
        fields[name] = arrays["a"], arrays["u"]
    return fields


def _published(config):
    """{split: (a, u)} from files."""
    train_file, test_file = _files(Path(config.data))
    num_train, num_valid = config.num_train, config.num_valid
    a, u = _read(train_file, num_train + num_valid, config, "num_train + num_valid")
    test = _read(test_file, config.num_test, config, "num_test")
    if test[0].shape[1:] != a.shape[1:]:
        raise DataFileError(f"{train_file} and {test_file} hold grids of different sizes")
    return {
        "train": (a[:num_train], u[:num_train]),
        "valid": (a[num_train:], u[num_train:]),
        "test": test,
    }


def _files(folder):
    """(training file, test file) of a data folder."""
    for names in FILES:
        files = [folder / name for name in names]
        if all(file.is_file() for file in files):
            return files
    wanted = " nor ".join(" and ".join(names) for names in FILES)
    raise FileNotFoundError(f"the data folder {folder} holds neither {wanted}")


def _read(path, count, config, wanted):
    """First `count` samples of a file as (a, u), float32 [count, s, s] on every stride-th node."""
    shapes = {key: array_shape(path, key) for key in _keys(path)}
    for key, shape in shapes.items():
        _check_grids(path, key, shape)
    if len(set(shapes.values())) > 1:
        raise DataFileError(f"{path}: arrays differ in shape, {shapes}")
    samples, side, _ = next(iter(shapes.values()))
    if count > samples:
        raise ValueError(f"{path} holds {samples} samples, {wanted} asks for {count}")
    nodes = slice(None, None, _stride(config, side))
    index = (slice(count), nodes, nodes)
    a, u = (read_array(path, key, index=index).astype(np.float32) for key in shapes)
    return a, u


def _keys(path):
    """Names of coefficient and solution in a file of this kind."""
    if path.suffix not in KEYS:
        raise DataFileError(f"{path}: expected one of {', '.join(KEYS)}, got {path.suffix!r}")
    return KEYS[path.suffix]


def _check_grids(path, key, shape):
    if len(shape) != 3 or shape[1] != shape[2] or 0 in shape:
        raise DataFileError(f"{path}: {key!r} must be [n, s, s], its shape is {shape}")


def _stride(config, side):
    """Stride for a grid of `side` nodes a side; keeps the boundary, so it divides side - 1."""
    stride = (5 if side > 100 else 1) if config.stride is None else config.stride
    if stride < 1 or (side - 1) % stride:
        raise ValueError(f"stride must divide {side - 1} (grid of {side} nodes), got {stride}")
    return stride
