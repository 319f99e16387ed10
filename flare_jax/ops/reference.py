"""The FLARE operator written out densely: the oracle of every test.

    S = scale q k^T                     [B, H, M, N]
    z = softmax(S, over N) v            encode
    y = softmax(S^T, over M) z          decode

Memory and time are O(B H M N). The functions are plain jnp, so they differentiate in every mode
of JAX; their `_vjp` partners are exactly that, `jax.vjp` of the equations above.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Mask = Bool[Array, "B N"] | None


def supports(q, k, v, mask) -> None:
    """Every shape and floating dtype on every platform."""


def scores(q, k, scale):
    """S = scale q k^T [B, H, M, N], in at least float32."""
    dtype = jnp.promote_types(k.dtype, jnp.float32)
    return scale * jnp.einsum("mhd,bnhd->bhmn", q, k, preferred_element_type=dtype)


def drop(mask, *tokens):
    """Zeroes the masked tokens of `[B, N, H, D]` arrays, so that not even a NaN there is seen."""
    if mask is None:
        return tokens
    return tuple(jnp.where(mask[:, :, None, None], x, jnp.zeros((), x.dtype)) for x in tokens)


def merge_parts(
    z: Float[Array, "R B M H D"], lse: Float[Array, "R B M H"]
) -> tuple[Float[Array, "B M H D"], Float[Array, "B M H"]]:
    """z and lse of all tokens from those of R parts of them; 0 and -inf where no part has any.

    lse = log sum_r exp(lse_r),    z = sum_r exp(lse_r - lse) z_r
    """
    total = jax.nn.logsumexp(lse, axis=0)
    weight = jnp.exp(lse - jnp.where(jnp.isfinite(total), total, 0)[None])
    return jnp.sum(weight[..., None] * z, axis=0), total


def encode(
    q: Float[Array, "M H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    mask: Mask,
    scale: float,
) -> tuple[Float[Array, "B M H D"], Float[Array, "B M H"]]:
    """z and the log-sum-exp of S over tokens, both in at least float32."""
    k, v = drop(mask, k, v)
    s = scores(q, k, scale)  # [B, H, M, N]
    real = True if mask is None else mask[:, None, None, :]
    peak = jnp.max(s, axis=-1, keepdims=True, where=real, initial=-jnp.inf)
    peak = jax.lax.stop_gradient(jnp.where(jnp.isfinite(peak), peak, 0))  # no real token: 0
    e = jnp.where(real, jnp.exp(jnp.where(real, s - peak, 0)), 0)
    total = e.sum(-1, keepdims=True)  # [B, H, M, 1]
    some = total > 0
    safe = jnp.where(some, total, 1)
    z = jnp.einsum("bhmn,bnhd->bmhd", e / safe, v, preferred_element_type=s.dtype)
    lse = jnp.where(some, peak + jnp.log(safe), -jnp.inf)
    return z, lse[..., 0].swapaxes(1, 2)


def decode(
    q: Float[Array, "M H D"],
    k: Float[Array, "B N H D"],
    z: Float[Array, "B M H D"],
    mask: Mask,
    scale: float,
) -> Float[Array, "B N H D"]:
    """y in the dtype of k, zero at masked tokens."""
    (k_real,) = drop(mask, k)
    p = jax.nn.softmax(scores(q, k_real, scale), axis=2)  # over M
    y = jnp.einsum("bhmn,bmhd->bnhd", p, z, preferred_element_type=p.dtype)
    return drop(mask, y.astype(k.dtype))[0]


def encode_vjp(q, k, v, mask, scale, z, lse, dz, dlse=None):
    """dq, dk, dv from the cotangents of z and lse, which may be those of more tokens.

    These tokens' z_r and lse_r have the part w = exp(lse_r - lse) in z = w z_r + ..., so that
    their cotangents are dz_r = w dz and dlse_r = w (dz.(z_r - z) + dlse).
    """
    (z_r, lse_r), pullback = jax.vjp(lambda q, k, v: encode(q, k, v, mask, scale), q, k, v)
    w = jnp.exp(lse_r - jnp.where(jnp.isfinite(lse), lse, 0))
    dlse_r = w * (jnp.sum(dz * (z_r - z), -1) + (0 if dlse is None else dlse))
    return pullback(((w[..., None] * dz).astype(z_r.dtype), dlse_r.astype(lse_r.dtype)))


def decode_vjp(q, k, z, mask, scale, dy):
    """dq, dk, dz from the cotangent of y."""
    _, pullback = jax.vjp(lambda q, k, z: decode(q, k, z, mask, scale), q, k, z)
    return pullback(dy)
