"""FLARE attention: N tokens mixed through M latents, as a pure function.

    z = softmax(scale q k^T, over tokens)  v     encode: gather N tokens into M latents
    y = softmax(scale k q^T, over latents) z     decode: scatter them back

for every head, with q [M, H, D] shared by the batch and k, v [B, N, H, D]. The N x N mixing matrix
has rank at most M and is never formed: time O(N M C), memory O((N + M) C), C = H D, forward and
backward (arXiv 2508.12594, section 3). `scale` is 1 in FLARE, not 1/sqrt(D).

**Precision.** With u the unit round-off of the products and sums, y is off by about u max|S| times
the spread of v, S = scale q k^T (max of scale sum_d |q_d k_d| where these cancel): scores of 400
cost two or three digits in any implementation, and none overflows. Where a softmax is saturated
(one token far above all others), dq and dk are differences of nearly equal terms: their error is
round-off relative to dy, not relative to them. Measured by `experiments/conditioning.py`.

This file checks arguments, picks an implementation and ties its forward to its backward. An
implementation is a module with `supports, encode, decode, encode_vjp, decode_vjp` (and, where one
pass can share work between the two steps, `attention_fwd, attention_bwd`).
"""

import functools
from collections.abc import Sequence
from types import ModuleType

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from flare_jax.ops import cudnn, reference, xla
from flare_jax.ops.fused import attention as fused

IMPLEMENTATIONS: dict[str, ModuleType] = {
    "fused": fused,
    "cudnn": cudnn,
    "xla": xla,
    "reference": reference,
}
DEFAULT = ("fused", "cudnn", "xla")  # the first that supports the arguments; xla supports all
LATENTS = "flare_latents"  # name of z and lse, for policies of `jax.checkpoint`


