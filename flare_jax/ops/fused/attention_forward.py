"""Kernels of encode and decode.

Layout. Rows of C = H D channels are contiguous. A program works on one group of heads, 16 columns
of such rows, for some tokens and latents. Latent arrays are loaded with the columns of one head
and zeros in the others': `dot(k_group, q_head)` is then the score of that head alone, and
`P_head @ z_head` lands in that head's columns, so the sum over the group's heads is the output.

Numbers. S' = scale log2(e) q.k, so that softmax is 2^(S' - L'), one multiply-add and one
exponential a score. Statistics and sums are float32. Programs of the same tokens are neighbours
in the grid: their rows come from memory once.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from flare_jax.ops.fused.math import (
    LOG2E,
    dot,
    exp2,
    exp2_scaled,
    f32_precision,
    log2,
    pallas_call,
    reciprocal,
    spread,
)
from flare_jax.ops.fused.tiles import Shape, pow2, splits_for, tile_for, traced_once

NEG = -1e30  # finite: -inf - -inf would be nan
F16_SHIFT = 14.0  # float16 weights are 2^14 times larger, or tokens below 2^-24 of the peak vanish


def own(x, head: int, shape: Shape):
    """x [rows, width] with zeros outside the columns of one head of the group."""
    if shape.group == 1:
        return x
    columns = lax.div(lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1), jnp.int32(shape.d))
    return jnp.where(columns == head, x, jnp.zeros((), x.dtype))


def load_rows(ref, start, size: int, live=None):
    """Rows of a [rows, width] array; rows that are not live read as zero."""
    if live is None:
        return plgpu.load(ref.at[pl.ds(start, size), :])
    return plgpu.load(
        ref.at[pl.ds(start, size), :], mask=spread(live, (size, ref.shape[1]), 0), other=0
    )


def store_rows(ref, start, x, live=None):
    mask = None if live is None else spread(live, x.shape, 0)
    plgpu.store(ref.at[pl.ds(start, x.shape[0]), :], x.astype(ref.dtype), mask=mask)


def load_latents(ref, start, size: int, m: int, dtype):
    """Rows of a [M, width] array in `dtype`, zero past M."""
    live = None if m % size == 0 else start + jnp.arange(size) < m
    return load_rows(ref, start, size, live).astype(dtype)


def load_column(ref, start, size: int, head: int, m: int):
    """Entries of one head of a [M, heads] array, zero past M."""
    rows = start + jnp.arange(size)
    x = plgpu.load(ref.at[pl.ds(start, size), pl.ds(head, 1)], mask=(rows < m)[:, None], other=0.0)
    return x.reshape(size)


def store_column(ref, start, head: int, x, m: int):
    rows = start + jnp.arange(x.shape[0])
    at = ref.at[pl.ds(start, x.shape[0]), pl.ds(head, 1)]
    plgpu.store(at, x[:, None], mask=(rows < m)[:, None])


def live_tokens(mask_ref, tile, size: int, n: int, whole: bool = False):
    """Which tokens of a tile are real; None where all are (`whole`: the tile ends before N)."""
    rows = tile * size + jnp.arange(size)
    if mask_ref is not None:
        at = mask_ref.at[pl.ds(tile * size, size)]
        return plgpu.load(at, mask=rows < n, other=0) != 0
    return None if whole or n % size == 0 else rows < n


def finish(acc, peak, total, head_columns):
    """z and the natural log-sum-exp; zero and -inf where no token is real."""
    some = total > 0
    scale = jnp.where(some, 1.0 / jnp.where(some, total, 1.0), 0.0)
    lse = (peak + jnp.log2(jnp.where(some, total, 1.0))) * (1 / LOG2E)
    return acc * head_columns(scale), jnp.where(some, lse, -jnp.inf)


def _encode_kernel(*refs, shape, tile, tiles, blocks, scale2, masked, final):
    """One (latent block, head group, split) of a sample: online softmax over its tokens."""
    q_ref, k_ref, v_ref, *refs = refs
    mask_ref, *refs = refs if masked else (None, *refs)
    index = pl.program_id(0)
    first = lax.div(index, shape.groups * blocks) * tiles
    start = lax.rem(lax.div(index, shape.groups), blocks) * tile.latents
    rows, heads = tile.latents, range(shape.group)
    q = load_latents(q_ref, start, rows, shape.m, k_ref.dtype)
    qs = [own(q, i, shape) for i in heads]
    shift = F16_SHIFT if k_ref.dtype == jnp.float16 else 0.0

    def body(t, carry, *, whole):
        live = live_tokens(mask_ref, t, tile.tokens, shape.n, whole)
        k = load_rows(k_ref, t * tile.tokens, tile.tokens, live)
        v = load_rows(v_ref, t * tile.tokens, tile.tokens, live)
        out = []
        for q, (acc, peak, total) in zip(qs, carry, strict=True):
            s = dot(q, k, (1, 1), shape.precision)  # [latents, tokens]
            if live is not None:
                s = jnp.where(spread(live, s.shape, 1), s, NEG)
            new = jnp.maximum(peak, jnp.max(s, axis=1) * scale2 - shift)
            p = exp2_scaled(s, scale2, new, 0)
            old = exp2(peak - new)
            total = total * old + jnp.sum(p, axis=1)
            acc = acc * old[:, None] + dot(p.astype(v.dtype), v, (1, 0), shape.precision)
            out.append((acc, new, total))
        return tuple(out)

    # the peak starts above the score of a masked token, whose weight is then exactly zero
    zeros = jnp.zeros((rows, shape.width), jnp.float32), jnp.zeros((rows,), jnp.float32)
    carry = ((zeros[0], jnp.full((rows,), NEG * scale2 / 2, jnp.float32), zeros[1]),) * shape.group
    last = jnp.minimum(first + tiles, pl.cdiv(shape.n, tile.tokens))
    if masked:
        carry = lax.fori_loop(first, last, functools.partial(body, whole=False), carry)
    else:  # whole tiles pay nothing for the ragged one
        whole = jnp.minimum(last, shape.n // tile.tokens)
        carry = lax.fori_loop(first, whole, functools.partial(body, whole=True), carry)
        if shape.n % tile.tokens:
            carry = lax.fori_loop(whole, last, functools.partial(body, whole=False), carry)

    z = jnp.zeros((rows, shape.width), jnp.float32)
    for i, (acc, peak, total) in zip(heads, carry, strict=True):
        if final:
            acc, lse = finish(acc, peak, total, lambda x: x[:, None])
            store_column(refs[1], start, i, lse, shape.m)
        else:
            store_column(refs[1], start, i, peak, shape.m)
            store_column(refs[2], start, i, total, shape.m)
        z += own(acc, i, shape)
    store_rows(refs[0], start, z, start + jnp.arange(rows) < shape.m)


def _merge_kernel(acc_ref, peak_ref, total_ref, z_ref, lse_ref, *, shape, splits, rows, chunk):
    """Some latents of one head group: z and lse from the partial sums of all splits."""
    index = pl.program_id(0)
    start = lax.div(index, shape.groups) * rows
    live_row = start + jnp.arange(rows) < shape.m  # [rows]

    def part(ref, first, size, columns, other):
        live = (first + jnp.arange(size) < splits)[:, None, None] & live_row[None, :, None]
        at = ref.at[pl.ds(first, size), pl.ds(start, rows), columns]
        width = ref.shape[2] if columns == slice(None) else 1
        return plgpu.load(at, mask=jnp.broadcast_to(live, (size, rows, width)), other=other)

    heads = range(shape.group)
    peaks = [
        jnp.max(part(peak_ref, 0 * start, pow2(splits), pl.ds(i, 1), 2 * NEG), axis=0)
        for i in heads
    ]  # [rows, 1]

    def body(c, carry):
        acc, totals = carry
        weight = jnp.zeros((chunk, rows, shape.width), jnp.float32)
        out = []
        for i in heads:
            peak = part(peak_ref, c * chunk, chunk, pl.ds(i, 1), 2 * NEG)
            w = exp2(peak - peaks[i][None])
            out.append(
                totals[i] + jnp.sum(w * part(total_ref, c * chunk, chunk, pl.ds(i, 1), 0.0), axis=0)
            )
            weight += own(jnp.broadcast_to(w, weight.shape), i, shape)
        acc += jnp.sum(weight * part(acc_ref, c * chunk, chunk, slice(None), 0.0), axis=0)
        return acc, tuple(out)

    zeros = jnp.zeros((rows, shape.width), jnp.float32)
    carry = zeros, (jnp.zeros((rows, 1), jnp.float32),) * shape.group
    acc, totals = over_chunks(splits, chunk, body, carry)
    z = jnp.zeros((rows, shape.width), jnp.float32)
    for i in heads:
        part_z, lse = finish(acc, peaks[i], totals[i], lambda x: x)
        z += own(part_z, i, shape)
        plgpu.store(lse_ref.at[pl.ds(start, rows), pl.ds(i, 1)], lse, mask=live_row[:, None])
    store_rows(z_ref, start, z, live_row)


def over_chunks(splits: int, chunk: int, body, carry):
    """body(c, carry) for each chunk of splits. One needs no loop, and its loads need not wait for
    what is before one.
    """
    if splits <= chunk:
        return body(jnp.int32(0), carry)
    return lax.fori_loop(0, pl.cdiv(splits, chunk), body, carry)


def _decode_kernel(*refs, shape, tile, tiles, scale2, masked):
    """`tiles` token tiles of one head group: softmax over all latents, chunk by chunk."""
    q_ref, k_ref, z_ref, *refs = refs
    mask_ref, *refs = refs if masked else (None, *refs)
    y_ref, lse_ref = refs[0], refs[1] if len(refs) == 2 else None
    first = lax.div(pl.program_id(0), shape.groups) * tiles
    chunks, rows = pl.cdiv(shape.m, tile.latents), tile.latents

    def latents(c):
        """q and z of chunk c of the latents, for each head."""
        q, z = (load_latents(x, c * rows, rows, shape.m, k_ref.dtype) for x in (q_ref, z_ref))
        return [(own(q, i, shape), own(z, i, shape)) for i in range(shape.group)]

    held = latents(0 * first) if chunks == 1 else None  # once for all tokens

    def scores(k, q, c):
        s = dot(k, q, (1, 1), shape.precision)  # [tokens, latents]
        if shape.m % rows:
            s = jnp.where(spread(c * rows + jnp.arange(rows) < shape.m, s.shape, 1), s, NEG)
        return s

    def one_head(k, head):
        if chunks == 1:
            q, z = held[head]
            s = scores(k, q, 0)
            peak = jnp.max(s, axis=1) * scale2
            p = exp2_scaled(s, scale2, peak, 0)
            total = jnp.sum(p, axis=1)
            out = dot(p.astype(z.dtype), z, (1, 0), shape.precision)
        else:

            def body(c, carry):
                out, peak, total = carry
                q, z = latents(c)[head]
                s = scores(k, q, c)
                new = jnp.maximum(peak, jnp.max(s, axis=1) * scale2)
                p = exp2_scaled(s, scale2, new, 0)
                old = exp2(peak - new)
                out = out * old[:, None] + dot(p.astype(z.dtype), z, (1, 0), shape.precision)
                return out, new, total * old + jnp.sum(p, axis=1)

            vector = jnp.full((tile.tokens,), NEG * scale2, jnp.float32)
            zeros = jnp.zeros((tile.tokens, shape.width), jnp.float32)
            out, peak, total = lax.fori_loop(
                0, chunks, body, (zeros, vector, jnp.zeros_like(vector))
            )
        # a reciprocal a row, not a division an element
        return out * reciprocal(total)[:, None], peak + log2(total)

    def body(t, carry):
        live = live_tokens(mask_ref, t, tile.tokens, shape.n)
        bound = (
            None
            if shape.n % tile.tokens == 0
            else t * tile.tokens + jnp.arange(tile.tokens) < shape.n
        )
        k = load_rows(k_ref, t * tile.tokens, tile.tokens, live)
        y = jnp.zeros((tile.tokens, shape.width), jnp.float32)
        for i in range(shape.group):
            out, lse = one_head(k, i)
            y += out
            if lse_ref is not None:
                store_token_row(lse_ref, i, t * tile.tokens, lse, bound)
        if masked:
            y = jnp.where(spread(live, y.shape, 0), y, 0.0)
        store_rows(y_ref, t * tile.tokens, y, bound)
        return carry

    if tiles == 1:
        body(first, 0)
    else:
        last = jnp.minimum(first + tiles, pl.cdiv(shape.n, tile.tokens))
        lax.fori_loop(first, last, body, 0)


def store_token_row(ref, head: int, start, x, live):
    """Stores x along the tokens of one head of a [heads, N] array."""
    at = ref.at[pl.ds(head, 1), pl.ds(start, x.shape[0])]
    plgpu.store(at, x[None, :], mask=None if live is None else live[None, :])


class Specs:
    """Block specs of whole arrays seen by one head group of one sample."""

    def __init__(self, shape: Shape):
        self.shape = shape
        self.group = lambda i: lax.rem(i, shape.groups)

    def tokens(self):  # [B, N, C]
        return pl.BlockSpec(
            (None, self.shape.n, self.shape.width), lambda i, b: (b, 0, self.group(i))
        )

    def token_stats(self):  # [B, H, N]
        return pl.BlockSpec(
            (None, self.shape.group, self.shape.n), lambda i, b: (b, self.group(i), 0)
        )

    def mask(self):  # [B, N]
        return pl.BlockSpec((None, self.shape.n), lambda i, b: (b, 0))

    def queries(self):  # [M, C]
        return pl.BlockSpec((self.shape.m, self.shape.width), lambda i, b: (0, self.group(i)))

    def latents(self):  # [B, M, C]
        return pl.BlockSpec(
            (None, self.shape.m, self.shape.width), lambda i, b: (b, 0, self.group(i))
        )

    def latent_stats(self):  # [B, M, H]
        return pl.BlockSpec(
            (None, self.shape.m, self.shape.group), lambda i, b: (b, 0, self.group(i))
        )

    def head(self, *sizes):  # [B, *sizes, H]
        return pl.BlockSpec(
            (None, *sizes, self.shape.group), lambda i, b: (b, *[0] * len(sizes), self.group(i))
        )

    def split(self, width, split_of):  # one of [B, splits, M, groups * width]
        block = (None, None, self.shape.m, width)
        return pl.BlockSpec(block, lambda i, b: (b, split_of(i), 0, self.group(i)))

    def splits(self, width, count):  # all of [B, splits, M, groups * width]
        block = (None, count, self.shape.m, width)
        return pl.BlockSpec(block, lambda i, b: (b, 0, 0, self.group(i)))


def flat(x):
    """[..., H, D] -> [..., C]."""
    return x.reshape(*x.shape[:-2], -1)


def mask_operand(mask, specs):
    """The mask as kernel operands: none, or one of bytes."""
    return ([], []) if mask is None else ([mask.astype(jnp.int8)], [specs.mask()])


def describe(q, k, dtype=None) -> Shape:
    """Sizes, and how a kernel multiplies whose operands have `dtype` (None: that of k)."""
    (m, h, d), (b, n) = q.shape, k.shape[:2]
    exact = jnp.dtype(dtype or k.dtype) == jnp.float32
    return Shape(b, n, m, h, d, f32_precision() if exact else "native")


@traced_once(4)
def encode(q, k, v, mask, scale):
    """z [B, M, H, D] and the natural log-sum-exp [B, M, H], float32."""
    shape = describe(q, k)
    tile = tile_for("encode", shape)
    blocks = pl.cdiv(shape.m, tile.latents)
    splits, tiles = splits_for(shape, tile, shape.groups * blocks * shape.b)
    specs = Specs(shape)
    masks, mask_specs = mask_operand(mask, specs)
    split_of = lambda i: lax.div(i, shape.groups * blocks)
    z_shape = jax.ShapeDtypeStruct((shape.b, shape.m, shape.h * shape.d), jnp.float32)
    stat_shape = jax.ShapeDtypeStruct((shape.b, shape.m, shape.h), jnp.float32)
    final = splits == 1
    part = lambda x: jax.ShapeDtypeStruct((shape.b, splits, *x.shape[1:]), x.dtype)
    stat_spec = specs.split(shape.group, split_of)
    out = pallas_call(
        functools.partial(
            _encode_kernel,
            shape=shape,
            tile=tile,
            tiles=tiles,
            blocks=blocks,
            scale2=scale * LOG2E,
            masked=mask is not None,
            final=final,
        ),
        name="flare_encode",
        grid=(shape.groups * blocks * splits, shape.b),
        in_specs=[specs.queries(), specs.tokens(), specs.tokens(), *mask_specs],
        out_specs=[specs.latents(), specs.latent_stats()]
        if final
        else [specs.split(shape.width, split_of), stat_spec, stat_spec],
        out_shape=[z_shape, stat_shape] if final else [part(z_shape), *[part(stat_shape)] * 2],
        warps=tile.warps,
        stages=tile.stages,
    )(flat(q), flat(k), flat(v), *masks)
    if not final:
        rows = min(8, pow2(shape.m))
        out = pallas_call(
            functools.partial(
                _merge_kernel, shape=shape, splits=splits, rows=rows, chunk=min(32, pow2(splits))
            ),
            name="flare_encode_merge",
            grid=(shape.groups * pl.cdiv(shape.m, rows), shape.b),
            in_specs=[specs.splits(shape.width, splits), *[specs.splits(shape.group, splits)] * 2],
            out_specs=[specs.latents(), specs.latent_stats()],
            out_shape=[z_shape, stat_shape],
            warps=4,
            stages=2,
        )(*out)
    return out[0].reshape(shape.b, shape.m, shape.h, shape.d), out[1]


@traced_once(4, 5)
def decode(q, k, z, mask, scale, with_lse):
    """y [B, N, H, D] in k's dtype; with_lse: also the base-2 log-sum-exp [B, H, N], float32."""
    shape = describe(q, k)
    tile = tile_for("decode", shape)
    splits, tiles = splits_for(shape, tile, shape.groups * shape.b)
    specs = Specs(shape)
    masks, mask_specs = mask_operand(mask, specs)
    y_shape = jax.ShapeDtypeStruct((shape.b, shape.n, shape.h * shape.d), k.dtype)
    lse_shape = jax.ShapeDtypeStruct((shape.b, shape.h, shape.n), jnp.float32)
    y, *lse = pallas_call(
        functools.partial(
            _decode_kernel,
            shape=shape,
            tile=tile,
            tiles=tiles,
            scale2=scale * LOG2E,
            masked=mask is not None,
        ),
        name="flare_decode",
        grid=(shape.groups * splits, shape.b),
        in_specs=[specs.queries(), specs.tokens(), specs.latents(), *mask_specs],
        out_specs=[specs.tokens()] + [specs.token_stats()] * with_lse,
        out_shape=[y_shape] + [lse_shape] * with_lse,
        warps=tile.warps,
        stages=tile.stages,
    )(flat(q), flat(k), flat(z), *masks)
    y = y.reshape(k.shape)
    return (y, *lse) if with_lse else y
