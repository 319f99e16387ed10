"""Meshes in files, and folders of them in the layout of the published LPBF set.

A mesh file holds points and fields at them:

    .npz                `pos` or `points` [n, S]; fields are its other arrays [n] or [n, k]; `elems`
                        [e, 8] (hexahedra) and `edge_index` [2, E] are connectivity
    .vtu  .vtk  .ply    points and point data, read by meshio (the extra `mesh`)

The published set (`vedantpuri/LPBF_FLARE`, MIT licence) is a folder with an .npz a part, with
`pos`, `elems`, `edge_index`, `disp` [n, 3], `vmstr` [n], `temp` and `_metadata`, and an index
`data/train-*.parquet`, `data/test-*.parquet` whose column `file` names the parts of each split.
Parts that are written here have no `temp`.

Nothing is ever unpickled: an entry of an .npz that would need it is skipped, or refused where it is
needed. Paths in an index stay in its folder.
"""

import contextlib
import json
import logging
import os
import tempfile
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from flare_jax.data.arrays import DataFileError

log = logging.getLogger(__name__)

SUFFIXES = (".npz", ".vtu", ".vtk", ".ply")
POINTS = ("pos", "points")  # names of the points in an .npz
OTHERS = ("elems", "edge_index", "_metadata")  # what is no field of an .npz
WRITTEN = (".npz", ".vtu", ".vtk")  # suffixes of files that are written
UNWRITTEN = (*POINTS, *OTHERS, "file", "allow_pickle")  # no names of fields in them: savez's too
INDEX = ("case_id", "file", "num_nodes", "num_edges", "metadata")  # columns of the published index
PUBLISHED = "vedantpuri/LPBF_FLARE"


class MeshFile(NamedTuple):
    """What a file holds: points, the fields asked for, and cells as (type, corners)."""

    points: Float[np.ndarray, "n S"]
    fields: dict[str, Float[np.ndarray, "n k"]]  # scalars have k = 1
    cells: list[tuple[str, np.ndarray]]


def optional(name: str):
    """The module `name` of the extra `mesh`; raises DataFileError that says how to install it."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataFileError(
            f'this needs {name.split(".")[0]}: pip install -e ".[mesh]" in the clone of flare_jax '
            f"({error})"
        ) from error


# --------------------------------------------------------------------------- one file ---


def read_mesh(path: Path | str, fields: Collection[str] | None = None) -> MeshFile:
    """Points, cells and `fields` (None: all there are) of a mesh file, in float32.

    Raises:
        FileNotFoundError: there is no such file.
        DataFileError: it is damaged, has no points or not those fields, or a point or a value is
            not finite; or meshio is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such mesh file: {path}")
    if path.suffix not in SUFFIXES:
        raise DataFileError(f"{path}: expected one of {', '.join(SUFFIXES)}, got {path.suffix!r}")
    read = _read_npz if path.suffix == ".npz" else _read_meshio
    points, found, cells = read(path, fields)
    if points.dtype.kind not in "biuf":
        raise DataFileError(f"{path}: points must be real numbers, they are {points.dtype}")
    if points.ndim != 2 or points.shape[1] not in (2, 3) or len(points) == 0:
        raise DataFileError(f"{path}: points must be [n, 2] or [n, 3], got {list(points.shape)}")
    wanted = found if fields is None else {name: found[name] for name in fields}
    arrays = {name: _field(path, name, a, len(points)) for name, a in wanted.items()}
    return MeshFile(_finite(path, "points", points.astype(np.float32)), arrays, cells)


def _field(path, name, array, n):
    """The array as float32 [n, k]."""
    fits = array.ndim in (1, 2) and len(array) == n and 0 not in array.shape
    if array.dtype.kind not in "biuf" or not fits:
        raise DataFileError(
            f"{path}: field {name!r} must hold real numbers [{n}] or [{n}, k], got {array.dtype} "
            f"{list(array.shape)}"
        )
    return _finite(path, f"field {name!r}", array.reshape(n, -1).astype(np.float32))


def _check_names(path, fields, names):
    """Raises DataFileError, with what there is, unless all `fields` are among the names."""
    missing = sorted(set(fields or ()) - set(names))
    if missing:
        there = ", ".join(sorted(names)) or "none"
        raise DataFileError(f"{path} has no field {', '.join(missing)}, it has {there}")


def _finite(path, name, array):
    bad = ~np.isfinite(array).all(axis=1)
    if bad.any():
        raise DataFileError(f"{path}: {name} of point {np.argmax(bad)} is not finite")
    return array


