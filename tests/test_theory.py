"""The statements of docs/how_it_works.md, number by number, on dense matrices in float64."""

import numpy as np
import pytest
from scipy.special import logsumexp, softmax

from flare_jax import flare_attention

N, M, D = 12, 4, 3


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def matrices(size=1.0, scale=1.0, seed=0):
    """E [M, N], P [N, M] and pi [N]."""
    q, k = size * normal(M, D, seed=seed), size * normal(N, D, seed=seed + 1)
    s = scale * q @ k.T
    return softmax(s, 1), softmax(s.T, 1), softmax(logsumexp(s, 0))


@pytest.fixture(params=[0.3, 1.0, 4.0], ids="size {}".format)
def mixer(request):
    encode, decode, pi = matrices(request.param)
    return decode @ encode, pi


def test_dense_matrices_are_the_operator():
    q, k, v = normal(M, D), normal(N, D, seed=1), normal(N, D, seed=2)
    encode, decode, _ = matrices(scale=0.5)
    arrays = [x.astype(np.float32) for x in (q[:, None], k[None, :, None], v[None, :, None])]
    y = flare_attention(*arrays, scale=0.5)[0, :, 0]
    np.testing.assert_allclose(y, decode @ encode @ v, atol=1e-6)


def test_1_rank_is_at_most_the_latents_and_a_residual_keeps_everything(mixer):
    w, _ = mixer
    assert np.linalg.matrix_rank(w) <= M
    values = np.linalg.eigvals(np.eye(N) + w)
    assert values.real.min() >= 1 - 1e-12 and values.real.max() <= 2 + 1e-12


def test_1_the_rank_is_attained():
    s = 40 * np.eye(M, N)
    w = softmax(s.T, 1) @ softmax(s, 1)
    assert np.linalg.matrix_rank(w) == M


def test_2_rows_are_means_and_pi_is_stationary(mixer):
    w, pi = mixer
    assert (w > 0).all()
    np.testing.assert_allclose(w.sum(1), 1, rtol=1e-13)
    np.testing.assert_allclose(pi @ w, pi, rtol=1e-12)
    v = normal(N, seed=2)
    y = w @ v
    assert v.min() <= y.min() and y.max() <= v.max()
    assert pi @ y == pytest.approx(pi @ v, abs=1e-13)


def test_3_eigenvalues_are_real_and_between_0_and_1(mixer):
    w, _ = mixer
    values = np.linalg.eigvals(w)
    assert np.abs(values.imag).max() <= 1e-7  # a double zero splits into +-sqrt(round-off)
    assert values.real.min() >= -1e-7 and values.real.max() <= 1 + 1e-12
    assert values.real.max() == pytest.approx(1, abs=1e-12)


def test_3_the_chain_is_reversible_and_eigenvectors_are_decoded_latents():
    encode, decode, pi = matrices()
    w = decode @ encode
    flow = pi[:, None] * w
    np.testing.assert_allclose(flow, flow.T, rtol=1e-12)
    values, latents = np.linalg.eig(encode @ decode)  # [M, M], the latents' own chain
    phi = decode @ latents
    np.testing.assert_allclose(w @ phi, values * phi, atol=1e-13)
    gram = phi.T * pi @ phi
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-12)


def test_3_variance_shrinks_by_the_second_eigenvalue(mixer):
    w, pi = mixer
    second = np.sort(np.linalg.eigvals(w).real)[-2]
    x = normal(N, 20, seed=3)
    variance = lambda x: pi @ (x - pi @ x) ** 2
    assert (variance(w @ x) <= second**2 * variance(x) * (1 + 1e-10)).all()


@pytest.mark.parametrize(("count", "want"), [(3, -0.5 + 0.75**0.5 * 1j), (2, -1)])
def test_4_different_queries_lose_real_and_positive_eigenvalues(count, want):
    s = 10 * np.eye(count)
    shifted = np.roll(s, 1, axis=0)
    w = softmax(shifted.T, 1) @ softmax(s, 1)
    np.testing.assert_allclose(w.sum(1), 1)  # still means
    assert np.abs(np.linalg.eigvals(w) - want).min() <= 1e-3
    symmetric = softmax(s.T, 1) @ softmax(s, 1)
    assert np.linalg.eigvals(symmetric).real.min() >= 0


@pytest.mark.parametrize("epsilon", [1e-6, 1e-2, 0.5])
@pytest.mark.parametrize("size", [0.3, 3.0])
def test_5_moved_scores_move_the_output_by_no_more_than_the_bound(size, epsilon):
    q, k, v = size * normal(M, D), size * normal(N, D, seed=1), normal(N, 5, seed=2)
    s = q @ k.T
    y = lambda s: softmax(s.T, 1) @ softmax(s, 1) @ v
    bound = np.expm1(2 * epsilon) * np.ptp(v, axis=0)
    for seed in range(20):
        moved = s + epsilon * np.random.default_rng(seed).choice([-1, 1], s.shape)
        assert (np.abs(y(moved) - y(s)).max(0) <= bound).all()


def test_5_the_gradient_of_v_keeps_the_sum(mixer):
    w, _ = mixer
    dy = normal(N, 5, seed=4)
    np.testing.assert_allclose((w.T @ dy).sum(0), dy.sum(0), atol=1e-12)


@pytest.mark.parametrize("offset", [10.0, 1000.0])
def test_5_a_constant_in_the_scores_costs_the_digits_it_has(offset):
    q, k, v = normal(M, D), normal(N, D, seed=1), normal(N, D, seed=2)
    y = matrices()[1] @ matrices()[0] @ v
    wide = lambda x, value: np.concatenate([x, np.full((len(x), 1), value)], 1)
    q, k, v = (x.astype(np.float32) for x in (wide(q, 1.0), wide(k, offset), wide(v, 0.0)))
    moved = np.asarray(flare_attention(q[:, None], k[None, :, None], v[None, :, None]))
    error = np.abs(moved[0, :, 0, :D] - y).max()
    assert error <= 4 * 2.0**-24 * (offset + 20) * np.ptp(v)
