import dataclasses
from typing import ClassVar, NamedTuple

import numpy as np
import pytest

from flare_jax.data.arrays import DataFileError
from flare_jax.data.meshes import read_mesh
from flare_jax.problems import lpbf
from flare_jax.problems.lpbf import LPBFConfig, legacy, load, mesh_inputs, split_files
from flare_jax.problems.metrics import rel_l2
from flare_jax.problems.problem import buckets_of, count_of
from flare_jax.solvers import parts

SIZES = {"num_train": 4, "num_valid": 2, "num_test": 3, "num_buckets": 2}


class Part(NamedTuple):
    name: str
    pos: np.ndarray
    elems: np.ndarray
    edge_index: np.ndarray
    disp: np.ndarray
    vmstr: np.ndarray
    rejected: tuple[str, ...] = ()


class Solver:
    """In place of the solver: part i follows from (seed, i)."""

    VERSION: ClassVar = {"paper": 1, "small": 2}

    def __init__(self):
        self.made = []

    def generate(self, indices, *, seed, size, progress):
        for i in indices:
            rng = np.random.default_rng([seed, i])
            n = int(rng.integers(8, 20))
            pos = rng.uniform(-30, 30, (n, 3)).astype(np.float32)
            self.made.append(i)
            edges, elems = np.array([[0], [1]]), np.arange(8)[None]
            yield Part(f"part_{i}_{size}", pos, elems, edges, pos / 100, pos[:, 0])


@pytest.fixture
def solver(monkeypatch):
    made = Solver()
    monkeypatch.setattr(lpbf, "solver", made)
    return made


def test_generated_parts_are_kept_and_more_of_them_change_none(solver, tmp_path):
    config = LPBFConfig(cache=tmp_path, **SIZES)
    few = split_files(config, progress=False)
    assert solver.made == [*range(6), *range(1_000_000, 1_000_003)]
    assert {name: len(files) for name, files in few.items()} == {"train": 4, "valid": 2, "test": 3}
    split_files(config, progress=False)
    assert len(solver.made) == 9
    (few["test"][1]).unlink()  # as if cut off there
    split_files(dataclasses.replace(config, num_test=5), progress=False)
    assert solver.made[9:] == [1_000_001, 1_000_003, 1_000_004]
    folder = few["train"][0].parents[1]
    other = split_files(LPBFConfig(data=folder, **SIZES), progress=False)
    assert set(other["train"]) == set(few["train"])  # the cache is a folder as published


def test_shares_fill_one_folder(solver, tmp_path):
    config, folder = LPBFConfig(cache=tmp_path), tmp_path / "parts"
    made = lambda k: [p.name for p in lpbf.make_missing(config, folder, "train", 5, share=(k, 2))]
    assert made(1) == ["part_1_paper", "part_3_paper"] and made(1) == []
    assert made(0) == ["part_0_paper", "part_2_paper", "part_4_paper"]
    assert all(path.exists() for path in lpbf.part_paths(folder, "train", 5))
    with pytest.raises(ValueError, match=r"share must be \(k, n\) with 0 <= k < n, got \(2, 2\)"):
        made(2)


def test_inputs_are_scaled_positions_and_the_target_is_vertical(solver, tmp_path):
    problem = load(LPBFConfig(cache=tmp_path, **SIZES), progress=False)
    assert [count_of(s) for s in (problem.train, problem.valid, problem.test)] == [4, 2, 3]
    real = np.concatenate([s.y[s.mask] for s in buckets_of(problem.train)])
    np.testing.assert_allclose(problem.y_normalizer, [real.mean(0), real.std(0)], rtol=1e-5)
    for split in buckets_of(problem.test):
        z = problem.x_normalizer.decode(split.x)[..., 2]
        np.testing.assert_allclose(split.y[split.mask][:, 0], z[split.mask] / 100, rtol=1e-5)
        np.testing.assert_allclose(split.x * (30, 30, 60), problem.x_normalizer.decode(split.x))
    assert np.abs(problem.train[0].x[..., 2]).max() <= 0.5


def test_the_size_is_that_of_generated_parts_only(solver, tmp_path):
    made = LPBFConfig(cache=tmp_path, size="small", **SIZES)
    problem = load(made, progress=False)
    np.testing.assert_array_equal(problem.x_normalizer.std, (10, 10, 20))
    folder = lpbf.generated_folder(made)
    problem = load(LPBFConfig(data=folder, size="small", **SIZES), progress=False)
    np.testing.assert_array_equal(problem.x_normalizer.std, (30, 30, 60))


def test_legacy_is_the_published_metric():
    assert (round(lpbf.LEGACY_MEAN, 4), round(lpbf.LEGACY_STD, 4)) == (0.4510, 0.3421)
    rng = np.random.default_rng(0)
    p, y = rng.normal(0, 0.1, (2, 2, 9, 1)).astype(np.float32)
    mask = np.arange(9) < np.array([[9], [5]])
    for i, real in enumerate(mask):
        delta, warped = 0.3421 * (p - y)[i, real], 0.3421 * y[i, real] + 0.4510
        expected = np.linalg.norm(delta) / np.linalg.norm(warped)
        np.testing.assert_allclose(legacy(p, y, mask)[i], expected, rtol=1e-3)
    assert (legacy(p, y, mask) < rel_l2(p, y, mask)).all()


def test_new_parts_are_read_in_mm(solver, tmp_path):
    path = split_files(LPBFConfig(cache=tmp_path, **SIZES), progress=False)["test"][0]
    mesh, x = mesh_inputs(path, LPBFConfig())
    np.testing.assert_array_equal(x, read_mesh(path).points)
    assert mesh.cells[0][0] == "hexahedron"


def test_bad_requests_say_what_is_wrong(solver, tmp_path):
    folder = split_files(LPBFConfig(cache=tmp_path, **SIZES), progress=False)["train"][0].parents[1]
    with pytest.raises(ValueError, match=r"holds 6 parts to train, num_train \+ num_valid asks"):
        split_files(LPBFConfig(data=folder, **SIZES | {"num_train": 9}))
    with pytest.raises(ValueError, match="does not go with data"):
        LPBFConfig(data=folder, published=True)
    with pytest.raises(ValueError, match="num_test must be at least 1"):
        LPBFConfig(num_test=0)
    np.savez(tmp_path / "flat.npz", pos=np.zeros((4, 2)), disp=np.zeros((4, 2)))
    for read in (
        lambda path: lpbf.sample(path, np.ones(3)),
        lambda path: mesh_inputs(path, LPBFConfig()),
    ):
        with pytest.raises(DataFileError, match="flat.npz: "):
            read(tmp_path / "flat.npz")


def test_each_size_has_a_folder_and_a_scale_of_its_own(tmp_path):
    paper, small = (LPBFConfig(size=size, cache=tmp_path) for size in ("paper", "small"))
    kept = "lpbf-paper-eceedb6bf8f0de87"  # of parts that are made already
    assert lpbf.generated_folder(paper).name == kept
    assert lpbf.generated_folder(paper) != lpbf.generated_folder(small)
    for size, (box, *_) in parts.SIZES.items():
        assert lpbf.SCALE[size] == (box / 2, box / 2, box)


def test_presets_hold_every_size_of_the_data():
    for preset in lpbf.PRESETS.values():
        assert {"size", *SIZES} <= preset.keys()
