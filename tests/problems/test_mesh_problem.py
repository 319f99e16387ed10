"""Your own meshes, from a folder of files to predictions in files."""

import json
import re
import shutil
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from flare_jax.cli import main
from flare_jax.data.arrays import DataFileError
from flare_jax.data.meshes import read_mesh
from flare_jax.problems.mesh import MeshConfig, fields_of, load
from flare_jax.problems.problem import buckets_of, count_of

TINY = """--epochs 1 --channel-dim 8 --num-blocks 1 --num-heads 1 --num-latents 4 --num-layers-ffn 0
    --num-layers-k-proj 0 --num-layers-v-proj 0 --num-layers-in-out-proj 0 --mesh data=1
    --num-buckets 1 --eval-every 1"""
CARS = Path(__file__).parents[3] / "shared" / "data"


def write(folder, sizes=(5, 7, 4, 6, 7, 5), **changes):
    """Meshes in the plane z = 0 with p = x + y, u = 100 + (x, y, z) and the input a."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for i, n in enumerate(sizes):
        points = rng.uniform(0, 10, (n, 3)) * (1, 0.1, 0)
        fields = {"p": points[:, 0] + points[:, 1], "u": 100 + points, "a": rng.normal(size=n)}
        np.savez(folder / f"m{i}.npz", points=points, **fields | changes)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("meshes"))


def config(folder, **changes):
    return MeshConfig(**{"data": folder, "inputs": ("a",), "targets": ("p", "u")} | changes)


def test_columns_are_positions_inputs_and_components(folder):
    problem = load(config(folder))
    assert problem.inputs == ("x", "y", "z", "a")
    assert problem.targets == ("p", "u_x", "u_y", "u_z")
    assert [count_of(s) for s in (problem.train, problem.valid, problem.test)] == [4, 1, 1]
    for split in buckets_of(problem.train):  # the fields belong to the points
        x, real = problem.x_normalizer.decode(split.x), split.mask
        np.testing.assert_allclose((x[..., 0] + x[..., 1])[real], split.y[..., 0][real], rtol=1e-4)


def test_statistics_are_those_of_training_points_and_positions_share_a_scale(folder):
    problem = load(config(folder, num_buckets=1))
    (split,) = problem.train
    x = problem.x_normalizer.decode(split.x)[split.mask]
    std = problem.x_normalizer.std
    np.testing.assert_allclose(std[:3], x[:, 0].std(), rtol=1e-5)
    np.testing.assert_allclose(std[3], x[:, 3].std(), rtol=1e-5)
    np.testing.assert_allclose(problem.y_normalizer.mean, split.y[split.mask].mean(0), rtol=1e-5)


def test_reading_takes_little_more_than_the_padded_arrays(tmp_path):
    folder = write(tmp_path / "large", sizes=(30_000,) * 8)
    tracemalloc.start()
    problem = load(config(folder, num_buckets=1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    splits = (problem.train, problem.valid, problem.test)
    held = sum(a.nbytes for samples in splits for s in samples for a in s)
    assert peak < 2.6 * held


def test_columns_become_fields_again():
    values = np.arange(10.0).reshape(2, 5)
    fields = fields_of(values, ("p", "u_x", "u_y", "u_z", "q"), ("p", "u", "q"))
    assert {name: a[0].tolist() for name, a in fields.items()} == {
        "p": [0.0],
        "u": [1.0, 2.0, 3.0],
        "q": [4.0],
    }


def test_a_field_may_have_the_name_of_another_one_s_component():
    fields = fields_of(np.arange(3.0)[None], ("u_x", "u_y", "u_z"), ("u", "u_z"))
    assert {name: a[0].tolist() for name, a in fields.items()} == {"u": [0.0, 1.0], "u_z": [2.0]}


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            {"targets": ()},
            ValueError,
            "targets must name the fields to learn; .*m0.npz has p, u, a",
        ),
        ({"targets": ("t",)}, DataFileError, "m0.npz has no field t, it has"),
        ({"test_fraction": 0.6, "valid_fraction": 0.4}, ValueError, "leave none to train on"),
        ({"targets": ("p", "file")}, ValueError, "cannot hold fields named file"),
        ({"data": None}, ValueError, "data must be a folder"),
        ({"data": Path("nowhere")}, FileNotFoundError, "nowhere holds no"),
        ({"inputs": ("p",)}, ValueError, "have the same name, p"),
    ],
)
def test_bad_requests_say_what_is_wrong(folder, change, error, message):
    with pytest.raises(error, match=message):
        load(config(folder, **change))


def test_two_meshes_with_different_fields_are_refused(tmp_path):
    write(tmp_path)
    write(tmp_path, sizes=(3,), u=np.zeros((3, 2)))
    with pytest.raises(DataFileError, match=r"m1.npz: u has 3 columns, in .*m0.npz it has 2"):
        load(config(tmp_path))
    with np.load(tmp_path / "m3.npz") as file:
        np.savez(tmp_path / "m3.npz", **{k: file[k] for k in file.files if k != "p"})
    with pytest.raises(DataFileError, match="m3.npz has no field p"):
        load(config(tmp_path, targets=("p",)))


def test_config_refuses_impossible_splits():
    for change in ({"test_fraction": 0}, {"valid_fraction": 1.0}, {"num_buckets": 0}):
        with pytest.raises(ValueError, match=next(iter(change))):
            MeshConfig(**change)


def test_a_field_of_small_numbers_counts_beside_one_of_large_numbers(folder, tmp_path):
    points = [np.load(folder / f"m{i}.npz")["points"] for i in range(6)]
    problem = load(config(folder))
    large = write(tmp_path / "large")
    for i, x in enumerate(points):
        np.savez(large / f"m{i}.npz", **dict(np.load(folder / f"m{i}.npz")) | {"p": 1e6 * x.sum(1)})
    other = load(config(large))
    (split, *_), (scaled, *_) = buckets_of(problem.train), buckets_of(other.train)
    wrong = lambda y: y * np.array([1, 1.1, 1.1, 1.1], np.float32)  # p exact, u ten percent off
    error = problem.loss(wrong(split.y), split.y, split.mask)
    np.testing.assert_allclose(other.loss(wrong(scaled.y), scaled.y, scaled.mask), error, 1e-3)
    assert np.all(np.asarray(error) > 0.05)
    own = other.metrics["rel_l2 of u"](wrong(scaled.y), scaled.y, scaled.mask)
    np.testing.assert_allclose(own, 0.1, rtol=1e-4)
    assert load(config(folder, targets=("p",))).units is None


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    command = f"train mesh --data {folder} --inputs a --targets p u --out {out} {TINY}"
    assert main(command.split()) == 0
    return out


def test_a_run_keeps_what_its_user_must_know(folder, run, capsys):
    fields = json.loads((run / "config.json").read_text())["fields"]
    assert fields == {
        "inputs": ["x", "y", "z", "a"],
        "targets": ["p", "u_x", "u_y", "u_z"],
        "points": 7,
        "samples": json.loads(json.dumps(load(config(folder)).contents)),
    }
    assert (run / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert main(["evaluate", str(run)]) == 0
    error = json.loads((run / "result.json").read_text())["test_rel_l2"]
    found = re.search(r"test rel-L2 \(best\): ([\d.]+)", capsys.readouterr().out)
    assert float(found[1]) == pytest.approx(error, abs=1.1e-5)  # printed to five places


def test_a_folder_with_another_mesh_is_refused(run, folder, tmp_path, capsys):
    resume = f"train mesh --resume --out {run} --mesh data=1"
    shutil.copy(folder / "m0.npz", folder / "m9.npz")
    try:
        for command in (f"evaluate {run}", f"spectrum {run} --out {tmp_path}", resume):
            assert main(command.split()) == 1
            said = capsys.readouterr().err
            assert f"the samples in {folder} are not those that the run was trained on" in said
            assert re.search(r"train: 4 samples, \d+ points, \w+ digest -> 5 samples", said)
    finally:
        (folder / "m9.npz").unlink()


def test_a_mesh_far_larger_than_any_in_training_goes_in_parts(run, tmp_path, caplog):
    new, out = write(tmp_path / "new", sizes=(40,)) / "m0.npz", tmp_path / "out.npz"
    assert main(f"predict {run} {new} --out {out} --chunk 16".split()) == 0
    fields = read_mesh(out).fields
    assert fields["p"].shape == (40, 1) and fields["u"].shape == (40, 3)
    assert np.abs(fields["u"] - 100).max() < 50  # physical units
    assert out.with_suffix(".png").exists()
    assert "40 points are far more than the 7" in caplog.text and "streamed" in caplog.text


@pytest.mark.parametrize(
    "out, message",
    [
        ("p.txt", "written as .npz, .vtu or .vtk, got p.txt"),
        ("p.vtu", "needs meshio: pip install"),
        ("none/p.npz", "there is no folder none to write p.npz into"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_read(run, out, message, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "meshio", None)
        assert main(f"predict {run} nothing.npz --out {out}".split()) == 1
    assert message in capsys.readouterr().err


def test_predictions_go_into_files_for_viewers(folder, run, tmp_path):
    meshio = pytest.importorskip("meshio")
    mesh = read_mesh(folder / "m1.npz")
    meshio.Mesh(mesh.points, [("triangle", [[0, 1, 2]])], {"a": mesh.fields["a"][:, 0]}).write(
        tmp_path / "m.vtu"
    )
    assert main(f"predict {run} {tmp_path}/m.vtu --out {tmp_path}/p.vtu".split()) == 0
    found = meshio.read(tmp_path / "p.vtu")
    assert {k: v.shape for k, v in found.point_data.items()} == {"p": (7,), "u": (7, 3)}
    np.testing.assert_array_equal(found.cells[0].data, [[0, 1, 2]])


@pytest.mark.skipif(not CARS.is_dir(), reason="../shared/data holds no car surfaces")
def test_car_surfaces_are_read():
    paths = sorted(CARS.glob("car_*.npz"))
    mesh = read_mesh(paths[0], ("normals", "pressure"))
    assert mesh.points.shape == mesh.fields["normals"].shape == (3586, 3)
