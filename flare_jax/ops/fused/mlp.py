"""FLARE's residual MLP as GPU kernels, forward and backward (Pallas, Triton backend).

    x  = x + y Wp + bp                            with a projection (y, Wp, bp)
    x0 = norm(x)  or  x
    x[i+1] = x[i] + act(x[i] W[i] + b[i])         every layer but the last
    out    = x[L-1] + x[L-1] W[L-1] + b[L-1]      (+ x, with skip), or like the other layers

All layers are C x C. A program keeps a tile of tokens on the chip through all layers, so
the forward reads x and writes out: two passes over memory where XLA makes 5 L.

The backward needs nothing of the forward but x (and y). It runs in segments of
consecutive layers, last segment first. The kernel of a segment reads x and the gradient g
at the segment's end, recomputes x[0] .. x[end], walks back through its own layers and
writes the gradient at its start. A segment is as long as the weight gradients of its
layers fit into registers. Weight gradients are partial sums, one a program, all in one
array that a single kernel adds up: no atomics, the same bits every time.

float32 inputs use three bfloat16 products a dot ("bf16x3", about 2^-16) unless the matmul
precision in force is "highest" or "float32", which means IEEE float32 ("ieee").
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from flare_jax.ops.fused.activations import ACTIVATIONS
from flare_jax.ops.fused.math import f32_precision, interpreted, pallas_call, require_gpu
from flare_jax.ops.fused.mlp_kernels import ONES, Spec, Tokens, backward_kernel, forward_kernel
from flare_jax.ops.fused.mlp_plans import Depth, Plan, Tile, fitted, plan_for, segments, shares

WIDTHS = (32, 64, 128)
DTYPES = ("bfloat16", "float16", "float32")

Layers = Sequence[tuple[jax.Array, jax.Array]]  # (kernel [C, C] as [in, out], bias [C]) a layer


def dot_precision(dtype) -> str:
    """The kind of dot for inputs of `dtype`: native, bf16x3 or ieee."""
    if dtype != jnp.float32:
        return "native"
    return "ieee" if f32_precision() == "exact" else "bf16x3"


# ------------------------------------------------------------------- wrappers ---


def _call(kernel, tile: Tile, tokens: Tokens, spec: Spec, name: str, out_shape, out_specs):
    return pallas_call(
        kernel,
        grid=(tokens.programs,),
        out_shape=out_shape,
        out_specs=out_specs,
        warps=tile.warps,
        stages=tile.stages,
        interpret=spec.interpret,
        name=name,
    )


def _operands(spec: Spec, tile: Tile, tokens: Tokens, dtype, layers: Layers):
    """The kernel's weights: as they are if it reads them once, else in the form the dots take."""
    if tokens.single:
        return tuple(((w,), b) for w, b in layers)
    dots = spec.dots(dtype)
    form = lambda i, w: (w,) if i < tile.resident else dots.parts(w)
    return tuple((form(i, w), b) for i, (w, b) in enumerate(layers))


def _whole(shape):
    return pl.BlockSpec(shape, lambda p: (0,) * len(shape))


# Jitted, so that equal MLPs of a model are traced and lowered once.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(spec: Spec, keep: bool, x, norm, sets, projection):
    """One output [N, C] for each MLP of `sets` on the same x [N, C]; with `keep`, also x projected.

    projection: (y [N, C], its layer) or ().
    """
    plan = spec.plan
    tile = plan.forward if len(sets) == 1 else plan.together or plan.forward
    if len(sets) > 1 and (plan.apart or not shares(tile, x.shape[1], spec.precision)):
        return [_forward(spec, False, x, norm, (one,), ())[0][0] for one in sets], None
    tokens = Tokens(*x.shape, tile)
    kernel = functools.partial(forward_kernel, spec=spec, tile=tile, tokens=tokens)
    operands = lambda layers: _operands(spec, tile, tokens, x.dtype, layers)
    array, block = jax.ShapeDtypeStruct(x.shape, x.dtype), _whole(x.shape)
    count, keep = len(sets), keep and spec.projected
    shapes = [array] * count, array if keep else None
    blocks = [block] * count, block if keep else None
    call = _call(kernel, tile, tokens, spec, "flare_mlp", shapes, blocks)
    projection = (projection[0], *operands(projection[1:])) if projection else ()
    return call(x, norm, tuple(map(operands, sets)), projection)


