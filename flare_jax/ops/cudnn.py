"""The FLARE operator by cuDNN's fused attention, the one behind `jax.nn.dot_product_attention`.

Decode is one call, `sdpa(k, q, z)`. Encode, `sdpa(q, k, v)`, has only B H M/128 blocks of work
however large N is, so the tokens are split into S parts that are attended to as S batch entries,
and the parts are merged with their float32 log-sum-exps:

    lse = log sum_s exp(lse_s),    z = sum_s exp(lse_s - lse) z_s.

`jax.nn` returns that log-sum-exp rounded to the input dtype (off by 2^-9 |lse| in bfloat16, a few
percent in the weights) and without a gradient, so encode calls the primitive underneath, which
keeps float32. The backward of each part gets the *merged* z and lse, which makes its dq, dk and
dv the exact parts of the whole.

Padding, of tokens for the splits or by a mask, is one more column of the head: latents hold a 1
there and padded tokens a large negative number, so that their weight is exactly zero. Head widths
are padded to a multiple of 8.

Where tokens' scores spread over hundreds, or in float16 one token takes all the weight, dk was NaN
on an H100 (experiments/README.md, conditioning): the kernels of `fused` and the XLA path are finite
there.
"""

import functools

import jax
import jax.numpy as jnp

from flare_jax.ops.fused.math import require_gpu
from flare_jax.ops.reference import drop, merge_parts

PENALTY = -3e4  # score of a padded token: exp of it is 0, and float16 can hold it
BLOCKS = 264  # blocks of work that fill a large GPU: two for each of 132 multiprocessors
TOKEN_MULTIPLE = 64  # split lengths that cuDNN accepts forward and backward


def supports(q, k, v, mask) -> None:
    """Raises NotImplementedError with the reason when cuDNN cannot take these arguments."""
    require_gpu("cudnn needs")
    if k.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"cudnn needs float16 or bfloat16, got {k.dtype}")
    if q.shape[-1] > 120:
        raise NotImplementedError(f"cudnn takes head widths up to 120, got {q.shape[-1]}")
    if q.shape[0] % 8:
        raise NotImplementedError(f"cudnn takes multiples of 8 latents, got {q.shape[0]}")
    try:
        from jax._src.cudnn import fused_attention_stablehlo as fused

        fused.check_cudnn_version()
        fused._dot_product_attention_bwd_rule  # noqa: B018  (private: may move)
    except (ImportError, AttributeError, RuntimeError) as error:
        raise NotImplementedError(f"no usable cuDNN attention in this jax: {error}") from error


def folded(f):
    """f, all whose arguments and results are [B, ...]; under `vmap` with one batch of all.

    jax's rule takes the size of the mapped axis from the first argument: it fails where only others
    are mapped.
    """
    call = jax.custom_batching.custom_vmap(f)

    @call.def_vmap
    def fold(size, mapped, *args):
        whole = (
            x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
            for x, is_mapped in zip(args, mapped, strict=True)
        )
        out = call(*(x.reshape(-1, *x.shape[2:]) for x in whole))
        out = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return call


def sdpa(q, k, v, scale):
    """softmax(scale q k^T) v and its float32 log-sum-exp, all `[B, T, H, D]` and `[B, T, H]`."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    @folded
    def call(q, k, v):
        out, lse = fused.dot_product_attention(q, k, v, scale=scale, return_residual=True)
        return out, lse.swapaxes(1, 2)  # cuDNN keeps [B, H, T]

    return call(q, k, v)


def sdpa_vjp(q, k, v, scale, out, lse, dout):
    """dq, dk, dv of `sdpa` given its output and log-sum-exp, here those of all splits together."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    static = (scale, 42, 0.0, (False, False), fused.MaskType.NO_MASK, 0, None, True, False)

    @folded
    def call(q, k, v, out, lse, dout):
        none = jnp.zeros(0, q.dtype)
        residuals = (q, k, v, *[none] * 7, lse.swapaxes(1, 2), out)
        return fused._dot_product_attention_bwd_rule(*static, residuals, dout)[:3]

    return call(q, k, v, out, lse, dout)


