import json
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from flare_jax.data import meshes
from flare_jax.data.arrays import DataFileError
from flare_jax.data.meshes import MeshFile, published_split, read_mesh, write_mesh, write_part

RNG = np.random.default_rng(0)
POINTS = RNG.normal(size=(5, 3)).astype(np.float32)
FIELDS = {"p": RNG.normal(size=5).astype(np.float32), "u": RNG.normal(size=(5, 3))}


class Part(NamedTuple):
    """A part as the solver gives it."""

    name: str
    pos: np.ndarray = POINTS
    elems: np.ndarray = np.arange(8)[None] % 5
    edge_index: np.ndarray = np.array([[0, 1], [1, 2]])
    disp: np.ndarray = POINTS
    vmstr: np.ndarray = POINTS[:, 0]


def test_npz_files_hold_points_fields_and_cells(tmp_path):
    np.savez(tmp_path / "a.npz", pos=POINTS, **FIELDS, elems=[[0, 1, 2, 3]], edge_index=[[0], [1]])
    mesh = read_mesh(tmp_path / "a.npz")
    assert {name: a.shape for name, a in mesh.fields.items()} == {"p": (5, 1), "u": (5, 3)}
    np.testing.assert_array_equal(mesh.points, POINTS)
    assert mesh.cells[0][0] == "tetra" and mesh.fields["u"].dtype == np.float32
    assert list(read_mesh(tmp_path / "a.npz", ["u"]).fields) == ["u"]


@pytest.mark.parametrize("suffix", [".vtu", ".vtk", ".npz"])
def test_what_is_written_is_read(tmp_path, suffix):
    if suffix != ".npz":
        pytest.importorskip("meshio")
    fields = {"p": FIELDS["p"][:, None], "u": FIELDS["u"].astype(np.float32)}
    write_mesh(
        tmp_path / f"a{suffix}", MeshFile(POINTS, fields, [("tetra", np.array([[0, 1, 2, 3]]))])
    )
    mesh = read_mesh(tmp_path / f"a{suffix}", ["p", "u"])
    np.testing.assert_array_equal(mesh.points, POINTS)
    for name, values in fields.items():
        np.testing.assert_array_equal(mesh.fields[name], values)
    ((kind, corners),) = mesh.cells
    assert kind == "tetra" and corners.tolist() == [[0, 1, 2, 3]]


def test_cells_that_an_npz_cannot_hold_are_left_out(tmp_path):
    quads, triangles = ("quad", np.array([[0, 1, 2, 3]])), ("triangle", np.array([[0, 1, 2]]))
    for cells in ([quads], [triangles, quads], []):
        write_mesh(tmp_path / "a.npz", MeshFile(POINTS, {}, cells))
        assert read_mesh(tmp_path / "a.npz").cells == []


def test_flat_meshes_and_bare_points_are_written_for_viewers(tmp_path):
    meshio = pytest.importorskip("meshio")
    write_mesh(tmp_path / "a.vtu", MeshFile(POINTS[:, :2], {"u": POINTS[:, :2]}, []))
    mesh = meshio.read(tmp_path / "a.vtu")
    assert mesh.points.shape == mesh.point_data["u"].shape == (5, 3)
    assert mesh.cells[0].type == "vertex"


def bad(points=POINTS, **fields):
    return {"pos": points, **fields}


@pytest.mark.parametrize(
    "arrays, message",
    [
        (
            bad(np.where(POINTS > 1, np.nan, POINTS), p=np.zeros(5)),
            "points of point . is not finite",
        ),
        (bad(p=np.full(5, np.inf)), "field 'p' of point 0 is not finite"),
        (bad(p=np.zeros((5, 0))), r"field 'p' must hold real numbers .*\[5, 0\]"),
        (bad(p=np.zeros(4)), r"field 'p' must hold real numbers \[5\].*\[4\]"),
        (
            bad(np.zeros((0, 3)), p=np.zeros(0)),
            r"points must be \[n, 2\] or \[n, 3\], got \[0, 3\]",
        ),
        (bad(np.zeros((5, 4)), p=np.zeros(5)), r"got \[5, 4\]"),
        (bad(q=np.zeros(5)), "has no field p, it has q"),
        ({"p": np.zeros(5)}, "has no array pos or points, it has p"),
        (bad(p=np.array([{}] * 5)), "'p' is pickled, which could run any code: refused"),
        ({"pos": np.array([{}] * 5)}, "'pos' is pickled"),
        (bad(np.full((5, 3), "1"), p=np.zeros(5)), "points must be real numbers, they are <U1"),
    ],
)
def test_bad_meshes_say_what_is_wrong(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataFileError, match=message):
        read_mesh(tmp_path / "a.npz", ["p"])


@pytest.mark.parametrize("name", ["pos", "elems", "edge_index"])
def test_points_and_connectivity_are_no_fields(tmp_path, name):
    np.savez(tmp_path / "a.npz", **bad(p=np.zeros(5), elems=np.zeros((1, 4), int)))
    with pytest.raises(DataFileError, match=f"has no field {name}, it has p"):
        read_mesh(tmp_path / "a.npz", [name])


