"""The FLARE operator in plain XLA, a tile of tokens at a time: any platform, any floating dtype.

A `lax.fori_loop` walks the tokens in tiles; only one tile of scores exists at a time, so peak
memory is linear in N, forward and backward, and no N x M array is ever formed. Encode keeps a
running maximum and sum per latent (online softmax); decode normalises over latents, which are all
inside the tile. Products take operands in the input dtype and accumulate in at least float32.

With float32 inputs an NVIDIA GPU may multiply in TF32 (about 3e-4 relative): set
`jax.default_matmul_precision("highest")` for full float32.
"""

import jax
import jax.numpy as jnp
from jax import lax

from flare_jax.ops.reference import drop, scores

SCORES_PER_TILE = 2**22  # B H M T of one tile: 16 MB of float32, cache-sized on a CPU
MIN_TILE = 128  # tokens


def supports(q, k, v, mask) -> None:
    """Every shape and floating dtype on every platform."""


def tile_size(q, k) -> int:
    """Tokens T in one tile, so that its scores [B, H, M, T] stay near SCORES_PER_TILE."""
    (m, h, _), (b, n) = q.shape, k.shape[:2]
    return min(n, max(MIN_TILE, SCORES_PER_TILE // (b * h * m)))


def walk(body, carry, size, n, mask, *tokens):
    """Folds `carry = body(carry, start, real, *tiles)` over tiles of `size` tokens.

    The last tile is shifted left to end at token n, so that every tile has one shape; `real`
    [B or 1, size] is False for tokens that an earlier tile has seen and for masked ones (None when
    all are real). Writing per-token results twice is harmless: they are the same numbers.
    """
    if size == n:
        return body(carry, 0, mask, *drop(mask, *tokens))

    def step(i, carry):
        start = jnp.minimum(i * size, n - size)
        cut = lambda x: lax.dynamic_slice_in_dim(x, start, size, axis=1)
        own = None if mask is None else cut(mask)
        tiles = drop(own, *map(cut, tokens))
        real = (start + jnp.arange(size) >= i * size)[None]
        real = real if own is None else real & own
        return body(carry, start, real, *tiles)

    return lax.fori_loop(0, -(-n // size), step, carry)


def put(out, tile, start):
    """Writes a tile of per-token results into `out` at token `start`."""
    return lax.dynamic_update_slice_in_dim(out, tile.astype(out.dtype), start, axis=1)


def encode(q, k, v, mask, scale):
    """z [B, M, H, D] and lse [B, M, H] in at least float32; z = 0, lse = -inf without tokens."""
    (m, h, d), (b, n), acc = q.shape, k.shape[:2], jnp.promote_types(k.dtype, jnp.float32)

    def body(carry, start, real, k, v):
        peak, total, z = carry  # [B, H, M], [B, H, M], [B, H, M, D]
        s = scores(q, k, scale)  # [B, H, M, T]
        if real is not None:
            s = jnp.where(real[:, None, None, :], s, -jnp.inf)
        new = jnp.maximum(peak, s.max(-1))
        shift = jnp.where(jnp.isfinite(new), new, 0)  # no real token so far: keep exp(-inf) = 0
        e, keep = jnp.exp(s - shift[..., None]), jnp.exp(peak - shift)
        ev = jnp.einsum("bhmt,bthd->bhmd", e.astype(v.dtype), v, preferred_element_type=acc)
        return new, total * keep + e.sum(-1), z * keep[..., None] + ev

    start = (
        jnp.full((b, h, m), -jnp.inf, acc),
        jnp.zeros((b, h, m), acc),
        jnp.zeros((b, h, m, d), acc),
    )
    peak, total, z = walk(body, start, tile_size(q, k), n, mask, k, v)
    safe = jnp.where(total > 0, total, 1)
    lse = jnp.where(total > 0, peak + jnp.log(safe), -jnp.inf)
    return (z / safe[..., None]).swapaxes(1, 2), lse.swapaxes(1, 2)


def decode(q, k, z, mask, scale):
    """y [B, N, H, D] in the dtype of k, zero at masked tokens."""
    n, acc = k.shape[1], jnp.promote_types(k.dtype, jnp.float32)

    def body(y, start, real, k):
        p = jax.nn.softmax(scores(q, k, scale), axis=2)  # over M
        tile = jnp.einsum(
            "bhmt,bmhd->bthd", p.astype(k.dtype), z.astype(k.dtype), preferred_element_type=acc
        )
        return put(y, tile, start)

    return drop(mask, walk(body, jnp.zeros_like(k), tile_size(q, k), n, mask, k))[0]


def encode_vjp(q, k, v, mask, scale, z, lse, dz, dlse=None):
    """dq, dk, dv from the cotangents of z and lse.

    With A = exp(S - lse):  dv = A^T dz,  dS = A (dz v^T - dz.z + dlse),  dk = dS^T q,  dq = dS k.
    z and lse may come from more tokens than are given here (a merge over splits or devices).
    """
    n, acc = k.shape[1], jnp.promote_types(k.dtype, jnp.float32)
    lse = jnp.where(jnp.isfinite(lse), lse, 0).swapaxes(1, 2)[..., None]  # [B, H, M, 1]
    dz = dz.astype(v.dtype)  # rounded before delta: where A is 1, da cancels exactly
    delta = jnp.sum(dz.astype(acc) * z, -1) - (0 if dlse is None else dlse)  # [B, M, H]
    delta = delta.swapaxes(1, 2)[..., None]

    def body(carry, start, real, k, v):
        dq, dk, dv = carry
        s = scores(q, k, scale)  # [B, H, M, T]
        if real is not None:
            s = jnp.where(real[:, None, None, :], s, -jnp.inf)
        a = jnp.exp(s - lse)
        da = jnp.einsum("bmhd,bthd->bhmt", dz, v, preferred_element_type=acc) - delta
        ds = (scale * a * da).astype(k.dtype)
        dq += jnp.einsum("bhmt,bthd->mhd", ds, k, preferred_element_type=acc)
        dk_tile = jnp.einsum("bhmt,mhd->bthd", ds, q, preferred_element_type=acc)
        dv_tile = jnp.einsum("bhmt,bmhd->bthd", a.astype(v.dtype), dz, preferred_element_type=acc)
        return dq, add(dk, dk_tile, start), add(dv, dv_tile, start)

    def add(out, tile, start):  # seen tokens are zero in `tile`, so they keep what they have
        old = lax.dynamic_slice_in_dim(out, start, tile.shape[1], axis=1)
        return put(out, old + tile.astype(out.dtype), start)

    start = (jnp.zeros(q.shape, acc), jnp.zeros_like(k), jnp.zeros_like(v))
    return walk(body, start, tile_size(q, k), n, mask, k, v)


def decode_vjp(q, k, z, mask, scale, dy):
    """dq, dk, dz from the cotangent of y.

    With P = softmax(S^T over M):  dz = P^T dy,  dP = dy z^T,  dS = P (dP - sum_M P dP).
    """
    n, acc = k.shape[1], jnp.promote_types(k.dtype, jnp.float32)
    z_in = z.astype(k.dtype)

    def body(carry, start, real, k, dy):
        dq, dk, dz = carry
        p = jax.nn.softmax(scores(q, k, scale), axis=2)  # [B, H, M, T]
        dp = jnp.einsum("bthd,bmhd->bhmt", dy, z_in, preferred_element_type=acc)
        ds = (scale * p * (dp - jnp.sum(p * dp, 2, keepdims=True))).astype(k.dtype)
        dk = put(dk, jnp.einsum("bhmt,mhd->bthd", ds, q, preferred_element_type=acc), start)
        if real is not None:  # sums over tokens must count each token once
            dy = jnp.where(real[:, :, None, None], dy, 0)
            ds = jnp.where(real[:, None, None, :], ds, 0)
        dz += jnp.einsum("bhmt,bthd->bmhd", p.astype(dy.dtype), dy, preferred_element_type=acc)
        dq += jnp.einsum("bhmt,bthd->mhd", ds, k, preferred_element_type=acc)
        return dq, dk, dz

    start = (jnp.zeros(q.shape, acc), jnp.zeros_like(k), jnp.zeros(z.shape, acc))
    return walk(body, start, tile_size(q, k), n, mask, k, dy.astype(k.dtype))