def _segment(
    spec: Spec, tile: Tile, first: int, end: int, bottom: bool, x, g, skip, add, norm, layers, proj
):
    """dx, dy, and the sums of `_unpack` of layers first .. end - 1, and of `proj` and the norm."""
    tokens = Tokens(*x.shape, tile)
    width, count = x.shape[1], end - first + bool(proj)
    kernel = functools.partial(
        backward_kernel, spec=spec, first=first, bottom=bottom, tile=tile, tokens=tokens
    )
    rows = count * (width + ONES) + (2 * ONES if spec.normed and bottom else 0)
    sums = jax.ShapeDtypeStruct((tokens.programs, rows, width), jnp.float32)
    array, block = jax.ShapeDtypeStruct(x.shape, x.dtype), _whole(x.shape)
    call = _call(
        kernel, tile, tokens, spec, f"flare_mlp_bwd_{first}_{end}",
        (array, sums, array if proj else None),
        (block, pl.BlockSpec((None, rows, width), lambda p: (p, 0, 0)), block if proj else None),
    )  # fmt: skip
    operands = lambda layers: _operands(spec, tile, tokens, x.dtype, layers)
    proj = (proj[0], *operands(proj[1:])) if proj else ()
    dx, sums, dy = call(x, g, skip, add, norm, operands(layers[:end]), proj)
    return dx, dy, jnp.sum(sums, axis=0)


def _unpack(sums: jax.Array, count: int) -> tuple[list, tuple]:
    """[(dW, db), ...] of `count` layers and what is left, of sums [rows, C].

    Each layer has C rows dW above ONES equal rows db; the norm's scale and bias have ONES equal
    rows each.
    """
    width = sums.shape[1]
    layers = [sums[i * (width + ONES) :][: width + 1] for i in range(count)]
    return [(w[:width], w[width]) for w in layers], tuple(sums[count * (width + ONES) :: ONES])


@functools.partial(jax.jit, static_argnums=0)
def _backward(spec: Spec, x, norm, layers, projection, dout, add=None):
    """(dx + add, dnorm, dlayers, dprojection) of one MLP; x after the projection."""
    g, dlayers = dout, []
    cuts = segments(spec.layers, spec.plan, spec.normed)
    for number, (first, end, tile) in enumerate(cuts, 1):
        bottom = number == len(cuts)
        proj = projection if bottom else ()
        g, dy, sums = _segment(
            spec, tile, first, end, bottom, x, g, dout if spec.skip and bottom else None,
            add if bottom else None, norm, layers, proj,
        )  # fmt: skip
        grads, dnorm = _unpack(sums, end - first + bool(proj))
        dlayers = grads[: end - first] + dlayers
    dprojection = (dy, grads[-1]) if projection else ()

    def cast(grad, like):
        return grad.astype(like.dtype)

    grads = dnorm, tuple(dlayers), dprojection
    return g, *jax.tree.map(cast, grads, (norm, layers, projection))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mlps(spec: Spec, x, norm, sets, projection):
    return *_forward(spec, False, x, norm, sets, projection)[0], *([x] if spec.pass_on else [])


def _mlps_fwd(spec, x, norm, sets, projection):
    out, projected = _forward(spec, True, x, norm, sets, projection)
    outs = *out, *([x] if spec.pass_on else [])
    return outs, (x if projected is None else projected, norm, sets, projection)


def _mlps_bwd(spec, saved, douts):
    x, norm, sets, projection = saved
    apart = len(sets) > 1 and spec.plan.apart  # then none waits for another's gradient of x
    dxs, dnorms, dsets = [douts[-1]] if spec.pass_on else [], [], []
    for layers, dout in zip(sets, douts[: len(sets)], strict=True):
        add = dxs.pop() if dxs and not apart else None
        dx, dnorm, dlayers, dprojection = _backward(spec, x, norm, layers, projection, dout, add)
        dxs.append(dx)
        dnorms.append(dnorm)
        dsets.append(dlayers)
    return total(dxs), jax.tree.map(lambda *d: total(d), *dnorms), tuple(dsets), dprojection


def total(arrays: Sequence[jax.Array]) -> jax.Array:
    """Their sum, rounded once."""
    first, *rest = arrays
    if not rest:
        return first
    return sum((a.astype(jnp.float32) for a in rest), first.astype(jnp.float32)).astype(first.dtype)


_mlps.defvjp(_mlps_fwd, _mlps_bwd)


# --------------------------------------------------------------------- public ---


