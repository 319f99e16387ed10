"""Your own meshes: from the points of a mesh, and fields at them, to other fields.

`MeshConfig.data` is a folder of `.npz`, `.vtu`, `.vtk` or `.ply` files (`data/meshes.py`), a mesh
each, of any sizes. Inputs of a point are its position, x, y (and z), always and first, then the
fields that `inputs` names; `targets` names the fields to learn. A vector field has a column for
each component: `u` becomes u_x, u_y, u_z (u_0, u_1, ... where there are more than three).

Meshes are sorted by name and permuted by NumPy's `RandomState(split_seed)`: the first
`test_fraction` of them are for testing and the next `valid_fraction` for validation, one at least.
The test split chooses nothing. All statistics come from the points of the training meshes: each
column has its mean and standard deviation, but positions share the largest of theirs, so that
shapes keep their proportions.

Loss and error are relative L2; with several target fields, of fields divided by their root mean
square in training, and each field's own is reported beside it.
"""

import dataclasses
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Float

from flare_jax.data.arrays import DataFileError
from flare_jax.data.buckets import Sample, bucketed_splits
from flare_jax.data.meshes import UNWRITTEN, MeshFile, mesh_files, read_mesh
from flare_jax.problems.metrics import rel_l2, rel_l2_of
from flare_jax.problems.problem import Normalizer, Problem, moments

AXES = ("x", "y", "z")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Your own meshes: where they are, what to learn from what, and how they are split."""

    data: Path | None = None  # folder of .npz, .vtu, .vtk or .ply files
    inputs: tuple[str, ...] = ()  # fields beside the position
    targets: tuple[str, ...] = ()  # fields to learn
    valid_fraction: float = 0.1  # of the meshes, for validation; 0: none
    test_fraction: float = 0.1  # of the meshes, for testing
    split_seed: int = 0  # of the split
    num_buckets: int = 4  # sizes that meshes are padded to

    def __post_init__(self):
        if not (0 < self.test_fraction < 1 and 0 <= self.valid_fraction < 1):
            raise ValueError(
                "test_fraction must be in (0, 1) and valid_fraction in [0, 1), got "
                f"{self.test_fraction} and {self.valid_fraction}"
            )
        if self.num_buckets < 1 or self.split_seed < 0:
            raise ValueError(
                "num_buckets must be at least 1 and split_seed not negative, got "
                f"{self.num_buckets} and {self.split_seed}"
            )


PRESETS = {
    "small": {  # for two CPU cores
        "channel_dim": 32,
        "num_blocks": 2,
        "num_heads": 4,
        "num_latents": 32,
        "epochs": 100,
        "batch_size": 1,
        "learning_rate": 2e-3,
        "weight_decay": 1e-4,
    },
    "paper": {  # FLARE's recipe for LPBF (arXiv 2508.12594)
        "channel_dim": 64,
        "num_blocks": 8,
        "num_heads": 8,
        "num_latents": 128,
        "epochs": 250,
        "batch_size": 1,
        "learning_rate": 1e-3,
        "weight_decay": 1e-4,
    },
}


def load(config: MeshConfig, progress: bool = True) -> Problem:
    """Reads and splits the meshes and makes the problem of them.

    Raises:
        FileNotFoundError: there is no such folder, or no mesh in it.
        DataFileError: a file is damaged, lacks a field, or differs from the first in the widths of
            fields or the dimension of space.
        ValueError: no data or no targets are given, a target's name is none that can be written,
            or there are too few meshes.
    """
    if config.data is None:
        raise ValueError("data must be a folder of meshes: name it with --data FOLDER")
    files = mesh_files(config.data)
    if not config.targets:
        found = ", ".join(read_mesh(files[0]).fields) or "none"
        raise ValueError(f"targets must name the fields to learn; {files[0]} has {found}")
    unwritten = sorted(set(config.targets) & set(UNWRITTEN))
    if unwritten:
        raise ValueError(f"a file of predictions cannot hold fields named {', '.join(unwritten)}")
    rows = split_rows(len(files), config)
    with ThreadPoolExecutor() as pool:
        found, xy = zip(*pool.map(functools.partial(sample, config=config), files), strict=True)
    widths = same_widths(files, found)
    inputs, targets = column_names(config, widths)
    x, y = ([xy[row][i] for row in rows["train"]] for i in (0, 1))
    x_normalizer, y_normalizer = Normalizer.fit_parts(x), Normalizer.fit_parts(y)
    x_normalizer = one_scale(x_normalizer, [a[:, : widths["points"]] for a in x])
    for a, _ in xy:
        a[:] = x_normalizer.encode(a)  # in place: meshes may fill much of the memory
    samples = {name: [xy[row] for row in part] for name, part in rows.items()}
    split = bucketed_splits(samples, config.num_buckets)
    return Problem(
        name="mesh",
        train=split["train"],
        valid=split.get("valid"),
        test=split["test"],
        x_normalizer=x_normalizer,
        y_normalizer=y_normalizer,
        inputs=inputs,
        targets=targets,
        **errors_of(config.targets, widths, y),
    )


def errors_of(
    names: Sequence[str], widths: dict[str, int], y: Sequence[Float[np.ndarray, "n O"]]
) -> dict:
    """The problem's loss, and with several target fields their units and an error of each.

    A field's unit is its root mean square over the training points: relative L2 of all fields
    together would be that of the largest numbers.
    """
    if len(names) == 1:
        return {"loss": rel_l2}
    mean, std = moments(y)
    ends = np.cumsum([widths[name] for name in names])
    columns = [slice(end - widths[name], end) for name, end in zip(names, ends, strict=True)]
    sizes = [np.sqrt(np.mean(mean[c] ** 2 + std[c] ** 2)) for c in columns]
    units = np.concatenate(
        [np.full(widths[n], s or 1, np.float32) for n, s in zip(names, sizes, strict=True)]
    )
    return {
        "loss": functools.partial(rel_l2, units=units),
        "units": units,
        "metrics": {
            f"rel_l2 of {name}": functools.partial(rel_l2_of, columns=c)
            for name, c in zip(names, columns, strict=True)
        },
    }


def split_rows(count: int, config: MeshConfig) -> dict[str, list[int]]:
    """Which of `count` meshes are in which split."""
    size = lambda fraction: max(1, round(fraction * count)) if fraction else 0
    test, valid = size(config.test_fraction), size(config.valid_fraction)
    if test + valid >= count:
        raise ValueError(
            f"{config.data} holds {count} meshes: {test} for testing and {valid} for validation "
            "leave none to train on"
        )
    order = np.random.RandomState(config.split_seed).permutation(count).tolist()
    return {
        "train": order[test + valid :],
        "valid": order[test : test + valid],
        "test": order[:test],
    }


def sample(path: Path, config: MeshConfig) -> tuple[dict[str, int], Sample]:
    """Columns of the points and of each field of the mesh in a file, and its (x, y), raw."""
    mesh = read_mesh(path, (*config.inputs, *config.targets))
    widths = {"points": mesh.points.shape[1]} | {n: a.shape[1] for n, a in mesh.fields.items()}
    return widths, (model_inputs(mesh, config), joined(mesh, config.targets))


def same_widths(files: Sequence[Path], widths: Sequence[dict[str, int]]) -> dict[str, int]:
    """Columns of the points and of each field, the same in all meshes."""
    first = widths[0]
    for path, of_mesh in zip(files, widths, strict=True):
        for name, found in of_mesh.items():
            if found != first[name]:
                raise DataFileError(
                    f"{path}: {name} has {found} columns, in {files[0]} it has {first[name]}"
                )
    return first


def one_scale(normalizer: Normalizer, positions: Sequence[Float[np.ndarray, "n S"]]) -> Normalizer:
    """The normaliser, with the largest deviation of the positions as the scale of them all."""
    std = normalizer.std.copy()
    largest = moments(positions)[1].max()
    std[: positions[0].shape[1]] = largest if largest > 0 else 1
    return Normalizer(normalizer.mean, std)


def column_names(
    config: MeshConfig, widths: dict[str, int]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the columns of inputs and targets; raises ValueError where two are the same."""
    of = lambda fields: tuple(c for name in fields for c in columns(name, widths[name]))
    inputs, targets = (*AXES[: widths["points"]], *of(config.inputs)), of(config.targets)
    names = inputs + targets
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"columns of different fields have the same name, {', '.join(twice)}")
    return inputs, targets


