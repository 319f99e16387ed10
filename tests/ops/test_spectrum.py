"""Spectra of the mixing matrix against the dense matrix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from flare_jax.ops import spectrum, xla
from flare_jax.ops.flare import flare_encode
from flare_jax.ops.spectrum import (
    averaging_heads,
    effective_rank,
    encode_weights,
    mixing_spectrum,
)

B, N, M, H, D = 2, 37, 6, 2, 4
SCALE = 0.7
compute = jax.jit(mixing_spectrum, static_argnames=("scale", "num_vectors"))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles, the last one ragged."""
    monkeypatch.setattr(xla, "SCORES_PER_TILE", 1)
    monkeypatch.setattr(xla, "MIN_TILE", 16)


def inputs(n=N, size=1.0, masked=False):
    """q, k and mask; masked points hold NaN, the second sample is all padding."""
    rng = np.random.default_rng(0)
    q, k = (size * rng.standard_normal(s) for s in ((M, H, D), (B, n, H, D)))
    if not masked:
        return q, k, None
    mask = rng.random((B, n)) < 0.6
    mask[1] = False
    return q, np.where(mask[:, :, None, None], k, np.nan), mask


def dense(q, k, scale=SCALE):
    """W [H, N, N] and pi [H, N] of one sample, by NumPy in float64."""
    s = scale * np.einsum("mhd,nhd->hmn", q, k)
    encode, decode = scipy.special.softmax(s, -1), scipy.special.softmax(s, 1)
    pi = scipy.special.softmax(scipy.special.logsumexp(s, 1), -1)
    return decode.swapaxes(1, 2) @ encode, pi


@pytest.mark.parametrize("masked", [False, True])
def test_eigenvalues_and_vectors_are_those_of_the_dense_matrix(masked):
    q, k, mask = inputs(masked=masked)
    real = slice(None) if mask is None else mask[0]
    w, pi = dense(q, k[0, real])
    with jax.enable_x64(True):
        found = compute(q, k, mask=mask, scale=SCALE, num_vectors=M)
        found = spectrum.Spectrum(*map(np.asarray, found))
    want = -np.sort(-np.linalg.eigvals(w).real)[:, :M]
    np.testing.assert_allclose(found.eigenvalues[0], want, atol=1e-13)
    phi = found.vectors[0, real].swapaxes(0, 1)  # [H, N, R]
    np.testing.assert_allclose(w @ phi, found.eigenvalues[0][:, None] * phi, atol=1e-12)
    gram = np.einsum("hnr,hn,hns->hrs", phi, pi, phi)
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(M), gram.shape), atol=1e-8)
    np.testing.assert_allclose(phi[..., 0], 1, atol=1e-12)
    if masked:
        assert not found.eigenvalues[1].any()
        assert not found.vectors[0, ~mask[0]].any()


def cancelling():
    """Scores of about 1 that are differences of products of about 1000."""
    q, k, _ = inputs(1000)
    joined = lambda x, y: np.concatenate([x, y], -1)
    return joined(1000 * q, -1000 * q), joined(k, k + 1e-3 * inputs(1000)[1][::-1])


CASES = {
    "small": lambda: inputs(size=0.1),
    "usual": inputs,
    "large": lambda: inputs(size=3.0),
    "many points": lambda: inputs(20_000),
    "many equal weights": lambda: (np.zeros((64, 1, 8)), np.ones((1, 20_000, 1, 8))),
    "cancelling": cancelling,
}


@pytest.mark.parametrize("tile", [16, 1 << 14])
@pytest.mark.parametrize("case", CASES)
def test_float32_is_within_its_floor(monkeypatch, case, tile):
    monkeypatch.setattr(xla, "MIN_TILE", tile)
    compute = jax.jit(lambda q, k: mixing_spectrum(q, k))  # traced anew, for this tile
    q, k = CASES[case]()[:2]
    q, k = q.astype(np.float32), k.astype(np.float32)
    low = compute(q, k)
    with jax.enable_x64(True):
        high = np.asarray(compute(q.astype(np.float64), k.astype(np.float64)).eigenvalues)
    assert low.eigenvalues.dtype == jnp.float32
    error = np.abs(np.asarray(low.eigenvalues, np.float64) - high)
    assert (error <= np.asarray(low.floor)[..., None]).all()