def supports(
    x: jax.Array, layers: Layers, act: str = "gelu", *, interpret: bool | None = None
) -> None:
    """Raises NotImplementedError, with the reason, where the kernels do not apply."""
    width = x.shape[-1]
    if act not in ACTIVATIONS:
        raise NotImplementedError(f"activation {act!r}: the kernels have {ACTIVATIONS}")
    if width not in WIDTHS:
        raise NotImplementedError(f"width {width}: the kernels have {WIDTHS}")
    for kernel, bias in layers:
        if kernel.shape != (width, width) or bias.shape != (width,):
            raise NotImplementedError(
                f"layer {kernel.shape} with bias {bias.shape}: the kernels need all widths {width}"
            )
    if x.dtype.name not in DTYPES:
        raise NotImplementedError(f"dtype {x.dtype.name}: the kernels have {DTYPES}")
    if x.size == 0:
        raise NotImplementedError("no tokens")
    if not (interpreted() if interpret is None else interpret):
        require_gpu()
    _plan(x, len(layers), dot_precision(x.dtype), projected=width <= 64, linear_last=False)


def _plan(x: jax.Array, layers: int, precision: str, **options) -> Plan:
    """The plan for x [..., C], `options` of Depth; raises NotImplementedError if none fits."""
    tokens, width = x.size // x.shape[-1], x.shape[-1]
    depth = Depth(tokens, width, precision, layers, **options)
    return fitted(plan_for(tokens, width, precision), depth)


def residual_mlp(x: jax.Array, layers: Layers, **options) -> jax.Array:
    """One residual MLP of x [..., C]: see `residual_mlps`, whose `options` it takes."""
    return residual_mlps(x, (layers,), **options)[0]


def residual_mlps(
    x: jax.Array,
    sets: Sequence[Layers],
    *,
    act: str = "gelu",
    norm: tuple[jax.Array, jax.Array] | None = None,
    skip: bool = False,
    linear_last: bool = True,
    projection: tuple[jax.Array, jax.Array, jax.Array] | None = None,
    pass_on: bool = False,
    epsilon: float = 1e-5,
    plan: Plan | None = None,
    precision: str | None = None,
    interpret: bool | None = None,
) -> tuple[jax.Array, ...]:
    """Residual MLPs of equal depth on the same x [..., C]; outputs and gradient of x in x.dtype.

    Args:
        x: bfloat16, float16 or float32.
        sets: for each MLP its layers, (kernel [C, C] as [in, out], bias [C]) each.
        act: the activation, of ACTIVATIONS.
        norm: (scale, bias) of a LayerNorm in front, with `epsilon`.
        skip: add x, before the norm.
        linear_last: the last layer has no activation.
        projection: (y [..., C], kernel, bias) of a dense layer: x + y kernel + bias in place of x.
            With one MLP only.
        pass_on: return x too. Where x is used again, use this one: with many tokens the gradient of
            that use is then added inside the kernel.
        plan, precision: block sizes and kind of dot, else from the table and the dtype.
        interpret: run in interpret mode, else as `interpreted` says.
    """
    if projection is not None and len(sets) > 1:
        raise ValueError(f"projection: needs one MLP, got {len(sets)}")
    if projection is not None and x.shape[-1] > 64:  # its weights do not fit on the chip as well
        y, kernel, bias = projection
        y = jnp.dot(y, kernel.astype(y.dtype)) + jnp.expand_dims(bias, range(y.ndim - 1))
        x, projection = (x + y).astype(x.dtype), None
    precision = precision or dot_precision(x.dtype)
    flat = x.reshape(-1, x.shape[-1])
    plan = plan or _plan(
        flat,
        len(sets[0]),
        precision,
        sets=len(sets),
        normed=norm is not None,
        linear_last=linear_last,
        projected=projection is not None,
    )
    spec = Spec(
        layers=len(sets[0]),
        act=act,
        precision=precision,
        skip=skip,
        normed=norm is not None,
        linear_last=linear_last,
        projected=projection is not None,
        pass_on=pass_on,
        epsilon=epsilon,
        interpret=interpreted() if interpret is None else interpret,
        plan=plan,
    )
    sets = tuple(tuple((w, b) for w, b in layers) for layers in sets)
    norm = () if norm is None else tuple(norm)
    if projection is not None:
        y, kernel, bias = projection
        projection = y.reshape(flat.shape), (kernel, bias)
    outs = _mlps(spec, flat, norm, sets, projection or ())
    return tuple(out.reshape(x.shape) for out in outs)