def columns(name: str, width: int) -> list[str]:
    """Names of a field's columns."""
    if width == 1:
        return [name]
    return [f"{name}_{AXES[i] if width <= 3 else i}" for i in range(width)]


def joined(mesh: MeshFile, names: Sequence[str]) -> Float[np.ndarray, "n k"]:
    """Fields of a mesh side by side."""
    return np.concatenate([mesh.fields[name] for name in names], axis=1)


def model_inputs(mesh: MeshFile, config: MeshConfig) -> Float[np.ndarray, "n in"]:
    """Raw model inputs: positions and the fields `inputs`."""
    return np.concatenate([mesh.points, *(mesh.fields[name] for name in config.inputs)], axis=1)


def mesh_inputs(path: Path | str, config: MeshConfig) -> tuple[MeshFile, Float[np.ndarray, "n in"]]:
    """The mesh in a file, and raw model inputs."""
    mesh = read_mesh(path, config.inputs)
    return mesh, model_inputs(mesh, config)


def fields_of(
    values: Float[np.ndarray, "n O"], targets: Sequence[str], names: Sequence[str]
) -> dict[str, Float[np.ndarray, "n k"]]:
    """Columns named `targets` put together into the fields `names`."""
    widths = _widths(list(targets), names)
    ends = np.cumsum(widths)
    return {n: values[:, e - w : e] for n, w, e in zip(names, widths, ends, strict=True)}


def _widths(targets: list[str], names: Sequence[str]) -> list[int] | None:
    """Columns of each field, so that those of all are `targets`; None where there is no such way.

    A first field may match more columns than it has: u and u_z have u_x, u_y and u_z.
    """
    if not names:
        return None if targets else []
    for width in range(len(targets), 0, -1):
        if targets[:width] == columns(names[0], width):
            rest = _widths(targets[width:], names[1:])
            if rest is not None:
                return [width, *rest]
    return None