def test_entries_that_are_no_arrays_are_skipped_or_refused(tmp_path, caplog):
    np.savez(tmp_path / "a.npz", **bad(p=np.zeros(5)))
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as file:
        file.writestr("notes", "words")
    assert list(read_mesh(tmp_path / "a.npz").fields) == ["p"]
    assert "entry 'notes' is no array: skipped" in caplog.text
    with pytest.raises(DataFileError, match="'notes' is no array"):
        read_mesh(tmp_path / "a.npz", ["notes"])


def test_bad_files_say_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such mesh file"):
        read_mesh(tmp_path / "a.npz")
    for name in ("a.npz", "a.vtu", "a.vtk", "a.obj"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 nothing")
        with pytest.raises(DataFileError, match="a.*(damaged|expected one of|pip install)"):
            read_mesh(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="holds no .npz, .vtu"):
        meshes.mesh_files(tmp_path / "empty")
    with pytest.raises(DataFileError, match="written as .npz, .vtu or .vtk, got"):
        write_mesh(tmp_path / "a.ply", MeshFile(POINTS, {}, []))


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "meshio", None)
    (tmp_path / "a.vtu").touch()
    with pytest.raises(DataFileError, match=r'needs meshio: pip install -e ".\[mesh\]" in'):
        read_mesh(tmp_path / "a.vtu")


def test_pickled_entries_that_nobody_needs_are_skipped(tmp_path, caplog):
    np.savez(tmp_path / "a.npz", pos=POINTS, p=FIELDS["p"], _metadata=np.array(["{}"], object))
    assert list(read_mesh(tmp_path / "a.npz").fields) == ["p"]
    assert "entry '_metadata' is pickled: skipped" in caplog.text


def parts(folder):
    files = {"train": ["a", "b", "c"], "test": ["d"]}
    paths = {s: [folder / s / f"{n}.npz" for n in names] for s, names in files.items()}
    for group in paths.values():
        for path in group:
            write_part(path, Part(path.stem), seed=3)
    return paths


def test_the_split_is_that_of_the_index(tmp_path):
    pytest.importorskip("pyarrow")
    paths = parts(tmp_path)
    meshes.write_index(tmp_path, {"train": paths["test"], "test": paths["train"]})
    assert published_split(tmp_path, 1) == (paths["test"], paths["train"])
    import pyarrow.parquet as parquet

    table = parquet.read_table(tmp_path / "data" / "train-00000-of-00001.parquet")
    assert tuple(table.column_names) == meshes.INDEX
    row = {name: column[0] for name, column in table.to_pydict().items()}
    assert (row["file"], row["num_nodes"], row["num_edges"]) == ("test/d.npz", 5, 2)
    assert json.loads(row["metadata"]) == {"case_id": "d", "seed": 3}


def test_without_an_index_folders_or_a_permutation_are_the_split(tmp_path, monkeypatch, caplog):
    paths = parts(tmp_path)
    assert published_split(tmp_path, 1) == (paths["train"], paths["test"])
    for split in ("train", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{split}-0.parquet").touch()
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert published_split(tmp_path, 1) == (paths["train"], paths["test"])
    assert "the index in" in caplog.text and "pip install" in caplog.text
    flat = tmp_path / "train"
    order = np.random.default_rng(0).permutation(3)
    found = published_split(flat, 1)
    assert [[f.stem for f in group] for group in found] == [
        ["abc"[i] for i in order[:2]],
        ["abc"[i] for i in order[2:]],
    ]


@pytest.mark.parametrize("name", ["../x.npz", "/x.npz", "a/../../x.npz", "..\\x.npz", "C:\\x.npz"])
def test_an_index_stays_in_its_folder(tmp_path, name):
    with pytest.raises(DataFileError, match="outside of the folder: refused"):
        meshes.inside(tmp_path, name)


@pytest.mark.parametrize("name", ["", "."])
def test_an_index_names_files(tmp_path, name):
    with pytest.raises(DataFileError, match="which is no file"):
        meshes.inside(tmp_path, name)


def test_an_index_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    paths = parts(tmp_path)
    meshes.write_index(tmp_path, paths)

    def full(table, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parquet, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        meshes.write_index(tmp_path, paths)
    assert published_split(tmp_path, 1) == (paths["train"], paths["test"])
    assert not list(tmp_path.rglob("*.partial"))


def test_an_index_names_missing_files(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        table = arrow.table({"file": ["gone.npz"]})
        parquet.write_table(table, tmp_path / "data" / f"{split}-0.parquet")
    with pytest.raises(DataFileError, match="names 1 missing files, first .*gone.npz"):
        published_split(tmp_path, 1)
    (tmp_path / "data" / "train-0.parquet").write_bytes(b"nothing")
    with pytest.raises(DataFileError, match="damaged or no index"):
        published_split(tmp_path, 1)