def _read_npz(path, fields):
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {}
            for name in file.files:
                if fields is None or name in (*POINTS, *fields, "elems"):
                    arrays |= _entry(path, file, name, needed=name in (*POINTS, *(fields or ())))
            names = set(file.files)
    except DataFileError:
        raise
    except Exception as error:  # zip, zlib and the array format have errors of their own
        raise DataFileError(f"{path} is damaged or no .npz file: {error}") from error
    points = next((arrays[name] for name in POINTS if name in arrays), None)
    if points is None:
        raise DataFileError(
            f"{path} has no array {' or '.join(POINTS)}, it has {', '.join(sorted(names))}"
        )
    _check_names(path, fields, names - {*POINTS, *OTHERS})
    elems = arrays.get("elems")
    cells = [] if elems is None or elems.ndim != 2 else [(_kind(elems.shape[1]), elems)]
    own = {name: a for name, a in arrays.items() if name not in (*POINTS, *OTHERS)}
    if fields is None:
        own = {name: a for name, a in own.items() if a.shape[:1] == (len(points),)}
    return points, own, [(kind, corners) for kind, corners in cells if kind]


def _entry(path, file, name, needed):
    """{name: array}, or nothing where it is not needed and is none, or would be unpickled."""
    try:
        array = file[name]
        if isinstance(array, np.ndarray):
            return {name: array}
        if needed:
            raise DataFileError(f"{path}: {name!r} is no array")
        log.warning("%s: entry %r is no array: skipped", path, name)
        return {}
    except DataFileError:  # a ValueError too
        raise
    except ValueError as error:
        if "pickle" not in str(error):
            raise
        if needed:
            raise DataFileError(
                f"{path}: {name!r} is pickled, which could run any code: refused"
            ) from error
        log.warning("%s: entry %r is pickled: skipped", path, name)
        return {}


def _kind(corners):
    """meshio's name for cells of so many corners, as .npz files have them."""
    return {3: "triangle", 4: "tetra", 8: "hexahedron"}.get(corners)


def _read_meshio(path, fields):
    meshio = optional("meshio")
    try:
        mesh = meshio.read(path)
    except (Exception, SystemExit) as error:  # meshio ends the process where no reader fits
        raise DataFileError(f"{path} is damaged or no {path.suffix} file: {error}") from error
    found = {name: np.asarray(a) for name, a in mesh.point_data.items()}
    _check_names(path, fields, found)
    cells = [(block.type, np.asarray(block.data)) for block in mesh.cells]
    return np.asarray(mesh.points), found, cells


def write_mesh(path: Path | str, mesh: MeshFile) -> None:
    """Writes points, cells and fields: .npz as it is read here, .vtu or .vtk for viewers.

    An .npz holds cells of one kind, of those that it is read with: others are left out.

    Raises:
        DataFileError: the path has another suffix, or meshio is not installed.
    """
    path = Path(path)
    check_written(path)
    fields = {name: a[:, 0] if a.shape[1] == 1 else a for name, a in mesh.fields.items()}
    if path.suffix == ".npz":
        np.savez_compressed(path, pos=mesh.points, **_elems(mesh.cells), **fields)
        return
    meshio = optional("meshio")
    solid = lambda a: np.pad(a, ((0, 0), (0, 1))) if a.ndim == 2 and a.shape[1] == 2 else a
    vertices = [("vertex", np.arange(len(mesh.points))[:, None])]
    data = {name: solid(a) for name, a in fields.items()}
    meshio.Mesh(solid(mesh.points), mesh.cells or vertices, point_data=data).write(path)


def _elems(cells):
    """The cells as an array of an .npz, where reading it gives them again."""
    if len(cells) != 1 or cells[0][0] != _kind(cells[0][1].shape[1]):
        return {}
    return {"elems": cells[0][1]}


def check_written(path: Path) -> None:
    """Raises what `write_mesh` does of a path that it cannot write, before there is a mesh."""
    if path.suffix not in WRITTEN:
        raise DataFileError(f"predictions are written as .npz, .vtu or .vtk, got {path}")
    if path.suffix != ".npz":
        optional("meshio")


# ------------------------------------------------------------------- folders of meshes ---


def mesh_files(folder: Path | str) -> list[Path]:
    """All mesh files in a folder and below it, by name.

    Raises:
        FileNotFoundError: there is no such folder, or no mesh in it.
    """
    folder = Path(folder)
    files = sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    if not files:
        raise FileNotFoundError(f"the folder {folder} holds no {', '.join(SUFFIXES)} file")
    return files


