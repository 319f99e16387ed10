import dataclasses
from pathlib import Path

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.io

from flare_jax.data.arrays import DataFileError
from flare_jax.problems import darcy
from flare_jax.problems.darcy import DarcyConfig, derivative_loss, inputs_from, load
from flare_jax.problems.metrics import rel_l2

SMALL_FILES = Path(__file__).parents[3] / "shared" / "data"
GENERATED = {"grid": 13, "num_train": 4, "num_valid": 2, "num_test": 3}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def samples():
    """Two files' worth of coefficients and solutions on a 16 x 16 grid, as [file, n, 16, 16]."""
    rng = np.random.default_rng(0)
    return rng.choice([3.0, 12.0], (2, 6, 16, 16)), rng.normal(size=(2, 6, 16, 16))


def save_published(folder, samples, version):
    """Writes the two published files, in the axis order of each MATLAB version."""
    for name, a, u in zip(darcy.FILES[0], *samples, strict=True):
        if version == "5":
            scipy.io.savemat(folder / name, {"coeff": a, "sol": u})
        else:
            with h5py.File(folder / name, "w", userblock_size=512) as file:
                file["coeff"], file["sol"] = a.T, u.T


@pytest.mark.parametrize("version", ["5", "7.3"])
def test_published_files_are_split_as_documented(tmp_path, samples, version):
    save_published(tmp_path, samples, version)
    p = load(DarcyConfig(tmp_path, stride=5, num_train=3, num_valid=2, num_test=4))
    a, u = (x[:, :, ::5, ::5].reshape(2, 6, 16).astype(np.float32) for x in samples)
    assert p.shape == (4, 4) and p.inputs == ("x", "y", "a") and p.targets == ("u",)
    np.testing.assert_array_equal(p.train.y[..., 0], u[0, :3])
    np.testing.assert_array_equal(p.valid.y[..., 0], u[0, 3:5])
    np.testing.assert_array_equal(p.test.y[..., 0], u[1, :4])
    raw = p.x_normalizer.decode(p.test.x)
    np.testing.assert_allclose(raw[..., 2], a[1, :4], rtol=1e-5)


def test_normalisers_see_training_samples_only(tmp_path, samples):
    save_published(tmp_path, samples, "5")
    p = load(DarcyConfig(tmp_path, stride=1, num_train=3, num_valid=2, num_test=4))
    a, u = (x[0, :3] for x in samples)
    np.testing.assert_allclose(p.x_normalizer.mean, [0, 0, a.mean()], rtol=1e-6)
    np.testing.assert_allclose(p.x_normalizer.std, [1, 1, a.std()], rtol=1e-6)
    np.testing.assert_allclose(p.y_normalizer, [[u.mean()], [u.std()]], rtol=1e-5)


def test_positions_span_the_unit_square():
    x = darcy.grid_inputs(np.arange(2 * 3 * 3).reshape(2, 3, 3)).reshape(2, 3, 3, 3)
    assert x[0, :, 0, 0].tolist() == x[1, 0, :, 1].tolist() == [0, 0.5, 1]
    assert x[0, 2, 1].tolist() == [1, 0.5, 7]


def test_generated_splits_share_no_sample(cache):
    p = load(DarcyConfig(cache=cache, **GENERATED), progress=False)
    fields = np.concatenate([p.train.y, p.valid.y, p.test.y])
    assert fields.shape == (9, 169, 1) and len(np.unique(fields, axis=0)) == 9


def test_more_training_samples_change_no_other(cache):
    config = DarcyConfig(cache=cache, **GENERATED)
    few = load(config, progress=False)
    more = load(dataclasses.replace(config, num_train=6, num_valid=0), progress=False)
    assert more.valid is None
    np.testing.assert_array_equal(few.train.y, more.train.y[:4])
    np.testing.assert_array_equal(few.test.y, more.test.y)


def test_derivative_loss_adds_both_derivatives():
    prediction, target = np.random.default_rng(0).normal(size=(2, 2, 20, 1)).astype(np.float32)
    loss = derivative_loss(prediction, target, shape=(4, 5))
    p, t = (
        np.pad(x.reshape(2, 4, 5, 1), ((0, 0), (1, 1), (1, 1), (0, 0)))
        for x in (prediction, target)
    )
    difference = (
        lambda u: u[:, 2:, 1:-1] - u[:, :-2, 1:-1],
        lambda u: u[:, 1:-1, 2:] - u[:, 1:-1, :-2],
    )
    flat = [[d(u).reshape(2, 20, 1) for u in (p, t)] for d in difference]
    expected = rel_l2(prediction, target) + 0.1 * sum(rel_l2(*pair) for pair in flat)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_derivative_loss_of_equal_fields_is_zero():
    u = np.random.default_rng(0).normal(size=(2, 20, 1)).astype(np.float32)
    value, gradient = jax.value_and_grad(lambda p: derivative_loss(p, u, shape=(4, 5)).sum())(u)
    assert value == 0 and jnp.isfinite(gradient).all()


@pytest.mark.skipif(not SMALL_FILES.is_dir(), reason=f"no small real files at {SMALL_FILES}")
def test_small_real_files_are_read():
    p = load(DarcyConfig(SMALL_FILES, num_train=900, num_valid=100, num_test=50))
    assert [len(s.x) for s in (p.train, p.valid, p.test)] == [900, 100, 50]
    assert p.shape == (16, 16) and 0.3 < p.mean_error < 0.7


@pytest.mark.parametrize("suffix, key", [(".npz", "coefficient"), (".mat", "coeff")])
@pytest.mark.parametrize("shape", [(4, 4), (2, 4, 4)])
def test_inputs_for_prediction_come_from_a_coefficient(tmp_path, suffix, key, shape):
    a = np.random.default_rng(0).choice([False, True], shape)
    path = tmp_path / f"my{suffix}"
    np.savez(path, **{key: a}) if suffix == ".npz" else scipy.io.savemat(path, {key: a})
    x, grid = inputs_from(path)
    assert grid == (4, 4) and x.dtype == np.float32
    np.testing.assert_array_equal(x, darcy.grid_inputs(a.reshape(-1, 4, 4)))


def test_bad_requests_say_what_is_wrong(tmp_path, samples):
    with pytest.raises(FileNotFoundError, match="neither piececonst"):
        load(DarcyConfig(tmp_path))
    save_published(tmp_path, samples, "5")
    with pytest.raises(ValueError, match=r"holds 6 samples, num_train \+ num_valid asks for 9"):
        load(DarcyConfig(tmp_path, num_train=5, num_valid=4))
    with pytest.raises(ValueError, match="stride must divide 15"):
        load(DarcyConfig(tmp_path, stride=4, num_train=3, num_valid=2, num_test=4))
    with pytest.raises(DataFileError, match="expected one of .mat, .npz"):
        inputs_from(tmp_path / "a.csv")


@pytest.mark.parametrize("field", ["num_train", "num_test", "grid"])
def test_config_refuses_nothing_at_all(field):
    with pytest.raises(ValueError, match=field):
        DarcyConfig(**{field: 0})


def test_presets_hold_every_size_of_the_data():
    fields = {field.name for field in dataclasses.fields(DarcyConfig)}
    for preset in darcy.PRESETS.values():
        DarcyConfig(**{k: v for k, v in preset.items() if k in fields})
        assert {"grid", "stride", "num_train", "num_valid", "num_test"} <= preset.keys()