def split_tokens(b: int, n: int, h: int, m: int) -> tuple[int, int]:
    """(S, T): S splits of T tokens, S T >= n, equal to n if a split near the aim divides it."""
    aim = max(1, min(-(-BLOCKS // (b * h * -(-m // 128))), n // 512))
    for s in range(aim, 2 * aim + 1):
        if n % (s * TOKEN_MULTIPLE) == 0:
            return s, n // s
    t = -(-n // (aim * TOKEN_MULTIPLE)) * TOKEN_MULTIPLE
    return -(-n // t), t


def prepare(q, mask, scale, b, n, *tokens, spare=False):
    """Pads head and tokens; returns q [B S, M, H, D'] and `tokens` as [B S, T, H, D'].

    The first of `tokens` is k, which gets the penalty column when anything is padded. `spare` asks
    for a column beyond D in any case.
    """
    m, h, d = q.shape
    s, t = split_tokens(b, n, h, m)
    padded = mask is not None or s * t != n
    width = -(-(d + (padded or spare)) // 8) * 8
    grow = lambda x: jnp.pad(x, ((0, 0), (0, s * t - n), (0, 0), (0, width - d)))
    tokens = list(map(grow, drop(mask, *tokens)))
    q = jnp.pad(q, ((0, 0), (0, 0), (0, width - d)))
    if padded:
        real = jnp.ones((b, n), bool) if mask is None else mask
        real = jnp.pad(real, ((0, 0), (0, s * t - n)))
        column = jnp.where(real, 0, PENALTY).astype(q.dtype)[:, :, None]
        tokens[0] = tokens[0].at[..., d].set(column)
        q = q.at[..., d].set(1 / scale)
    split = lambda x: x.reshape(b * s, t, h, width)
    return jnp.broadcast_to(q, (b * s, *q.shape)), *map(split, tokens)


def encode(q, k, v, mask, scale):
    """z [B, M, H, D] and lse [B, M, H] in float32; z = 0, lse = -inf without a real token."""
    (m, h, d), (b, n) = q.shape, k.shape[:2]
    z, lse = sdpa(*prepare(q, mask, scale, b, n, k, v), scale)
    z = z.astype(jnp.float32).reshape(b, -1, m, h, z.shape[-1])[..., :d]
    lse = lse.reshape(b, -1, m, h)
    lse = jnp.where(lse > PENALTY / 2, lse, -jnp.inf)  # a split without a real token
    return merge_parts(z.swapaxes(0, 1), lse.swapaxes(0, 1))


def decode(q, k, z, mask, scale):
    """y [B, N, H, D] in the dtype of k, zero at masked tokens."""
    d = q.shape[-1]
    k, q, z = widen(mask, q, k, z)
    sdpa = functools.partial(jax.nn.dot_product_attention, scale=scale, implementation="cudnn")
    y = folded(sdpa)(k, q, z)
    return drop(mask, y[..., :d])[0]


def widen(mask, q, k, z):
    """Decode's arguments for cuDNN: q for every sample, head widths a multiple of 8."""
    pad = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, -x.shape[-1] % 8)))
    q = jnp.broadcast_to(q, (k.shape[0], *q.shape))
    return pad(drop(mask, k)[0]), pad(q), pad(z.astype(k.dtype))


def encode_vjp(q, k, v, mask, scale, z, lse, dz, dlse=None):
    """dq, dk, dv from the cotangents of z and lse; z and lse may be those of more tokens.

    cuDNN computes dS = A (dout.v - dout.out). A spare column that holds dlse in dout, 1 in v and 0
    in out makes that A (dz.v + dlse - dz.z), which is what a cotangent of lse asks for.
    """
    (_, h, d), (b, n) = q.shape, k.shape[:2]
    q_s, k_s, v_s = prepare(q, mask, scale, b, n, k, v, spare=dlse is not None)
    s, width = q_s.shape[0] // b, q_s.shape[-1]
    grow = lambda x: jnp.pad(x.astype(q.dtype), ((0, 0),) * 3 + ((0, width - d),))
    out, dout = grow(z), grow(dz)
    if dlse is not None:
        dout, v_s = dout.at[..., d].set(dlse.astype(q.dtype)), v_s.at[..., d].set(1)
    lse = jnp.where(jnp.isfinite(lse), lse, 0)
    out, lse, dout = (jnp.repeat(x, s, axis=0) for x in (out, lse, dout))
    dq, dk, dv = sdpa_vjp(q_s, k_s, v_s, scale, out, lse, dout)
    join = lambda x: drop(mask, x.reshape(b, -1, h, width)[:, :n, :, :d])[0]
    return dq.astype(jnp.float32).sum(0)[..., :d], join(dk), join(dv)


def decode_vjp(q, k, z, mask, scale, dy):
    """dq, dk, dz from the cotangent of y.

    cuDNN's backward has a block of work for every 128 keys, here latents: the tokens are split as
    in encode, and the parts of dq and dz added.
    """
    (m, h, d), (b, n) = q.shape, k.shape[:2]
    s, t = split_tokens(b, n, h, m)
    split = lambda x: jnp.pad(x, ((0, 0), (0, s * t - n), (0, 0), (0, 0))).reshape(b * s, t, h, d)
    k, dy = (split(x) for x in drop(mask, k, dy))  # dy is zero at padding, and so is all else
    k, q, z = widen(None, q, k, jnp.repeat(z, s, axis=0))
    y, lse = sdpa(k, q, z, scale)
    dy = jnp.pad(dy, ((0, 0), (0, 0), (0, 0), (0, y.shape[-1] - d)))
    dk, dq, dz = sdpa_vjp(k, q, z, scale, y, lse, dy)
    dk = drop(mask, dk.reshape(b, s * t, h, -1)[:, :n, :, :d])[0]
    dq, dz = (x.astype(jnp.float32)[..., :d] for x in (dq, dz))
    return dq.sum(0), dk, dz.reshape(b, s, m, h, d).sum(1)