@pytest.mark.parametrize("n", [1, 3, N])
def test_eigenvalues_are_between_0_and_1_and_no_more_than_points(n):
    q, k, _ = inputs(n)
    values, floor, _ = compute(q.astype(np.float32), k.astype(np.float32))
    floor = np.asarray(floor)[..., None]
    np.testing.assert_allclose(values[..., 0], 1, atol=floor.max())
    assert (values >= -floor).all() and (values <= 1 + floor).all()
    assert ((values > floor).sum(-1) <= min(n, M)).all()


def test_a_constant_added_to_all_scores_changes_nothing():
    q, k, _ = inputs()
    with_one = lambda x, value: np.concatenate([x, np.full((*x.shape[:-1], 1), value)], -1)
    with jax.enable_x64(True):
        a = compute(q, k, num_vectors=2)
        b = compute(with_one(q, 1.0), with_one(k, 900.0), num_vectors=2)  # exp(900) overflows
        np.testing.assert_allclose(a.eigenvalues, b.eigenvalues, atol=float(b.floor.max()))
        np.testing.assert_allclose(a.vectors, b.vectors, atol=1e-10)


def test_huge_scores_are_not_clamped():
    q, k, _ = inputs(size=20)  # scores of +-1000: each point chooses one latent, or nearly
    with jax.enable_x64(True):
        values = np.asarray(compute(q, k).eigenvalues[0])
    want = -np.sort(-np.linalg.eigvals(dense(q, k[0], 1.0)[0]).real)[:, :M]
    np.testing.assert_allclose(values, want, atol=1e-12)
    clamped = np.clip(np.einsum("mhd,nhd->hmn", q, k[0]), -30, 30)
    encode, decode = scipy.special.softmax(clamped, -1), scipy.special.softmax(clamped, 1)
    assert (
        np.abs(np.linalg.eigvals(encode @ decode.swapaxes(1, 2)).real.sum(-1) - want.sum(-1)).max()
        > 1
    )


def test_encode_weights_are_those_of_the_operator():
    q, k, mask = inputs(masked=True)
    q, k, v = (x.astype(np.float32) for x in (q, k, k))
    weights = encode_weights(q[:3], k, mask=mask, scale=SCALE)
    z, _ = flare_encode(q, k, v, mask=mask, scale=SCALE, implementation="reference")
    got = np.einsum("bhmn,bnhd->bmhd", weights, np.where(mask[:, :, None, None], v, 0))
    np.testing.assert_allclose(got, z[:, :3], atol=1e-5)
    np.testing.assert_allclose(weights[0].sum(-1), 1, rtol=1e-5)
    assert not weights[1].any()


def test_equal_queries_average():
    q, k, _ = inputs()
    values, floor, vectors = compute(
        np.zeros_like(q, np.float32), k.astype(np.float32), num_vectors=2
    )
    assert averaging_heads(values).all()
    np.testing.assert_allclose(effective_rank(values), 1, atol=1e-4)
    assert np.isnan(vectors[..., 1]).all()  # of an eigenvalue that is round-off


def test_summaries_of_known_spectra():
    values = jnp.array([[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, -1e-9], [1.0, 0.5, 0.0, 0.0]])
    rank = effective_rank(values)
    np.testing.assert_allclose(rank, [3, 1, np.exp(np.log(3) - 2 / 3 * np.log(2))], rtol=1e-5)
    assert averaging_heads(values).tolist() == [False, True, False]
    assert averaging_heads(values[:, :1]).all()  # one latent can only average


def test_memory_does_not_grow_with_points_times_latents(monkeypatch):
    monkeypatch.setattr(xla, "SCORES_PER_TILE", 2**18)
    n, m, h, d = 2**17, 128, 2, 4
    q, k = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((m, h, d), (1, n, h, d)))
    run = jax.jit(functools.partial(mixing_spectrum, num_vectors=1))
    memory = run.lower(q, k).compile().memory_analysis()
    assert memory.temp_size_in_bytes < n * m * h * 4 / 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=np.ones((3, 4), np.float32)), r"q must be \[M, H, D\]"),
        (dict(scale=0.0), "scale must be a positive"),
        (dict(mask=np.ones((1, 5))), "mask must be a bool"),
        (dict(num_vectors=4), "num_vectors must be 0 to M = 3, got 4"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = dict(q=np.ones((3, 2, 4), np.float32), k=np.ones((1, 5, 2, 4), np.float32))
    with pytest.raises(ValueError, match=message):
        mixing_spectrum(**(arguments | change))
