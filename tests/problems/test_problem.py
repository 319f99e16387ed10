import dataclasses

import jax
import numpy as np
import pytest

from flare_jax.problems.metrics import rel_l2
from flare_jax.problems.problem import Normalizer, Problem, Split

RNG = np.random.default_rng(0)


def split(n, points=6):
    x, y = RNG.normal(size=(2, n, points, 2)).astype(np.float32)
    return Split(x, y[..., :1], None)


def problem(**changes):
    normalizer = Normalizer(np.zeros(2, np.float32), np.ones(2, np.float32))
    fields = {
        "name": "toy",
        "train": split(4),
        "valid": None,
        "test": split(3),
        "x_normalizer": normalizer,
        "y_normalizer": jax.tree.map(lambda x: x[:1], normalizer),
        "loss": rel_l2,
        "inputs": ("x", "a"),
        "targets": ("u",),
        "shape": (2, 3),
    }
    return Problem(**(fields | changes))


@pytest.mark.parametrize("size", [1e-21, 1e20])
def test_fields_whose_squares_are_no_float32_are_refused(size):
    own = Normalizer(np.zeros(1, np.float32), np.full(1, size, np.float32))
    with pytest.raises(ValueError, match="toy: y: values are of the order of 1e.* other units"):
        problem(y_normalizer=own)


def test_encoded_training_data_has_zero_mean_and_unit_variance():
    x = 5 + 3 * RNG.normal(size=(8, 50, 2)).astype(np.float32)
    normalizer = Normalizer.fit(x)
    encoded = normalizer.encode(x)
    np.testing.assert_allclose(encoded.mean((0, 1)), 0, atol=1e-5)
    np.testing.assert_allclose(encoded.std((0, 1)), 1, rtol=1e-5)
    np.testing.assert_allclose(normalizer.decode(encoded), x, rtol=1e-5)


def test_fit_sees_real_points_only():
    x = RNG.normal(size=(3, 10, 2)).astype(np.float32)
    mask = np.arange(10) < np.array([10, 7, 1])[:, None]
    padded = np.where(mask[..., None], x, np.nan)
    mean, std = Normalizer.fit(padded, mask)
    np.testing.assert_allclose(mean, x[mask].mean(0), rtol=1e-5)
    np.testing.assert_allclose(std, x[mask].std(0), rtol=1e-5)


def test_parts_give_the_statistics_of_all_their_points():
    parts = [(100 + RNG.normal(size=(n, 2)) * (1, 0)).astype(np.float32) for n in (3, 8, 1)]
    found, whole = Normalizer.fit_parts(parts), Normalizer.fit(np.concatenate(parts)[None])
    np.testing.assert_allclose(found, whole, rtol=1e-6)
    assert found.std[1] == 1  # constant


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_constant_field_has_unit_std(value):
    x = np.full((5, 100, 1), value, np.float32)
    normalizer = Normalizer.fit(x)
    assert normalizer.std == 1
    np.testing.assert_allclose(normalizer.encode(x), 0, atol=1e-6)


def test_raw_fields_are_left_alone():
    x = RNG.normal(size=(5, 9, 3)).astype(np.float32) + 4
    encoded = Normalizer.fit(x, raw=(0, 1)).encode(x)
    assert np.array_equal(encoded[..., :2], x[..., :2])
    assert abs(encoded[..., 2].mean()) < 1e-5


def test_normalizer_is_a_pytree():
    normalizer = Normalizer.fit(RNG.normal(size=(5, 9, 1)).astype(np.float32))
    decoded = jax.jit(lambda n, x: n.decode(n.encode(x)))(normalizer, np.ones((1, 2, 1)))
    np.testing.assert_allclose(decoded, 1, rtol=1e-6)


def test_mean_error_is_that_of_the_pointwise_training_mean():
    p = problem()
    mean = np.broadcast_to(p.train.y.mean(0), p.test.y.shape)
    with jax.transfer_guard("disallow_explicit"):  # the test split may be larger than the device
        found = p.mean_error
    np.testing.assert_allclose(found, rel_l2(mean, p.test.y).mean(), rtol=1e-6)


def test_mean_error_of_padded_samples_uses_one_mean_per_field():
    mask = np.ones((4, 6), bool)
    p = problem(train=split(4)._replace(mask=mask), test=split(3, 8), shape=None)
    np.testing.assert_allclose(p.mean_error, 1, rtol=1e-6)  # this toy's y_normalizer has mean 0


def test_contents_are_those_of_the_samples_in_any_order():
    p = problem(valid=split(2))
    shuffled = dataclasses.replace(p, test=Split(p.test.x[::-1], p.test.y[::-1]))
    shuffled.check_contents(p.contents, None)
    assert p.contents["valid"].keys() == {"samples", "points", "digest"}
    dataclasses.replace(p, generated=True).check_contents(None, None)
    other = dataclasses.replace(p, test=split(3), valid=None)
    with pytest.raises(ValueError, match="in here are not") as error:
        other.check_contents(p.contents, "here")
    lines = str(error.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["valid", "test"]
    assert lines[1].endswith("-> none") and "3 samples, 18 points" in lines[2]
    made = dataclasses.replace(p, generated=True)
    dataclasses.replace(other, valid=p.valid, generated=True).check_contents(made.contents, None)


def with_nan(split):
    x = split.x.copy()
    x[1, 2, 0] = np.nan
    return split._replace(x=x)


GOOD = split(4)
BAD = {
    "test: x of sample 1 is not finite": {"test": with_nan(GOOD)},
    "must be float32, got float64": {"test": GOOD._replace(y=GOOD.y.astype(np.float64))},
    "differ in samples or points": {"train": GOOD._replace(y=GOOD.y[:2])},
    "holds no samples": {"valid": Split(*(x[:0] for x in GOOD[:2]), None)},
    "2 columns for 1 input names": {"inputs": ("x",)},
    "must be .n, N, fields.": {"train": Split(GOOD.x[0], GOOD.y[0], None)},
    "mask must be bool": {"train": GOOD._replace(mask=np.ones((4, 6)))},
    "6 points, grid is": {"shape": (3, 3)},
    "y_normalizer: mean": {"y_normalizer": Normalizer(np.zeros(2), np.ones(2))},
    "positive std": {"x_normalizer": Normalizer(np.zeros(2), np.zeros(2))},
}


@pytest.mark.parametrize("message", BAD)
def test_inconsistent_problem_is_refused(message):
    with pytest.raises(ValueError, match=message):
        problem(**BAD[message])


def test_problem_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        problem().name = "other"
