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

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from flare_jax.ops.fused.activations import ACTIVATIONS, Activation, hide, once
from flare_jax.ops.fused.math import f32_precision, interpreted, split_bf16
from flare_jax.ops.fused.mlp_plans import Plan, Tile, plan_for

WIDTHS = (32, 64, 128)
DTYPES = ("bfloat16", "float16", "float32")
ONES = 16  # rows of the ones matrix that sums columns: the tensor core's smallest side

Layers = Sequence[tuple[jax.Array, jax.Array]]  # (kernel [C, C] as [in, out], bias [C]) a layer


def dot_precision(dtype) -> str:
    """The kind of dot for inputs of `dtype`: native, bf16x3 or ieee."""
    if dtype != jnp.float32:
        return "native"
    return "ieee" if f32_precision() == "exact" else "bf16x3"


# ----------------------------------------------------------------- arithmetic ---


@dataclasses.dataclass(frozen=True)
class Dots:
    """Matrix products of operands prepared once by `parts`."""

    dtype: jnp.dtype
    precision: str
    interpret: bool

    def parts(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """The operand as the tensor core takes it: itself, or its high and low halves."""
        if self.precision != "bf16x3":
            return (x.astype(self.dtype),)
        return split_bf16(x.astype(jnp.float32))

    def dot(self, a, b, ca: int, cb: int, start: jax.Array) -> jax.Array:
        """start + a b, contracting a's axis ca with b's axis cb."""
        ieee = self.precision == "ieee"
        product = functools.partial(
            lax.dot_general,
            dimension_numbers=(((ca,), (cb,)), ((), ())),
            preferred_element_type=jnp.float32,
            precision=lax.Precision.HIGHEST if ieee else lax.Precision.DEFAULT,
        )
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if i + j < 2]
        for n, (i, j) in enumerate(sorted(pairs, key=lambda ij: -sum(ij))):  # small terms first
            start = (start if self.interpret or not n else hide(start)) + product(a[i], b[j])
        return start

    def transposed(self, x: tuple) -> tuple:
        """x, about to be a product's transposed operand."""
        return x if self.interpret else tuple(map(once, x))

    def column_sums(self, x, start: jax.Array, transposed: bool = False) -> jax.Array:
        """start [ONES, C] + the sum of x's rows in each row: no shuffles, unlike a reduction.

        transposed: of start, and x comes from `transposed`. Beside dW^T, whose left operand x is
        then too, this saves a copy of x in shared memory.
        """
        ones = jnp.ones((x[0].shape[0], ONES), x[0].dtype)
        for part in reversed(x):
            a, b = (part, ones) if transposed else (ones, part)
            start = self.dot((a,), (b,), 0, 0, start)
        return start


def _rows(vector: jax.Array, tile: int) -> jax.Array:
    return lax.broadcast_in_dim(vector, (tile, vector.shape[0]), (1,))


def _columns(vector: jax.Array, width: int) -> jax.Array:
    return lax.broadcast_in_dim(vector, (vector.shape[0], width), (0,))


