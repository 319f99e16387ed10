"""The kernels of the residual MLP, and the arithmetic they share: see `mlp.py` for the equations.

A kernel gets whole arrays and walks over tiles of tokens. The forward keeps a tile on the chip
through all layers; the backward recomputes a tile's activations and walks back through the layers
of its segment.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from flare_jax.ops.fused.activations import Activation, hide, once
from flare_jax.ops.fused.math import split_bf16
from flare_jax.ops.fused.mlp_plans import Plan, Tile

ONES = 16  # rows of the ones matrix that sums columns: the tensor core's smallest side


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


class Tokens:
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


class Vectors:
    """Biases, or a norm's scale and bias: in registers throughout, or from L1 with every tile."""

    def __init__(self, refs, tile: Tile):
        self.refs = refs
        self.kept = self._read() if tile.bias else None

    def _read(self):
        return [ref[...].astype(jnp.float32) for ref in self.refs]

    def __call__(self, rows: int) -> list[jax.Array]:
        """Each in as many rows."""
        values = self._read() if self.kept is None else self.kept
        return [_rows(value, rows) for value in values]


class Layer:
    """x W + b. Resident: W stays in shared memory; else every tile reads it again (from L2).

    index: the layer's. both: W is used transposed too (without `once`, as a second copy).
    """

    def __init__(self, dots: Dots, refs, tile: Tile, index: int = 0, both: bool = False):
        self.dots, (self.weight_refs, bias_ref) = dots, refs
        self.weight = self._read() if index < tile.resident else None
        if both and self.weight is not None:
            self.weight = dots.transposed(self.weight)
        self.bias = Vectors([bias_ref], tile)

    def _read(self):
        if len(self.weight_refs) == 1:
            return self.dots.parts(self.weight_refs[0][...])
        return tuple(ref[...] for ref in self.weight_refs)

    def __call__(self, x: tuple, start: jax.Array | None = None) -> jax.Array:
        """start + x W + b, for x from `parts`."""
        (bias,) = self.bias(x[0].shape[0])
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


def forward_kernel(
    x_ref, norm_refs, sets, projection, out_refs, sum_ref,
    *, spec: Spec, tile: Tile, tokens: Tokens,
):  # fmt: skip
    """`sets`: the layers of each MLP on the same x; out_refs: one output each.

    projection: (y_ref, its layer) or (); sum_ref: x + y Wp + bp, where the backward will want it.
    """
    dtype = x_ref.dtype
    dots, act = spec.dots(dtype), spec.activation(dtype)
    project = Layer(dots, projection[1], tile) if projection else None
    sets = [[Layer(dots, refs, tile, i) for i, refs in enumerate(layers)] for layers in sets]
    norm = Vectors(norm_refs, tile)

    def body(rows, mask, carry):
        for layers, out_ref in zip(sets, out_refs, strict=True):
            raw = _load(x_ref, rows, mask).astype(jnp.float32)
            if projection:
                y = _load(projection[0], rows, mask)
                raw = project(dots.parts(y), raw)
                if sum_ref is not None:
                    _store(sum_ref, rows, mask, raw)
            x = raw
            if norm_refs:
                scale, bias = norm(tokens.tile)
                x = _normalise(raw, spec.epsilon)[0] * scale + bias
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


def backward_kernel(
    x_ref, g_ref, skip_ref, add_ref, norm_refs, layers, projection, dx_ref, dw_ref, dy_ref,
    *, spec: Spec, first: int, bottom: bool, tile: Tile, tokens: Tokens,
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
    project = Layer(dots, projection[1], tile) if projection else None
    layers = [Layer(dots, refs, tile, i, i >= first) for i, refs in enumerate(layers)]
    norm = Vectors(norm_refs, tile)
    width, last = tokens.width, spec.layers - 1 if spec.linear_last else None
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
        if norm_refs:
            scale, bias = norm(tokens.tile)
            x = _normalise(x, spec.epsilon)[0] * scale + bias
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
            if norm_refs:  # the partial sums of its scale and bias too
                x = _load(x_ref, rows, mask).astype(jnp.float32)
                x, rstd = _normalise(x, spec.epsilon)
                norm_sums = tuple(
                    dots.column_sums(dots.parts(part), total)
                    for part, total in zip((g * x, g), norm_sums, strict=True)
                )
                g = g * norm(tokens.tile)[0]
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
    norm_zero = (zero[1].T, zero[1].T) if norm_refs and bottom else ()
    blocks = len(own) + bool(projection)
    sums, norm_sums = tokens.loop(body, ((zero,) * blocks, norm_zero))
    for block, (dw, db) in enumerate(() if tokens.single else sums):
        write(block, dw, db)
    for i, value in enumerate(norm_sums):
        dw_ref[pl.ds(blocks * (width + ONES) + i * ONES, ONES), :] = value
