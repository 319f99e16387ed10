import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flare_jax.problems.metrics import rel_l2, rel_l2_on_host

RNG = np.random.default_rng(0)
PREDICTION, TARGET = RNG.normal(size=(2, 3, 10, 2)).astype(np.float32)
MASK = np.arange(10) < np.array([10, 7, 1])[:, None]


def test_equals_the_formula():
    expected = [
        np.linalg.norm(p - t) / np.linalg.norm(t) for p, t in zip(PREDICTION, TARGET, strict=True)
    ]
    np.testing.assert_allclose(rel_l2(PREDICTION, TARGET), expected, rtol=1e-6)


def test_padding_is_invisible():
    padded = [np.where(MASK[..., None], x, np.nan) for x in (PREDICTION, TARGET)]
    value, gradient = jax.value_and_grad(lambda p: rel_l2(p, padded[1], MASK).sum())(padded[0])
    expected = sum(
        rel_l2(p[None, :n], t[None, :n])[0]
        for p, t, n in zip(PREDICTION, TARGET, (10, 7, 1), strict=True)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert (gradient[~MASK] == 0).all() and jnp.isfinite(gradient).all()


@pytest.mark.parametrize("prediction, target", [(TARGET, TARGET), (TARGET, 0 * TARGET)])
def test_value_and_gradient_stay_finite(prediction, target):
    value, gradient = jax.value_and_grad(lambda p: rel_l2(p, target).sum())(prediction)
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all()


def test_sample_of_padding_alone_is_zero():
    assert rel_l2(PREDICTION, TARGET, np.zeros((3, 10), bool)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("mask", [None, MASK, MASK & (MASK.sum(1, keepdims=True) > 7)])
def test_on_the_host_it_is_the_same(mask):
    target = TARGET * np.array([1, 0, 1], np.float32)[:, None, None]  # one that is zero
    expected = rel_l2(PREDICTION, target, mask)
    with jax.transfer_guard("disallow"):
        found = rel_l2_on_host(PREDICTION, target, mask)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_half_precision_is_summed_in_float32():
    half = jnp.full((1, 10_000, 1), 3.0, jnp.bfloat16)
    error = rel_l2(half * 2, half)
    assert error.dtype == jnp.float32
    np.testing.assert_allclose(error, 1, rtol=1e-6)


@pytest.mark.parametrize("shape", [(3, 10), (3, 10, 1), (1, 10, 2)])
def test_shapes_that_differ_are_refused(shape):
    with pytest.raises((ValueError, TypeError), match="rel_l2"):
        rel_l2(np.ones(shape, np.float32), TARGET)