# -------------------------------------------------------------------- kernels ---


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is static about an MLP: shared by its kernels and its derivative."""

    layers: int
    act: str
    precision: str
    skip: bool  # add x itself to the output
    normed: bool
    linear_last: bool  # the last layer has no activation
    projected: bool  # a dense layer of another array is added to x first
    pass_on: bool  # x is an output too
    epsilon: float
    interpret: bool
    plan: Plan

    def dots(self, dtype) -> Dots:
        return Dots(dtype, self.precision, self.interpret)

    def activation(self, dtype) -> Activation:
        # the tanh instruction's 2^-11 is below bfloat16's rounding, not below float16's
        return Activation(self.act, dtype != jnp.bfloat16, self.interpret)


class _Tokens:
    """The token tiles of one program: program p of P takes tiles p, p + P, ..."""

    def __init__(self, n: int, width: int, tile: Tile):
        self.n, self.width, self.tile = n, width, tile.tile
        self.tiles = pl.cdiv(n, tile.tile)
        self.programs = min(tile.programs, self.tiles)
        self.single = self.tiles == self.programs  # one tile a program

    def loop(self, body, carry):
        """carry = body(rows, mask, carry) for each tile of this program."""
        first = pl.program_id(0)

        def step(i, carry):
            start = (first + i * self.programs) * self.tile
            mask = None
            if self.n % self.tile:
                mask = _columns(start + jnp.arange(self.tile) < self.n, self.width)
            return body(pl.ds(start, self.tile), mask, carry)

        if self.single:
            return step(0, carry)
        count = lax.div(self.tiles - first + self.programs - 1, self.programs)
        return lax.fori_loop(0, count, step, carry)


def _load(ref, rows, mask):
    return plgpu.load(ref.at[rows, :], mask=mask, other=None if mask is None else 0)


def _store(ref, rows, mask, value):
    plgpu.store(ref.at[rows, :], value.astype(ref.dtype), mask=mask)


class _Layer:
    """x W + b. Resident: W stays in shared memory; else every tile reads it again (from L2).

    index: the layer's. both: W is used transposed too (without `once`, as a second copy).
    """

    def __init__(self, dots: Dots, refs, tile: Tile, index: int = 0, both: bool = False):
        self.dots, (self.weight_refs, self.bias_ref) = dots, refs
        self.weight = self._read() if index < tile.resident else None
        if both and self.weight is not None:
            self.weight = dots.transposed(self.weight)
        self.bias = self._read_bias() if tile.bias else None

    def _read(self):
        if len(self.weight_refs) == 1:
            return self.dots.parts(self.weight_refs[0][...])
        return tuple(ref[...] for ref in self.weight_refs)

    def _read_bias(self):
        return self.bias_ref[...].astype(jnp.float32)

    def __call__(self, x: tuple, start: jax.Array | None = None) -> jax.Array:
        """start + x W + b, for x from `parts`."""
        bias = self._read_bias() if self.bias is None else self.bias
        bias = _rows(bias, x[0].shape[0])
        start = bias if start is None else start + bias
        return self.dots.dot(x, self._read() if self.weight is None else self.weight, 1, 0, start)

    def transposed(self, g: tuple, start: jax.Array) -> jax.Array:
        """start + g W^T, for g from `parts`."""
        return self.dots.dot(g, self._read() if self.weight is None else self.weight, 1, 1, start)


def _normalise(x, epsilon: float):
    """(x - mean) / std of each row, and 1 / std."""
    width = x.shape[1]
    x = x - _columns(jnp.sum(x, axis=1) / width, width)
    rstd = lax.rsqrt(jnp.sum(x * x, axis=1) / width + epsilon)
    return x * _columns(rstd, width), rstd


def _forward_kernel(
    x_ref, norm_refs, sets, projection, out_refs, sum_ref,
    *, spec: Spec, tile: Tile, tokens: _Tokens,
):  # fmt: skip
    """`sets`: the layers of each MLP on the same x; out_refs: one output each.

    projection: (y_ref, its layer) or (); sum_ref: x + y Wp + bp, where the backward will want it.
    """
    dtype = x_ref.dtype
    dots, act = spec.dots(dtype), spec.activation(dtype)
    project = _Layer(dots, projection[1], tile) if projection else None
    sets = [[_Layer(dots, refs, tile, i) for i, refs in enumerate(layers)] for layers in sets]
    norm = [r[...].astype(jnp.float32) for r in norm_refs]
    rows_of = functools.partial(_rows, tile=tokens.tile)

    def body(rows, mask, carry):
        for layers, out_ref in zip(sets, out_refs, strict=True):
            raw = _load(x_ref, rows, mask).astype(jnp.float32)
            if projection:
                y = _load(projection[0], rows, mask)
                raw = project(dots.parts(y), raw)
                if sum_ref is not None:
                    _store(sum_ref, rows, mask, raw)
            x = raw
            if norm:
                x = _normalise(raw, spec.epsilon)[0] * rows_of(norm[0]) + rows_of(norm[1])
            active = layers[:-1] if spec.linear_last else layers
            for layer in active:
                x = act.residual(layer(dots.parts(x)), x)
            if spec.linear_last:
                x = layers[-1](dots.parts(x), x)
            if spec.skip:
                x = x + raw
            _store(out_ref, rows, mask, x)
        return carry

    tokens.loop(body, jnp.int32(0))


def _backward_kernel(
    x_ref, g_ref, skip_ref, add_ref, norm_refs, layers, projection, dx_ref, dw_ref, dy_ref,
    *, spec: Spec, first: int, bottom: bool, tile: Tile, tokens: _Tokens,
):  # fmt: skip
    """Layers first .. len(layers) - 1, of which the last may be the MLP's last; may be none.

    g_ref: the gradient at the last layer's output. dx_ref: at the first one's input. dw_ref: the
    partial sums of `_unpack`. Only at the bottom: skip_ref, the gradient of the MLP's output,
    if the skip needs it; add_ref, a gradient of x to add; norm_refs; projection, (y_ref, its
    layer) or (), with dy_ref, the gradient of y. 16-bit recomputed activations are rounded between
    layers, as the products see them: in float32 they would not fit into registers beside dW.
    """
    dtype = x_ref.dtype
    dots, act = spec.dots(dtype), spec.activation(dtype)
    project = _Layer(dots, projection[1], tile) if projection else None
    layers = [_Layer(dots, refs, tile, i, i >= first) for i, refs in enumerate(layers)]
    norm = [r[...].astype(jnp.float32) for r in norm_refs]
    width, last = tokens.width, spec.layers - 1 if spec.linear_last else None
    rows_of = functools.partial(_rows, tile=tokens.tile)
    own = range(first, len(layers))

    def write(block, dw, db):
        dw_ref[pl.ds(block * (width + ONES), width), :] = dw.T
        dw_ref[pl.ds(block * (width + ONES) + width, ONES), :] = db.T

    def body(rows, mask, carry):
        sums, norm_sums = list(carry[0]), carry[1]

        def add(block, dh, inputs):
            """Adds a layer's part of dW and db. A program's only tile holds none in registers."""
            dw, db = sums[block]
            # dW^T, not dW: what feeds the transposed operand may be computed twice, and dh is short
            dht = dots.transposed(dh)
            dw = dots.dot(dht, inputs, 0, 0, dw)
            sums[block] = dw, dots.column_sums(dht, db, transposed=True)
            if tokens.single:
                write(block, *sums[block])

        x = _load(x_ref, rows, mask).astype(jnp.float32)
        if norm:
            x = _normalise(x, spec.epsilon)[0] * rows_of(norm[0]) + rows_of(norm[1])
        inputs, gates = {}, {}
        for i, layer in enumerate(layers):
            parts = dots.parts(x)
            if len(parts) == 1:
                x = parts[0]
            if i < first:
                x = act.residual(layer(parts), x)
                continue
            inputs[i] = parts
            if i == last:
                break
            h = layer(parts)
            s = act.sigmoid(h)
            gates[i] = act.gate(s, h, dtype)
            if i + 1 < len(layers):
                x = act.residual_from(s, h, x)

        g = _load(g_ref, rows, mask).astype(jnp.float32)
        for i in reversed(own):
            dh = dots.parts(act.times_gate(g, gates[i]) if i in gates else g)
            add(i - first, dh, inputs[i])
            g = layers[i].transposed(dh, g)

        if bottom:
            if norm:  # the partial sums of its scale and bias too
                x = _load(x_ref, rows, mask).astype(jnp.float32)
                x, rstd = _normalise(x, spec.epsilon)
                norm_sums = tuple(
                    dots.column_sums(dots.parts(part), total)
                    for part, total in zip((g * x, g), norm_sums, strict=True)
                )
                g = g * rows_of(norm[0])
                inner = _columns(jnp.sum(g * x, axis=1) / width, width)
                g = g - _columns(jnp.sum(g, axis=1) / width, width) - x * inner
                g = g * _columns(rstd, width)
            for ref in (skip_ref, add_ref):
                if ref is not None:
                    g = g + _load(ref, rows, mask).astype(jnp.float32)
            if projection:
                dh = dots.parts(g)
                add(len(own), dh, dots.parts(_load(projection[0], rows, mask)))
                _store(dy_ref, rows, mask, project.transposed(dh, jnp.zeros_like(g)))
        _store(dx_ref, rows, mask, g)
        return tuple(sums), norm_sums

    zero = jnp.zeros((width, width), jnp.float32), jnp.zeros((width, ONES), jnp.float32)
    norm_zero = (zero[1].T, zero[1].T) if norm and bottom else ()
    blocks = len(own) + bool(projection)
    sums, norm_sums = tokens.loop(body, ((zero,) * blocks, norm_zero))
    for block, (dw, db) in enumerate(() if tokens.single else sums):
        write(block, dw, db)
    for i, value in enumerate(norm_sums):
        dw_ref[pl.ds(blocks * (width + ONES) + i * ONES, ONES), :] = value


# ------------------------------------------------------------------- wrappers ---


def _call(kernel, tile: Tile, tokens: _Tokens, spec: Spec, name: str, out_shape, out_specs):
    return pl.pallas_call(
        kernel,
        grid=(tokens.programs,),
        out_shape=out_shape,
        out_specs=out_specs,
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=spec.interpret,
        name=name,
    )


def _operands(spec: Spec, tile: Tile, tokens: _Tokens, dtype, layers: Layers):
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
    tile = spec.plan.forward
    fit = spec.precision == "native" and x.shape[1] <= 64  # all weights on the chip
    if len(sets) > 1 and (spec.plan.apart or (tile.resident and not fit)):
        return [_forward(spec, False, x, norm, (one,), ())[0][0] for one in sets], None
    tokens = _Tokens(*x.shape, tile)
    kernel = functools.partial(_forward_kernel, spec=spec, tile=tile, tokens=tokens)
    operands = lambda layers: _operands(spec, tile, tokens, x.dtype, layers)
    array, block = jax.ShapeDtypeStruct(x.shape, x.dtype), _whole(x.shape)
    count, keep = len(sets), keep and spec.projected
    shapes = [array] * count, array if keep else None
    blocks = [block] * count, block if keep else None
    call = _call(kernel, tile, tokens, spec, "flare_mlp", shapes, blocks)
    projection = (projection[0], *operands(projection[1:])) if projection else ()
    return call(x, norm, tuple(map(operands, sets)), projection)


def segments(layers: int, plan: Plan, normed: bool) -> list[tuple[int, int, Tile]]:
    """[(first, end, Tile), ...] of the backward kernels, last segment first."""
    cuts, end = [], layers
    while end:
        length, tile = plan.backward[min(len(cuts), len(plan.backward) - 1)]
        first = max(0, end - length)
        cuts.append((first, end, tile))
        end = first
    return [*cuts, (0, 0, plan.norm)] if normed and plan.norm else cuts


def _segment(
    spec: Spec, tile: Tile, first: int, end: int, bottom: bool, x, g, skip, add, norm, layers, proj
):
    """dx, dy, and the sums of `_unpack` of layers first .. end - 1, and of `proj` and the norm."""
    tokens = _Tokens(*x.shape, tile)
    width, count = x.shape[1], end - first + bool(proj)
    kernel = functools.partial(
        _backward_kernel, spec=spec, first=first, bottom=bottom, tile=tile, tokens=tokens
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
    out, total = _forward(spec, True, x, norm, sets, projection)
    outs = *out, *([x] if spec.pass_on else [])
    return outs, (x if total is None else total, norm, sets, projection)


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
        _needs_gpu()


def _needs_gpu() -> None:
    if jax.default_backend() != "gpu":
        raise NotImplementedError(f"platform {jax.default_backend()!r}: the kernels need a GPU")
    capability = getattr(jax.devices()[0], "compute_capability", "")
    major = capability.split(".")[0]
    if (
        not major.isdigit()
        or int(major) < 8
        or "nvidia" not in jax.devices()[0].device_kind.lower()
    ):
        raise NotImplementedError(
            f"{jax.devices()[0].device_kind}: the kernels need an NVIDIA GPU of Ampere or newer"
        )


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
        pass_on: return x too. Where x is used again, use this one: the gradient of that use is then
            added inside the kernel.
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
        plan=plan or plan_for(flat.shape[0], flat.shape[1], precision),
    )
    sets = tuple(tuple((w, b) for w, b in layers) for layers in sets)
    norm = () if norm is None else tuple(norm)
    if projection is not None:
        y, kernel, bias = projection
        projection = y.reshape(flat.shape), (kernel, bias)
    outs = _mlps(spec, flat, norm, sets, projection or ())
    return tuple(out.reshape(x.shape) for out in outs)