def published_split(folder: Path | str, num_test: int) -> tuple[list[Path], list[Path]]:
    """(training files, test files) of a folder in the published layout.

    The published split is the index: what `data/train-*.parquet` and `data/test-*.parquet` name
    (1100 and 290 parts of the published set). Without an index, or without pyarrow to read it,
    files in folders `train` and `test` are the split. Without those, files are sorted by name and
    permuted by NumPy's `default_rng(0)`, the last `num_test` of them for testing; the authors
    describe theirs as a permutation with seed 0 too, but not of which generator.

    Raises:
        FileNotFoundError: there is no such folder, or no mesh in it.
        DataFileError: the index is damaged or names a file outside the folder or not there.
    """
    folder = Path(folder)
    tables = {name: sorted(folder.glob(f"data/{name}-*.parquet")) for name in ("train", "test")}
    if all(tables.values()):
        try:
            optional("pyarrow")
        except DataFileError as error:
            log.warning("the index in %s is not read: %s", folder, error)
        else:
            return tuple(_indexed(folder, tables[name]) for name in ("train", "test"))
    files = mesh_files(folder)
    train, test = ([f for f in files if f.parent == folder / name] for name in ("train", "test"))
    if train and test:
        return train, test
    order = np.random.default_rng(0).permutation(len(files))
    split = len(files) - num_test
    return [files[i] for i in order[:split]], [files[i] for i in order[split:]]


def _indexed(folder, tables):
    """Files that the tables of an index name."""
    parquet = optional("pyarrow.parquet")
    names = []
    for table in tables:
        try:
            names += parquet.read_table(table, columns=["file"])["file"].to_pylist()
        except Exception as error:  # many kinds: cut short, no such column, not parquet
            raise DataFileError(f"{table} is damaged or no index: {error}") from error
    files = [inside(folder, name) for name in names]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise DataFileError(f"{tables[0]} names {len(missing)} missing files, first {missing[0]}")
    return files


def inside(folder: Path, name: str) -> Path:
    """`folder / name`; raises DataFileError for no name, or one that climbs out of the folder."""
    path = PurePosixPath(str(name).replace("\\", "/"))
    if not path.parts:
        raise DataFileError(f"the index in {folder} names {name!r}, which is no file")
    if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
        raise DataFileError(f"the index in {folder} names {name!r}, outside of the folder: refused")
    return folder / path


def write_part(path: Path, part, **facts) -> None:
    """Writes a part of `solvers/lpbf.py` into an .npz file, all of it or nothing.

    Its name and the `facts` go into `_metadata`, as JSON. Compressed lightly: a fifth of the time
    that NumPy's own level takes, for files as large within a few percent.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = json.dumps({"metadata": {"case_id": part.name, **facts}})
    names = ("pos", "elems", "edge_index", "disp", "vmstr")
    arrays = {name: getattr(part, name) for name in names} | {"_metadata": np.array([metadata])}
    with (
        replacing(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file,
    ):
        for name, array in arrays.items():
            with file.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write, which takes its place at the end, or is gone on an error."""
    handle, name = tempfile.mkstemp(suffix=".partial", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def write_index(folder: Path | str, splits: Mapping[str, Sequence[Path]]) -> None:
    """Writes the published index of files that `write_part` wrote; needs pyarrow.

    Each of its tables is written whole or not at all.
    """
    arrow, parquet = optional("pyarrow"), optional("pyarrow.parquet")
    folder = Path(folder)
    (folder / "data").mkdir(exist_ok=True)
    for split, files in splits.items():
        rows = []
        for path in files:
            with np.load(path, allow_pickle=False) as file:
                sizes = len(file["pos"]), file["edge_index"].shape[1]
                about = json.loads(file["_metadata"][0])["metadata"]
            name = path.relative_to(folder).as_posix()
            rows.append((about["case_id"], name, *sizes, json.dumps(about)))
        table = arrow.table(dict(zip(INDEX, map(list, zip(*rows, strict=True)), strict=True)))
        path = folder / "data" / f"{split}-00000-of-00001.parquet"
        with replacing(path) as temporary:
            parquet.write_table(table, temporary)


def download() -> Path:
    """The folder of the published set, downloaded by huggingface_hub into its cache."""
    return Path(optional("huggingface_hub").snapshot_download(PUBLISHED, repo_type="dataset"))
