"""Laser powder bed fusion: from the mesh of a printed part to its vertical displacement.

The benchmark that the FLARE paper made (arXiv 2508.12594; data set `vedantpuri/LPBF_FLARE`): parts
of Ti-6Al-4V of up to 60 mm, each on a mesh of its own of 736 to 47,542 nodes. Inputs of a node are
its position (x, y, z) in mm over (30, 30, 60), or over a third of that for generated `small` parts;
the target is its displacement along z in mm at the end of the build. All that a surrogate knows of
a part is where its nodes are.

Three sources:

- generated parts (`solvers/lpbf.py`), kept in a cache folder in the published layout: the default.
- `data`, a folder in the published layout (`data/meshes.py`): a copy of the published set, or parts
  generated elsewhere.
- `published`: the published set, downloaded by huggingface_hub.

The published split is 1100 parts for training and 290 for testing; validation parts are cut from
the 1100. Training and validation parts are the first of a permutation, by NumPy's `RandomState(0)`,
of the training part of a folder, test parts the first of its test part. The test split chooses
nothing.

Two errors are reported. `rel_l2` is that of the displacement. `legacy` is the one of the published
table: there, target and prediction, in mm, were "decoded" by the statistics of three random numbers
(m = 0.4510, s = 0.3421) that have nothing to do with them, so that

    legacy = ||s (prediction - target)|| / ||s target + m||

which the constant m in the denominator makes small. It serves to compare with that table only.
"""

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Array, Bool, Float

from flare_jax.data import meshes
from flare_jax.data.arrays import DataFileError
from flare_jax.data.buckets import Sample, bucketed_splits
from flare_jax.data.cache import cache_folder
from flare_jax.problems.metrics import AnyArray, rel_l2
from flare_jax.problems.problem import Normalizer, Problem
from flare_jax.solvers import lpbf as solver

log = logging.getLogger(__name__)

INPUTS, TARGETS = ("x", "y", "z"), ("disp_z",)  # columns of model inputs and outputs
SCALE = {"paper": (30.0, 30.0, 60.0), "small": (10.0, 10.0, 20.0)}  # mm
FIRST_INDEX = {"train": 0, "test": 1_000_000}  # of generated parts
# what torch.rand(3, 1) gives for seed 0: of it the published metric takes mean and deviation
LEGACY = np.array([0.49625659, 0.76822180, 0.08847743])
LEGACY_MEAN, LEGACY_STD = float(LEGACY.mean()), float(LEGACY.std(ddof=1))


@dataclasses.dataclass(frozen=True)
class LPBFConfig:
    """LPBF: where the parts come from, how many there are and how they are padded."""

    data: Path | None = None  # folder in the published layout; None generates parts
    published: bool = False  # download the published set (needs huggingface_hub)
    size: Literal["paper", "small"] = "paper"  # of generated parts, nothing else
    num_train: int = 1050  # training parts
    num_valid: int = 50  # validation parts, cut from the training part of the data; may be 0
    num_test: int = 290  # test parts
    num_buckets: int = 12  # sizes that meshes are padded to
    data_seed: int = 0  # seed of generated parts
    cache: Path | None = None  # folder for generated parts; None: $FLARE_JAX_CACHE or user cache

    def __post_init__(self):
        least = {"num_train": 1, "num_valid": 0, "num_test": 1, "num_buckets": 1, "data_seed": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} must be at least {value}, got {getattr(self, name)}")
        if self.published and self.data is not None:
            raise ValueError("published downloads the data: it does not go with data")


PRESETS = {
    # Three to seven minutes on two CPU cores, by their speed, parts included.
    "small": {
        "size": "small",
        "num_train": 420,
        "num_valid": 40,
        "num_test": 60,
        "num_buckets": 6,
        "channel_dim": 32,
        "num_blocks": 2,
        "num_heads": 4,
        "num_latents": 32,
        "epochs": 24,
        "eval_every": 4,
        "batch_size": 1,
        "learning_rate": 2e-3,
        "weight_decay": 1e-4,
    },
    # FLARE's recipe (arXiv 2508.12594).
    "paper": {
        "size": "paper",
        "num_train": 1050,
        "num_valid": 50,
        "num_test": 290,
        "num_buckets": 12,
        "channel_dim": 64,
        "num_blocks": 8,
        "num_heads": 8,
        "num_latents": 128,
        "epochs": 250,
        "eval_every": 10,
        "batch_size": 1,
        "learning_rate": 1e-3,
        "weight_decay": 1e-4,
    },
}


def load(config: LPBFConfig, progress: bool = True) -> Problem:
    """Reads or generates the parts and makes the problem of them.

    The displacement is normalised by one mean and one standard deviation over all nodes of the
    training parts. `progress` shows a bar while parts are generated.
    """
    files = split_files(config, progress)
    generated = config.data is None and not config.published
    scale = np.array(SCALE[config.size if generated else "paper"], np.float32)
    read = functools.partial(sample, scale=scale)
    with ThreadPoolExecutor() as pool:
        samples = {name: list(pool.map(read, paths)) for name, paths in files.items()}
    y = np.concatenate([y for _, y in samples["train"]])
    split = bucketed_splits(samples, config.num_buckets)
    return Problem(
        name="lpbf",
        train=split["train"],
        valid=split.get("valid"),
        test=split["test"],
        x_normalizer=Normalizer(np.zeros(3, np.float32), scale),
        y_normalizer=Normalizer.fit(y[None]),
        loss=rel_l2,
        inputs=INPUTS,
        targets=TARGETS,
        metrics={"legacy": legacy},
        generated=generated,
    )


