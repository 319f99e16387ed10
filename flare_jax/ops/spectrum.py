"""Eigenvalues and eigenvectors of the mixing matrix W = W_dec W_enc, without forming it.

Per sample and head, with scores S = scale q k^T [M, N] and A = exp S,

    W = P E,   E = softmax(S, over N) [M, N] encode,   P = softmax(S^T, over M) [N, M] decode.

With e = log-sum-exp of S over tokens [M] and p = log-sum-exp of S over latents [N],

    J = exp(S - e/2 - p/2) [M, N],   J^T J = D^-1 W D with D = diag exp(-p/2):

W is similar to J^T J, so its eigenvalues are real and in [0, 1], at most M are not zero, and those
are the eigenvalues of the Gram matrix J J^T [M, M]. Rows of W sum to one, so the largest is 1 (as
long as there is a real token), with a constant eigenvector. The entries of J lie in [0, 1] and are
taken from logarithms: nothing overflows, nothing is clamped.

**Vectors.** If J J^T u = lambda u, the latent values w = exp((t - e)/2) u / sqrt(lambda), decoded,
phi = P w, are an eigenvector of W; t = log-sum-exp of all of S. W is a Markov chain on the points
that is reversible for the weights pi = exp(p - t), which sum to one; the phi are orthonormal in
sum_n pi_n phi_n phi'_n, and the first is 1 at every point.

**Cost.** Two passes over the tokens in tiles: time O(N M (M + D) + M^3), memory O(M^2) beside the
arguments.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from flare_jax.ops import xla
from flare_jax.ops.flare import check
from flare_jax.ops.reference import drop, scores

AVERAGING = 1e-2  # second eigenvalue below which a head is said to average


class Spectrum(NamedTuple):
    """Of the mixing matrix of each sample and head; in the dtype of q and k, at least float32."""

    eigenvalues: Float[Array, "B H M"]  # descending; W has N - M further ones, all zero
    floor: Float[Array, "B H"]  # smaller eigenvalues are round-off
    vectors: Float[Array, "B N H R"]  # of the R largest; NaN where the eigenvalue is round-off


def mixing_spectrum(
    q: Float[Array, "M H D"],
    k: Float[Array, "B N H D"],
    *,
    mask: Bool[Array, "B N"] | None = None,
    scale: float = 1.0,
    num_vectors: int = 0,
) -> Spectrum:
    """Eigenvalues of W = softmax(k q^T, over M) softmax(q k^T, over N), and eigenvectors.

    Computed in the dtype of q and k, at least float32, with full float32 products. Round-off of
    the Gram matrix is absolute: the eigenvalues are off by up to about

        floor = eps (4 + 3 sqrt(n) + max scale sum_d |q_d k_d|)

    with n the additions one after another, of a tile's tokens and of tiles. The last term is near
    max |S| unless products cancel in the sum over d. So in float32 those below 1e-5 (a thousand
    tokens) or 1e-4 (a million) mean little, and in float64 (float64 arrays under
    `jax.enable_x64(True)`) those below 1e-13. Computed eigenvalues may be negative by as much.

    Args:
        q, k, mask, scale: as in `flare_attention`. Masked points have zero rows and columns in W.
        num_vectors: R, how many eigenvectors, those of the largest eigenvalues.

    Returns:
        a `Spectrum`. Vectors are zero at masked points; the sign makes the largest of the latent
        values u positive. A sample without a real token has only zero eigenvalues.

    Raises:
        TypeError, ValueError: an argument has the wrong type, rank, shape, dtype or range.
    """
    check(q, k, mask, scale)
    if not 0 <= num_vectors <= len(q):
        raise ValueError(f"num_vectors must be 0 to M = {len(q)}, got {num_vectors}")
    dtype = jnp.promote_types(k.dtype, jnp.float32)
    q, k = q.astype(dtype), k.astype(dtype)
    with jax.default_matmul_precision("highest"):
        lse = xla.encode(q, k, k, mask, scale)[1].swapaxes(1, 2)  # e [B, H, M]
        gram, peak = _gram(q, k, mask, scale, lse)
        eigenvalues, u = jnp.linalg.eigh(gram)  # ascending
        eigenvalues, u = eigenvalues[..., ::-1], u[..., ::-1]
        n, tile = k.shape[1], xla.tile_size(q, k)
        additions = min(n, tile) + n / tile
        floor = jnp.finfo(dtype).eps * (4 + 3 * additions**0.5 + peak)
        u = u[..., :num_vectors]  # [B, H, M, R]
        real = eigenvalues[..., None, :num_vectors] > floor[..., None, None]
        sigma = jnp.sqrt(jnp.where(real, eigenvalues[..., None, :num_vectors], jnp.nan))
        total = jax.nn.logsumexp(lse, axis=-1, keepdims=True)  # t [B, H, 1]
        w = jnp.exp((total - lse) / 2)[..., None] * _upright(u) / sigma
        vectors = _decode(q, k, w, mask, scale)
    return Spectrum(eigenvalues, floor, vectors)


def effective_rank(eigenvalues: Float[Array, "*any M"]) -> Float[Array, "*any"]:
    """exp of the entropy of the eigenvalues over their sum (Roy and Vetterli 2007): 1 to M.

    1 if a head only averages; r if r eigenvalues are equal and the others zero.
    """
    x = jnp.maximum(eigenvalues, 0)
    share = x / jnp.maximum(x.sum(-1, keepdims=True), jnp.finfo(x.dtype).tiny)
    return jnp.exp(jax.scipy.special.entr(share).sum(-1))


def second_eigenvalue(eigenvalues: Float[Array, "*any M"]) -> Float[Array, "*any"]:
    """How much of any deviation from the (pi-weighted) mean one application of W leaves, at most.

    Zero for a single latent.
    """
    return eigenvalues[..., 1:2].sum(-1)


def averaging_heads(
    eigenvalues: Float[Array, "*any M"], tolerance: float = AVERAGING
) -> Bool[Array, "*any"]:
    """True where W does little but average: its second eigenvalue is below `tolerance`."""
    return second_eigenvalue(eigenvalues) < tolerance


def encode_weights(
    q: Float[Array, "M H D"],
    k: Float[Array, "B N H D"],
    *,
    mask: Bool[Array, "B N"] | None = None,
    scale: float = 1.0,
) -> Float[Array, "B H M N"]:
    """Which points each latent gathers from: E = softmax(scale q k^T, over N), rows sum to one.

    Dense, for pictures: give it the latents to draw, q[some]. Arguments as in `flare_attention`.
    """
    check(q, k, mask, scale)
    lse = xla.encode(q, k, k, mask, scale)[1].swapaxes(1, 2)[..., None]  # [B, H, M, 1]
    (k,) = drop(mask, k)
    weights = jnp.exp(scores(q, k, scale) - jnp.where(jnp.isfinite(lse), lse, 0))
    return weights if mask is None else jnp.where(mask[:, None, None, :], weights, 0)


def _gram(q, k, mask, scale, lse):
    """J J^T [B, H, M, M] and max scale sum_d |q_d k_d| [B, H] over real tokens, tile by tile."""
    (m, h, _), (b, n) = q.shape, k.shape[:2]
    e = jnp.where(jnp.isfinite(lse), lse, 0)[..., None]  # [B, H, M, 1]; no real token: 0

    def body(carry, start, real, k):
        gram, peak = carry
        s = scores(q, k, scale)  # [B, H, M, T]
        j = jnp.exp(s - e / 2 - jax.nn.logsumexp(s, axis=2, keepdims=True) / 2)
        size = scores(jnp.abs(q), jnp.abs(k), scale)
        if real is not None:
            j, size = (jnp.where(real[:, None, None, :], x, 0) for x in (j, size))
        gram += jnp.einsum("bhmt,bhlt->bhml", j, j)
        return gram, jnp.maximum(peak, size.max((2, 3)))

    start = jnp.zeros((b, h, m, m), k.dtype), jnp.zeros((b, h), k.dtype)
    return xla.walk(body, start, xla.tile_size(q, k), n, mask, k)


def _decode(q, k, w, mask, scale):
    """phi = softmax(S^T, over M) w: latent values [B, H, M, R] to points [B, N, H, R]."""
    n = k.shape[1]

    def body(out, start, real, k):
        p = jax.nn.softmax(scores(q, k, scale), axis=2)  # [B, H, M, T]
        return xla.put(out, jnp.einsum("bhmt,bhmr->bthr", p, w), start)

    out = jnp.zeros((*k.shape[:3], w.shape[-1]), k.dtype)
    out = xla.walk(body, out, xla.tile_size(q, k), n, mask, k)
    return out if mask is None else jnp.where(mask[:, :, None, None], out, 0)


def _upright(u):
    """Columns [..., M, R] with the sign that makes their largest entry positive."""
    top = jnp.take_along_axis(u, jnp.abs(u).argmax(-2, keepdims=True), axis=-2)
    return jnp.where(top < 0, -u, u)
