import dataclasses

import numpy as np
import pytest

from flare_jax.cli import main
from flare_jax.data.arrays import DataFileError
from flare_jax.problems import elasticity
from flare_jax.problems.elasticity import ElasticityConfig, inputs_from, load
from flare_jax.solvers.elasticity import POINTS, SolverError

GENERATED = {"num_train": 3, "num_valid": 2, "num_test": 2}
FROM_FILES = {"num_train": 3, "num_valid": 2, "num_test": 4}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def samples():
    """Positions and stresses of ten samples, in the layout of the published files."""
    rng = np.random.default_rng(0)
    return rng.uniform(size=(POINTS, 2, 10)), rng.uniform(50, 300, (POINTS, 10))


def save(folder, xy, sigma):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in zip(elasticity.FILES, (xy, sigma), strict=True):
        np.save(folder / name, array)


@pytest.mark.parametrize("below", elasticity.FOLDERS)
def test_published_files_are_split_as_documented(tmp_path, samples, below):
    save(tmp_path / below, *samples)
    p = load(ElasticityConfig(tmp_path, **FROM_FILES))
    xy, sigma = (np.moveaxis(a, -1, 0).astype(np.float32) for a in samples)
    for split, rows in ((p.train, slice(3)), (p.valid, slice(3, 5)), (p.test, slice(6, 10))):
        np.testing.assert_array_equal(split.x, xy[rows])
        np.testing.assert_array_equal(split.y[..., 0], sigma[rows])
    assert p.inputs == ("x", "y") and p.targets == ("sigma",) and p.shape is None


def test_positions_stay_raw_and_stress_is_normalised_by_training_samples(tmp_path, samples):
    save(tmp_path, *samples)
    p = load(ElasticityConfig(tmp_path, **FROM_FILES))
    np.testing.assert_array_equal(p.x_normalizer, [[0, 0], [1, 1]])
    train = samples[1][:, :3]
    np.testing.assert_allclose(p.y_normalizer, [[train.mean()], [train.std()]], rtol=1e-6)


def test_stride_keeps_every_other_point(tmp_path, samples):
    save(tmp_path, *samples)
    p = load(ElasticityConfig(tmp_path, stride=4, **FROM_FILES))
    assert p.train.x.shape == (3, 243, 2)
    np.testing.assert_array_equal(p.test.y[0, :, 0], samples[1][::4, 6].astype(np.float32))


def test_validation_may_be_left_out(tmp_path, samples):
    save(tmp_path, *samples)
    assert load(ElasticityConfig(tmp_path, **FROM_FILES | {"num_valid": 0})).valid is None


def test_generated_splits_share_no_sample_and_do_not_change_each_other(cache):
    config = ElasticityConfig(cache=cache, **GENERATED)
    few = load(config, progress=False)
    fields = np.concatenate([few.train.y, few.valid.y, few.test.y])
    assert fields.shape == (7, POINTS, 1) and len(np.unique(fields, axis=0)) == 7
    more = load(dataclasses.replace(config, num_train=5, num_valid=0), progress=False)
    np.testing.assert_allclose(few.train.y, more.train.y[:3], rtol=2e-6)
    np.testing.assert_array_equal(few.test.y, more.test.y)


def test_a_half_written_cache_is_made_again(cache, caplog):
    config = ElasticityConfig(cache=cache, **GENERATED)
    whole = elasticity.generated(config, "test", progress=False)
    (path,) = cache.glob("elasticity-test-*")
    path.write_bytes(path.read_bytes()[:1000])
    again = elasticity.generated(config, "test", progress=False)
    assert "damaged" in caplog.text
    assert all(np.array_equal(whole[name], again[name]) for name in whole)


def test_a_solver_that_fails_leaves_no_cache(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise SolverError("sample 3")

    monkeypatch.setattr(elasticity.solver, "generate", fail)
    with pytest.raises(SolverError, match="sample 3"):
        load(ElasticityConfig(cache=tmp_path, **GENERATED))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda xy, s: (xy[:-1], s), r"XY_10.npy: expected real numbers \[972, 2, n\].*\[971, 2"),
        (lambda xy, s: (xy, s[:, :-1]), r"sigma_10.npy: expected real numbers \[972, 10\]"),
        (lambda xy, s: (xy, s * np.nan), r"sigma_10.npy holds NaN or infinity, first at \(0, 0\)"),
        (lambda xy, s: (xy, s - 300), "sigma_10.npy: stress of sample 0 is not positive"),
        (lambda xy, s: (xy.astype(str), s), "XY_10.npy: expected real numbers"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path, samples, change, message):
    save(tmp_path, *change(*samples))
    with pytest.raises(DataFileError, match=message):
        load(ElasticityConfig(tmp_path, **FROM_FILES))


def test_bad_requests_say_what_is_wrong(tmp_path, samples):
    with pytest.raises(FileNotFoundError, match="holds no Random_UnitCell_XY_10.npy and"):
        load(ElasticityConfig(tmp_path))
    save(tmp_path, *samples)
    with pytest.raises(ValueError, match=r"holds 10 samples, num_train \+ num_valid \+ num_test"):
        load(ElasticityConfig(tmp_path, num_train=5, num_valid=4, num_test=2))
    xy_file = tmp_path / elasticity.FILES[0]
    xy_file.write_bytes(xy_file.read_bytes()[:1000])
    with pytest.raises(DataFileError, match="XY_10.npy is damaged, cut short"):
        load(ElasticityConfig(tmp_path, **FROM_FILES))


@pytest.mark.parametrize("field", ["num_train", "num_test"])
def test_config_refuses_nothing_at_all(field):
    with pytest.raises(ValueError, match=field):
        ElasticityConfig(**{field: 0})


def test_inputs_for_prediction_come_from_points(tmp_path, samples):
    points = np.moveaxis(samples[0], -1, 0).astype(np.float32)
    np.save(tmp_path / "a.npy", samples[0])
    np.savez(tmp_path / "many.npz", points=points)
    np.savez(tmp_path / "one.npz", points=points[0])
    for name, expected in (("a.npy", points), ("many.npz", points), ("one.npz", points[:1])):
        x, shape = inputs_from(tmp_path / name)
        assert shape is None and x.dtype == np.float32
        np.testing.assert_array_equal(x, expected)
    np.savez(tmp_path / "bad.npz", points=points[..., :1])
    with pytest.raises(DataFileError, match=r"points must be \[n, N, 2\]"):
        inputs_from(tmp_path / "bad.npz")


def test_presets_hold_every_size_of_the_data():
    for preset in elasticity.PRESETS.values():
        assert {"num_train", "num_valid", "num_test"} <= preset.keys()


TINY = """--num-train 3 --num-valid 2 --num-test 4 --stride 9 --epochs 1 --channel-dim 8
    --num-blocks 1 --num-heads 1 --num-latents 4 --num-layers-ffn 0 --num-layers-k-proj 0
    --num-layers-v-proj 0 --num-layers-in-out-proj 0"""


def test_commands_train_and_predict(tmp_path, samples):
    save(tmp_path, *samples)
    run, out = tmp_path / "run", tmp_path / "stress.npz"
    options = ["--data", str(tmp_path), "--out", str(run), *TINY.split()]
    assert main(["train", "elasticity", *options]) == 0
    xy = tmp_path / elasticity.FILES[0]
    assert main(["predict", str(run), str(xy), "--out", str(out)]) == 0
    assert np.load(out)["sigma"].shape == (10, POINTS)
    assert (run / "figure.png").exists() and out.with_suffix(".png").exists()