def flare_attention(
    q: Float[Array, "M H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    *,
    mask: Bool[Array, "B N"] | None = None,
    scale: float = 1.0,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "B N H D"]:
    """Mixes tokens through latents: y = sdpa(k, q, sdpa(q, k, v)).

    Args:
        q: latent queries, shared by all samples.
        k: keys, one per token.
        v: values, one per token; k, q and v have one dtype.
        mask: True where a token is real. Other tokens take no part, whatever they hold: their
            outputs and gradients are zero. A sample without a real token gives zeros.
        scale: factor on the scores, a Python number. For a learned scale multiply q by it.
        implementation: None takes the best that applies and always works; a name runs that one or
            raises; a sequence of names is tried in order. Names: see `IMPLEMENTATIONS`.

    Returns:
        y, in the dtype of v.

    Raises:
        TypeError, ValueError: an argument has the wrong type, rank, shape or dtype.
        NotImplementedError: the implementation asked for cannot take these arguments.
    """
    check(q, k, mask, scale, v=v)
    return _attention(pick(implementation, q, k, v, mask), float(scale), q, k, v, mask)


def flare_encode(
    q: Float[Array, "M H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    *,
    mask: Bool[Array, "B N"] | None = None,
    scale: float = 1.0,
    implementation: str | Sequence[str] | None = None,
) -> tuple[Float[Array, "B M H D"], Float[Array, "B M H"]]:
    """Gathers tokens into latents: z = softmax(scale q k^T, over tokens) v.

    Arguments and errors as in `flare_attention`.

    Returns:
        z, in the dtype of v, and the log-sum-exp of the scores over real tokens in at least
        float32. Both are differentiable, so parts of the tokens can be encoded apart and merged:
        lse = logaddexp(lse_1, lse_2), z = exp(lse_1 - lse) z_1 + exp(lse_2 - lse) z_2.
        Without a real token z is 0 and lse is -inf: where that may be so of all parts, merge
        maximum(lse_r, -1e30).
    """
    check(q, k, mask, scale, v=v)
    z, lse = _encode(pick(implementation, q, k, v, mask), float(scale), q, k, v, mask)
    return z.astype(v.dtype), lse


def flare_decode(
    q: Float[Array, "M H D"],
    k: Float[Array, "B N H D"],
    z: Float[Array, "B M H D"],
    *,
    mask: Bool[Array, "B N"] | None = None,
    scale: float = 1.0,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "B N H D"]:
    """Scatters latents to tokens: y = softmax(scale k q^T, over latents) z, zero where masked.

    Arguments and errors as in `flare_attention`; y has the dtype of k.
    """
    check(q, k, mask, scale, z=z)
    return _decode(pick(implementation, q, k, k, mask), float(scale), q, k, z, mask)


def check(q, k, mask, scale, **other) -> None:
    """Raises a TypeError or ValueError that names the first argument that does not fit."""
    arrays = {"q": q, "k": k, **other}
    for name, x in arrays.items():
        is_array = hasattr(x, "shape") and jnp.issubdtype(x.dtype, jnp.floating)
        if not is_array or x.dtype.itemsize < 2:
            raise TypeError(
                f"{name} must be an array of floats of 16 bits or more, got {describe(x)}"
            )
        want = "[M, H, D]" if name == "q" else f"[B, {'M' if name == 'z' else 'N'}, H, D]"
        if x.ndim != want.count(",") + 1 or 0 in x.shape:
            raise ValueError(f"{name} must be {want} and not empty, got shape {tuple(x.shape)}")
    for name, x in arrays.items():
        if x.dtype != k.dtype and name != "z":
            raise TypeError(f"{name} must have the dtype of k, {k.dtype}, got {x.dtype}")
    (m, h, d), (b, n) = q.shape, k.shape[:2]
    if k.shape[2:] != (h, d):
        raise ValueError(
            f"q and k must have the same heads and head width, got q {tuple(q.shape)} and "
            f"k {tuple(k.shape)}"
        )
    for name, x in other.items():
        want = b, m if name == "z" else n, h, d
        if x.shape != want:
            raise ValueError(
                f"{name} must be {want} to match q {tuple(q.shape)} and k {tuple(k.shape)}, "
                f"got {tuple(x.shape)}"
            )
    shape = getattr(mask, "shape", None)
    if mask is not None and (shape != (b, n) or mask.dtype != bool):
        raise ValueError(f"mask must be a bool array of shape {(b, n)}, got {describe(mask)}")
    largest = float(jnp.finfo(jnp.float32).max)
    if isinstance(scale, (bool, jax.core.Tracer)) or not (
        hasattr(scale, "__float__") and jnp.ndim(scale) == 0 and 0 < float(scale) < largest
    ):
        raise ValueError(f"scale must be a positive Python number, got {scale!r}")


def describe(x) -> str:
    return f"{x.dtype} {tuple(x.shape)}" if hasattr(x, "shape") else repr(x)


def pick(implementation, q, k, v, mask) -> ModuleType:
    """The implementation's module; raises with the reasons when none asked for applies."""
    names = DEFAULT if implementation is None else implementation
    names = tuple(names) if isinstance(names, (list, tuple)) else (names,)
    for name in names:
        if name not in IMPLEMENTATIONS:
            raise ValueError(f"implementation must be of {list(IMPLEMENTATIONS)}, got {name!r}")
    reasons = []
    for name in names:
        try:
            IMPLEMENTATIONS[name].supports(q, k, v, mask)
            return IMPLEMENTATIONS[name]
        except NotImplementedError as reason:
            reasons.append(str(reason))
    raise NotImplementedError("; ".join(reasons) or "implementation names no implementation")


# custom_vjp keeps O(B (N + M) C) residuals where autodiff of two softmaxes keeps [B, H, M, N].


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _encode(ops, scale, q, k, v, mask):
    return ops.encode(q, k, v, mask, scale)


def _encode_fwd(ops, scale, q, k, v, mask):
    z, lse = ops.encode(q, k, v, mask, scale)
    return (z, lse), (q, k, v, mask, z, lse)


def _encode_bwd(ops, scale, residuals, cotangents):
    q, k, v, mask, z, lse = residuals
    return _as(ops.encode_vjp(*residuals[:4], scale, z, lse, *cotangents), q, k, v)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _decode(ops, scale, q, k, z, mask):
    return ops.decode(q, k, z, mask, scale)


def _decode_fwd(ops, scale, q, k, z, mask):
    return ops.decode(q, k, z, mask, scale), (q, k, z, mask)


def _decode_bwd(ops, scale, residuals, dy):
    return _as(ops.decode_vjp(*residuals, scale, dy), *residuals[:3])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(ops, scale, q, k, v, mask):
    return _attention_fwd(ops, scale, q, k, v, mask)[0]


def keep(z, lse):
    """z and lse, named: small as they are, `jax.checkpoint` may keep them and save an encode."""
    return checkpoint_name(z, LATENTS), checkpoint_name(lse, LATENTS)


def _attention_fwd(ops, scale, q, k, v, mask):
    if hasattr(ops, "attention_fwd"):
        return ops.attention_fwd(q, k, v, mask, scale, keep)
    z, lse = keep(*ops.encode(q, k, v, mask, scale))
    return ops.decode(q, k, z, mask, scale), (q, k, v, mask, z, lse)


def _attention_bwd(ops, scale, residuals, dy):
    q, k, v, mask, z, lse = residuals[:6]
    if hasattr(ops, "attention_bwd"):
        return _as(ops.attention_bwd(scale, residuals, dy), q, k, v)
    dq_decode, dk_decode, dz = ops.decode_vjp(q, k, z, mask, scale, dy)
    dq, dk, dv = ops.encode_vjp(q, k, v, mask, scale, z, lse, dz)
    return _as((dq + dq_decode, dk + dk_decode, dv), q, k, v)


def _as(gradients, *primals):
    """Gradients in the dtypes of their primals, and none for the mask."""
    return *(g.astype(x.dtype) for g, x in zip(gradients, primals, strict=True)), None


_encode.defvjp(_encode_fwd, _encode_bwd)
_decode.defvjp(_decode_fwd, _decode_bwd)
_attention.defvjp(_attention_fwd, _attention_bwd)
