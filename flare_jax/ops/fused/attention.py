"""The operator on NVIDIA GPUs: every step and every backward in one or two kernels each.

The functions match those of the other implementations. Limits are stated by `supports`; block
sizes are in tiles.py, what was tried and measured in README.md. float32 products follow jax's
`default_matmul_precision`: "highest" is IEEE float32, anything else (the default too) three
bfloat16 products, relative error 2^-16 (TF32 has 2^-11). Softmax statistics and sums are float32
throughout. Two runs give the same bits.

Where one token takes nearly all the weight of a latent, dq and dk are differences of nearly equal
numbers: their error is the storage dtype's rounding of y and dy, however small they are themselves
(experiments/README.md, conditioning: "dominating").
"""

import jax.numpy as jnp

from flare_jax.ops.fused.attention_backward import (
    dz_merged,
    dz_parts,
    gradients,
)
from flare_jax.ops.fused.attention_forward import decode as _decode
from flare_jax.ops.fused.attention_forward import encode
from flare_jax.ops.fused.math import interpreted, require_gpu

__all__ = [
    "attention_bwd",
    "attention_fwd",
    "decode",
    "decode_vjp",
    "encode",
    "encode_vjp",
    "supports",
]

DTYPES = ("bfloat16", "float16", "float32")
WIDTHS = (4, 8, 16, 32, 64)


def supports(q, k, v, mask) -> None:
    """Raises NotImplementedError with the reason if the kernels cannot take these arguments."""
    if k.dtype not in DTYPES or q.dtype not in DTYPES:
        raise NotImplementedError(f"kernels need a dtype of {DTYPES}, got q {q.dtype}, k {k.dtype}")
    if q.shape[-1] not in WIDTHS:
        raise NotImplementedError(f"kernels need a head width of {WIDTHS}, got {q.shape[-1]}")
    heads, width = q.shape[-2:]
    if heads % max(1, 16 // width):  # they fill 16 columns: less, and tensor cores err
        raise NotImplementedError(
            f"kernels need a multiple of {16 // width} heads of width {width}, got {heads}"
        )
    if not interpreted():
        require_gpu()


def decode(q, k, z, mask, scale):
    """y [B, N, H, D] in k's dtype, zero at masked tokens."""
    return _decode(q, k, z, mask, scale, False)


def encode_vjp(q, k, v, mask, scale, z, lse, dz, dlse=None):
    """dq, dk, dv; z and lse may span more tokens than k and v do."""
    d2 = jnp.sum(dz.astype(jnp.float32) * z.astype(jnp.float32), axis=-1)  # [B, M, H]
    if dlse is not None:
        d2 -= dlse
    arrays = {"q": q, "k": k, "v": v, "dz": dz, "lse_m": lse, "d2": d2}
    return gradients("encode", scale, mask, arrays)


def decode_vjp(q, k, z, mask, scale, dy):
    """dq, dk, dz."""
    y, lse_n = _decode(q, k, z, mask, scale, True)
    parts, d1 = dz_parts(q, k, mask, y, lse_n, dy, scale)
    arrays = {"q": q, "k": k, "dy": dy, "z": z, "lse_n": lse_n, "d1": d1}
    dq, dk = gradients("decode", scale, mask, arrays)
    return dq, dk, jnp.sum(parts, axis=1).reshape(z.shape)


def attention_fwd(q, k, v, mask, scale, merge=lambda *own: own):
    """y [B, N, H, D] and the residuals, O(B (N + M) C).

    `merge(z, lse)` returns z and lse of all tokens, where other devices hold more of them.
    """
    z, lse = merge(*encode(q, k, v, mask, scale))
    y, lse_n = _decode(q, k, z, mask, scale, True)
    return y, (q, k, v, mask, z, lse, y, lse_n)


def attention_bwd(scale, residuals, dy, gather=None):
    """dq, dk, dv in two passes over the tokens, one exponential a score each.

    Where other devices hold more tokens, `gather(*arrays [B, ...])` returns each of all devices,
    [B, devices, ...].
    """
    q, k, v, mask, z, lse, y, lse_n = residuals
    arrays = {"q": q, "k": k, "dy": dy, "z": z, "lse_n": lse_n, "v": v, "lse_m": lse}
    arrays |= dz_merged(q, k, mask, y, lse_n, dy, scale, z, lse, gather)
    return gradients("shared", scale, mask, arrays)