def legacy(
    prediction: Float[AnyArray, "B N O"],
    target: Float[AnyArray, "B N O"],
    mask: Bool[AnyArray, "B N"] | None = None,
    *,
    axis_name: str | None = None,
) -> Float[Array, "B"]:
    """The published, distorted error of displacements in mm: see the module's docstring."""
    warp = lambda y: LEGACY_STD * y + LEGACY_MEAN
    return rel_l2(warp(prediction), warp(target), mask, axis_name=axis_name)


def sample(path: Path, scale: Float[np.ndarray, "3"]) -> Sample:
    """Scaled positions [n, 3] and vertical displacement [n, 1] of the part in a file."""
    mesh = meshes.read_mesh(path, ("disp",))
    if mesh.points.shape[1] != 3 or mesh.fields["disp"].shape[1] != 3:
        raise DataFileError(f"{path}: pos and disp must be [n, 3]")
    return mesh.points / scale, mesh.fields["disp"][:, 2:]


def mesh_inputs(
    path: Path | str, config: LPBFConfig
) -> tuple[meshes.MeshFile, Float[np.ndarray, "n 3"]]:
    """The mesh of a part in a file, and raw model inputs: its positions in mm."""
    mesh = meshes.read_mesh(path, ())
    if mesh.points.shape[1] != 3:
        raise DataFileError(f"{path}: points must be [n, 3], got {list(mesh.points.shape)}")
    return mesh, mesh.points


def split_files(config: LPBFConfig, progress: bool = True) -> dict[str, list[Path]]:
    """Files of the training, validation and test parts.

    Raises:
        ValueError: there are fewer parts than the config asks for.
    """
    sizes = {"train": config.num_train + config.num_valid, "test": config.num_test}
    if config.data is None and not config.published:
        folder = generated_folder(config)
        train, test = (generated(config, folder, n, sizes[n], progress) for n in ("train", "test"))
        index(folder)
    else:
        folder = meshes.download() if config.published else config.data
        train, test = meshes.published_split(folder, config.num_test)
    for files, split, asked in (
        (train, "train", "num_train + num_valid"),
        (test, "test", "num_test"),
    ):
        if len(files) < sizes[split]:
            raise ValueError(
                f"{folder} holds {len(files)} parts to {split}, {asked} asks for {sizes[split]}"
            )
    order = [train[i] for i in np.random.RandomState(0).permutation(len(train))]
    return {
        "train": order[: config.num_train],
        "valid": order[config.num_train : sizes["train"]],
        "test": test[: config.num_test],
    }


def generated_folder(config: LPBFConfig) -> Path:
    """Where generated parts are kept: its name is that of all they depend on but their index."""
    facts = {"version": solver.VERSION[config.size], "seed": config.data_seed, "size": config.size}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder(config.cache) / f"lpbf-{config.size}-{digest}"


def generated(
    config: LPBFConfig, folder: Path, split: str, count: int, progress: bool
) -> list[Path]:
    """The first `count` generated parts of a split, those that are missing made now."""
    for _ in make_missing(config, folder, split, count, progress=progress):
        pass
    return part_paths(folder, split, count)


def part_paths(folder: Path, split: str, count: int, share: tuple[int, int] = (0, 1)) -> list[Path]:
    """Files of the first `count` parts of a split; share (k, n): of parts k, k + n, k + 2 n, ...

    Raises:
        ValueError: for a share that does not exist.
    """
    return [folder / split / f"part_{i:07d}.npz" for i in part_numbers(split, count, share)]


def part_numbers(split: str, count: int, share: tuple[int, int]) -> range:
    k, n = share
    if not 0 <= k < n:
        raise ValueError(f"share must be (k, n) with 0 <= k < n, got {share}")
    return range(FIRST_INDEX[split] + k, FIRST_INDEX[split] + count, n)


def make_missing(
    config: LPBFConfig,
    folder: Path,
    split: str,
    count: int,
    *,
    progress: bool = True,
    share: tuple[int, int] = (0, 1),
) -> Iterator[solver.PartMesh]:
    """Makes and keeps the parts that are missing of the first `count` of a split, and yields them.

    Part i follows from (data_seed, i) alone, so a command that is cut off goes on where it stopped
    and asking for more changes none of the others. `share` is that of `part_paths`: n processes,
    each with another k, fill one folder.
    """
    wanted = part_numbers(split, count, share), part_paths(folder, split, count, share)
    missing = {i: path for i, path in zip(*wanted, strict=True) if not path.exists()}
    if not missing:
        return
    facts = {"seed": config.data_seed, "size": config.size}
    made = solver.generate(list(missing), **facts, progress=progress)
    for path, part in zip(missing.values(), made, strict=True):
        about = facts | {"version": solver.VERSION[config.size], "rejected": part.rejected}
        meshes.write_part(path, part, **about)
        yield part


def index(folder: Path) -> None:
    """Writes the published index of generated parts where pyarrow is there and parts are new."""
    files: dict[str, Sequence[Path]] = {
        name: sorted((folder / name).glob("*.npz")) for name in FIRST_INDEX
    }
    table = folder / "data" / "train-00000-of-00001.parquet"
    newest = max(path.stat().st_mtime for paths in files.values() for path in paths)
    if table.exists() and table.stat().st_mtime >= newest:
        return
    try:
        meshes.write_index(folder, files)
    except DataFileError as error:  # the folders train and test are the split all the same
        log.info("no index in %s: %s", folder, error)
