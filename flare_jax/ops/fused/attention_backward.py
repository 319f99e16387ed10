"""Kernels of the backward passes.

With S' = scale log2(e) q.k, L'_n its log-sum-exp over latents and L_m over tokens (base 2):

    P'[n, m] = 2^(S' - L'_n)   decode's weights        P[n, m] = 2^(S' - L_m)   encode's weights
    dz[m]    = sum_n P' dy[n]                          kernel dz, with d1[n] = dy[n].y[n]
    dS       = P' (dy.z - d1_n) + P (v.dz - d2_m)      d2[m] = dz[m].z[m]
    dv[n]    = sum_m P dz[m],   dk[n] = scale sum_m dS q[m],   dq[m] = scale sum_n dS k[n]

One exponential serves both weights: P = P' a_n b_m with a_n = 2^(L'_n - c), b_m = 2^(c - L_m) and
c = min_m L_m, so that b folds into dz outside the loop and a into v, a thin tile:

    dS = P' (dy.z + (a v).(b dz) - d1_n - a_n b_m d2_m),   dv = a_n (P' @ (b dz))

P' below 2^-126 is flushed to zero, so P is wrong by at most 2^(max L' - c - 126). Kernel dz finds
max L'; where it exceeds c + SPREAD, a and b are zero, which leaves decode's terms, and a second
walk over the tokens adds encode's with their own exponential. (Both in one loop took 80 registers
more than the usual one, and a third of the programs that fit on a multiprocessor.)

dq of all latents stays in registers while M and the width allow it. Beyond that a kernel of its
own walks the tokens for a block of latents (one more exponential, no partial dk and dv in memory).
Partial sums per split are added in a fixed order: two runs give the same bits.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from flare_jax.ops.fused.attention_forward import (
    NEG,
    Specs,
    describe,
    flat,
    live_tokens,
    load_column,
    load_latents,
    load_rows,
    mask_operand,
    over_chunks,
    own,
    store_column,
    store_rows,
    store_token_row,
)
from flare_jax.ops.fused.math import (
    LOG2E,
    asm,
    barrier,
    dot,
    exp2,
    exp2_scaled,
    interpreted,
    multiply,
    once,
    pallas_call,
    spread,
)
from flare_jax.ops.fused.tiles import fuses_dq, pow2, splits_for, tile_for, traced_once

SPREAD = 86.0  # base 2: P is then wrong by less than 2^-40


def load_token_row(ref, head: int, start, size: int, live):
    """Entries of one head of a [heads, N] array; zero where not live."""
    at = ref.at[pl.ds(head, 1), pl.ds(start, size)]
    if live is None:
        return plgpu.load(at).reshape(size)
    return plgpu.load(at, mask=live[None, :], other=0.0).reshape(size)


def _offset(d1, a, d2, shape, axis: int):
    """-d1_n - a_n d2_m, tokens along `axis`."""
    d1, a, d2 = spread(-d1, shape, axis), spread(a, shape, axis), spread(-d2, shape, 1 - axis)
    return d1 + a * d2 if interpreted() else asm("fma.rn.ftz.f32 $0, $2, $3, $1;", d1, a, d2)


def compute_dtype(dtype):
    """float16 has too little range for gradients of many tokens: its backward is float32's."""
    return jnp.float32 if dtype == jnp.float16 else dtype


def _dz_kernel(*refs, shape, tile, tiles, blocks, scale2, masked, final):
    """One (latent block, head group, split): partial dz, d1 of its tokens, largest L'.

    `final`: there is one split, and so no merge but what `_finish_dz` does.
    """
    q_ref, k_ref, dy_ref, y_ref, lse_ref, *refs = refs
    mask_ref, *refs = refs if masked else (None, *refs)
    *latent_refs, d1_ref = refs
    index = pl.program_id(0)
    first = lax.div(index, shape.groups * blocks) * tiles
    start = lax.rem(lax.div(index, shape.groups), blocks) * tile.latents
    dtype = compute_dtype(k_ref.dtype)
    heads = range(shape.group)
    q = load_latents(q_ref, start, tile.latents, shape.m, dtype)
    qs = [own(q, i, shape) for i in heads]

    def body(t, carry):
        dz, tops = carry
        live = live_tokens(mask_ref, t, tile.tokens, shape.n)
        bound = bounds(t, tile.tokens, shape.n)
        rows = functools.partial(load_rows, start=t * tile.tokens, size=tile.tokens, live=live)
        k, dy, y = (rows(ref).astype(dtype) for ref in (k_ref, dy_ref, y_ref))
        products = dy.astype(jnp.float32) * y.astype(jnp.float32)
        out = []
        for i in heads:
            lse = load_token_row(lse_ref, i, t * tile.tokens, tile.tokens, live)
            s = dot(qs[i], k, (1, 1), shape.precision)  # [latents, tokens]
            p = exp2_scaled(s, scale2, lse, 1).astype(dtype)
            dz += dot(p, own(dy, i, shape), (1, 0), shape.precision)
            d1 = jnp.sum(own(products, i, shape), axis=1)
            store_token_row(d1_ref, i, t * tile.tokens, d1, bound)
            out.append(jnp.maximum(tops[i], lse if live is None else jnp.where(live, lse, NEG)))
        return dz, tuple(out)

    last = jnp.minimum(first + tiles, pl.cdiv(shape.n, tile.tokens))
    zeros = jnp.zeros((tile.latents, shape.width), jnp.float32)
    lowest = jnp.full((tile.tokens,), NEG, jnp.float32)
    dz, tops = lax.fori_loop(first, last, body, (zeros, (lowest,) * shape.group))
    if final:
        _finish_dz(dz, [jnp.max(top) for top in tops], start, latent_refs, shape)
        return
    dz_ref, top_ref = latent_refs
    store_rows(dz_ref, start, dz, start + jnp.arange(tile.latents) < shape.m)
    for i in heads:
        top_ref[i] = jnp.max(tops[i])


def bounds(t, size: int, n: int):
    """Which tokens of tile t are below N; None where all are."""
    return None if n % size == 0 else t * size + jnp.arange(size) < n


def finite_lse(ref, start, size, head, m):
    """L_m in base 2; zero for a sample without a real token, whose gradients are zero anyway."""
    lse = load_column(ref, start, size, head, m) * LOG2E
    return jnp.where(lse > NEG, lse, 0.0)


def _merge_dz_kernel(*refs, shape, splits, rows, chunk):
    """Some latents of one head group: dz over all splits and what follows from it."""
    part_ref, top_ref, *refs = refs
    start = lax.div(pl.program_id(0), shape.groups) * rows
    live, size = start + jnp.arange(rows) < shape.m, pow2(splits)

    def body(i, dz):
        split = i * chunk + jnp.arange(chunk) < splits
        mask = split[:, None, None] & live[None, :, None]
        at = part_ref.at[pl.ds(i * chunk, chunk), pl.ds(start, rows), :]
        part = plgpu.load(at, mask=jnp.broadcast_to(mask, (chunk, rows, shape.width)), other=0.0)
        return dz + jnp.sum(part, axis=0)

    def highest(i):
        at = top_ref.at[pl.ds(0 * start, size), pl.ds(i, 1)]
        return jnp.max(plgpu.load(at, mask=(jnp.arange(size) < splits)[:, None], other=NEG))

    zeros = jnp.zeros((rows, shape.width), jnp.float32)
    dz = over_chunks(splits, chunk, body, zeros)
    _finish_dz(dz, [highest(i) for i in range(shape.group)], start, refs, shape)


def _finish_dz(dz, tops, start, refs, shape):
    """Stores dz of some latents, d2, both times b, and c and "wide" of the group.

    Wide is 1 where the spread of a head forbids a and b: they are zero then, b here and a by a
    huge c, and so "shared" is "decode".
    d2 is that of dz as stored: then sum_n P (v.dz - d2) is zero, whatever dz is rounded to.
    """
    z_ref, lse_ref, dz_ref, bdz_ref, d2_ref, bd2_ref, c_ref, wide_ref = refs
    rows, latents = dz.shape[0], jnp.arange(pow2(shape.m))
    live = start + jnp.arange(rows) < shape.m
    z = load_rows(z_ref, start, rows, live)
    d2_of = lambda dz: jnp.sum(dz.astype(dz_ref.dtype).astype(jnp.float32) * z, axis=1)

    def lowest(i):
        lse = finite_lse(lse_ref, 0 * start, pow2(shape.m), i, shape.m)
        return jnp.min(jnp.where(latents < shape.m, lse, -NEG))

    cs = [lowest(i) for i in range(shape.group)]
    wide = functools.reduce(jnp.maximum, [x - c for x, c in zip(tops, cs, strict=True)]) > SPREAD
    bdz = jnp.zeros_like(dz)
    for i, c in enumerate(cs):
        b = jnp.where(wide, 0.0, exp2(c - finite_lse(lse_ref, start, rows, i, shape.m)))
        mine = own(dz, i, shape)
        store_column(d2_ref, start, i, d2_of(mine), shape.m)
        store_column(bd2_ref, start, i, d2_of(mine * b[:, None]), shape.m)
        bdz += mine * b[:, None]
        c_ref[i] = jnp.where(wide, -NEG, c)
        wide_ref[i] = wide.astype(jnp.float32)
    store_rows(dz_ref, start, dz, live)
    store_rows(bdz_ref, start, bdz, live)


def _pair(mode, tokens, latents, *, shape, scale2, axis, live_m):
    """Weights, score gradients and the value that dv sums, for one head, tile and chunk.

    Arrays are [tokens, latents] for axis 0 and [latents, tokens] for axis 1. Mode "shared" is one
    exponential for both softmaxes, "encode" and "decode" only that softmax.
    """
    live, k, v, dy, lse_n, d1, a = tokens
    q, z, dz, lse_m, d2 = latents

    def product(x, y, init=None):  # tokens x latents
        pair = (x, y) if axis == 0 else (y, x)
        return dot(*pair, (1, 1), shape.precision, init)

    def weights(lse, along):
        p = exp2_scaled(product(k, q), scale2, lse, along)
        return p if live_m is None else jnp.where(spread(live_m, p.shape, 1 - axis), p, 0.0)

    if mode == "encode":
        p = weights(lse_m, 1 - axis)
        p = p if live is None else jnp.where(spread(live, p.shape, axis), p, 0.0)
        return p, p * (product(v, dz) - spread(d2, p.shape, 1 - axis))
    p = weights(lse_n, axis)
    if mode == "decode":
        return p, p * (product(dy, z) - spread(d1, p.shape, axis))
    offset = _offset(d1, a, d2, p.shape, axis)
    return p, multiply(p, product(v, dz, product(dy, z, offset)))


def _maybe(load, ref):
    return None if ref is None else load(ref)


def input_names(mode):
    """Operands of the kernels of dk, dv and dq in order, before the mask."""
    decode = ["dy", "z", "lse_n", "d1"]
    encode = ["v", "dz", "d2", "lse_m"]
    if mode == "shared":
        return ["q", "k", *decode, *encode, "bdz", "bd2", "c", "wide"]
    return ["q", "k", *(decode if mode == "decode" else encode)]


class _Inputs:
    """What the kernels of dk, dv and dq read, by name, and how a tile or a chunk of it loads."""

    def __init__(self, refs, *, shape, tile, mode, masked):
        self.shape, self.tile, self.mode = shape, tile, mode
        names = input_names(mode) + ["mask"] * masked
        self.refs = dict(zip(names, refs, strict=False))
        self.outputs = refs[len(names) :]
        self.dtype = compute_dtype(self.refs["k"].dtype)

    def latents(self, start, head, mode):
        """q, z, dz, L_m and d2 of one head; in mode "shared" dz and d2 times b."""
        size, m, b = self.tile.latents, self.shape.m, "b" * (mode == "shared")

        def wide(name):
            load = lambda ref: own(load_latents(ref, start, size, m, self.dtype), head, self.shape)
            return _maybe(load, self.refs.get(name))

        d2 = _maybe(lambda x: load_column(x, start, size, head, m), self.refs.get(b + "d2"))
        lse = _maybe(lambda x: finite_lse(x, start, size, head, m), self.refs.get("lse_m"))
        return wide("q"), wide("z"), wide(b + "dz"), lse, d2

    def rows(self, t):
        """Live tokens, k, v and dy of a tile."""
        size = self.tile.tokens
        live = live_tokens(self.refs.get("mask"), t, size, self.shape.n)
        load = lambda ref: load_rows(ref, t * size, size, live).astype(self.dtype)
        return live, *(_maybe(load, self.refs.get(name)) for name in ("k", "v", "dy"))

    def tokens(self, t, head, mode, live, k, v, dy):
        """Live tokens, k, v, dy, L'_n, d1 and a of one head; in mode "shared" v times a."""
        size = self.tile.tokens
        row = lambda ref: load_token_row(ref, head, t * size, size, live)
        lse, d1 = (_maybe(row, self.refs.get(name)) for name in ("lse_n", "d1"))
        a = None
        if mode == "shared":
            a = exp2(lse - self.refs["c"][head])
            a = a if live is None else jnp.where(live, a, 0.0)
            v = (v.astype(jnp.float32) * a[:, None]).astype(v.dtype)
        return live, k, v, dy, lse, d1, a

    def live_m(self, start):
        size = self.tile.latents
        return None if self.shape.m % size == 0 else start + jnp.arange(size) < self.shape.m

    def pair(self, mode, tokens, latents, scale, start, axis):
        """`_pair` of one head, tile of tokens and chunk of latents from `start` on."""
        return _pair(
            mode,
            tokens,
            latents,
            shape=self.shape,
            scale2=scale * LOG2E,
            axis=axis,
            live_m=self.live_m(start),
        )

    def if_wide(self, more, sums):
        """more(sums) where one exponential is not enough for the group; else sums."""
        if self.mode != "shared":
            return sums
        return lax.cond(self.refs["wide"][0] > 0, more, lambda sums: sums, sums)


def _dkv_kernel(*refs, shape, tile, tiles, scale, mode, masked, with_dq):
    """One (head group, split): dk and dv of its tokens and, where it fits, partial dq."""
    x = _Inputs(refs, shape=shape, tile=tile, mode=mode, masked=masked)
    dk_ref, *outputs = x.outputs
    first = lax.div(pl.program_id(0), shape.groups) * tiles
    last = jnp.minimum(first + tiles, pl.cdiv(shape.n, tile.tokens))
    heads, chunks = range(shape.group), pl.cdiv(shape.m, tile.latents)
    origin = 0 * first  # traced: a constant slice may not pass the end of an array, masked or not
    starts = [origin + c * tile.latents for c in range(chunks)]
    zeros = jnp.zeros((tile.tokens, shape.width), jnp.float32)

    def run(mode, dqs, again=False):
        """Walks the tokens; `again`: adds to the dk of an earlier walk, with fewer registers."""
        held = None
        if with_dq and not again:
            held = [[x.latents(s, i, mode) for s in starts] for i in heads]

        def chunk(mine, latents, start, dk, pz):
            p, ds = x.pair(mode, mine, latents, scale, start, axis=0)
            ds = once(ds).astype(x.dtype)
            dk += dot(ds, latents[0], (1, 0), shape.precision)
            if mode != "decode":
                pz += dot(p.astype(x.dtype), latents[2], (1, 0), shape.precision)
            return ds, dk, pz

        def body(t, dqs):
            live, k, v, dy = x.rows(t)
            dk, dv, dqs = zeros, zeros, list(dqs)
            for i in heads:
                mine = x.tokens(t, i, mode, live, k, v, dy)
                pz = zeros
                if with_dq:
                    for c, start in enumerate(starts):
                        latents = held[i][c] if held else x.latents(start, i, mode)
                        ds, dk, pz = chunk(mine, latents, start, dk, pz)
                        dqs[c] += dot(ds, own(k, i, shape), (0, 0), shape.precision)
                else:

                    def step(c, carry, mine=mine, i=i):
                        start = c * tile.latents
                        return chunk(mine, x.latents(start, i, mode), start, *carry)[1:]

                    dk, pz = lax.fori_loop(0, chunks, step, (dk, pz))
                dv += pz * mine[-1][:, None] if mode == "shared" else pz
            bound = bounds(t, tile.tokens, shape.n)
            dk *= scale
            if again:
                dk += load_rows(dk_ref, t * tile.tokens, tile.tokens, bound).astype(jnp.float32)
            store_rows(dk_ref, t * tile.tokens, dk, bound)
            if mode != "decode":
                store_rows(outputs[0], t * tile.tokens, dv, bound)
            return tuple(dqs)

        return lax.fori_loop(first, last, body, dqs)

    def encode_too(dqs):
        barrier()  # the second walk reads what other threads of this program wrote
        return run("encode", dqs, again=True)

    zero = jnp.zeros((tile.latents, shape.width), jnp.float32)
    dqs = run(mode, (zero,) * (chunks if with_dq else 0))
    dqs = x.if_wide(encode_too, dqs)
    for start, dq in zip(starts, dqs, strict=False):
        store_rows(outputs[-1], start, dq, start + jnp.arange(tile.latents) < shape.m)


def _dq_kernel(*refs, shape, tile, tiles, blocks, scale, mode, masked):
    """One (latent block, head group, split): partial dq."""
    x = _Inputs(refs, shape=shape, tile=tile, mode=mode, masked=masked)
    index = pl.program_id(0)
    first = lax.div(index, shape.groups * blocks) * tiles
    last = jnp.minimum(first + tiles, pl.cdiv(shape.n, tile.tokens))
    start = lax.rem(lax.div(index, shape.groups), blocks) * tile.latents

    def run(mode, dq):
        held = [x.latents(start, i, mode) for i in range(shape.group)]

        def body(t, dq):
            live, k, v, dy = x.rows(t)
            for i, latents in enumerate(held):
                mine = x.tokens(t, i, mode, live, k, v, dy)
                _, ds = x.pair(mode, mine, latents, scale, start, axis=1)
                dq += dot(ds.astype(x.dtype), own(k, i, shape), (1, 0), shape.precision)
            return dq

        return lax.fori_loop(first, last, body, dq)

    dq = run(mode, jnp.zeros((tile.latents, shape.width), jnp.float32))
    (dq,) = x.if_wide(lambda dqs: (run("encode", dqs[0]),), (dq,))
    store_rows(x.outputs[0], start, dq, start + jnp.arange(tile.latents) < shape.m)


@traced_once(6)
def dz_parts(q, k, mask, y, lse_n, dy, scale):
    """Partial dz [B, splits, M, C] and d1 [B, H, N]."""
    (parts, _), d1 = _dz(q, k, mask, y, lse_n, dy, scale)
    return parts, d1


@traced_once(6, 9)
def dz_merged(q, k, mask, y, lse_n, dy, scale, z, lse, gather):
    """By name: dz [B, M, H, D], b dz, d2, b d2, c, whether both exponentials are needed; and d1.

    dz, c and "wide" are those of all devices' tokens where `gather` gathers their parts.
    """
    out, d1 = _dz(q, k, mask, y, lse_n, dy, scale, (flat(z), lse), gather)
    names = ("dz", "bdz", "d2", "bd2", "c", "wide")
    out = dict(zip(names, out, strict=True), d1=d1)
    return out | {"dz": out["dz"].reshape(z.shape)}


def _dz(q, k, mask, y, lse_n, dy, scale, encoded=None, gather=None):
    """(partial dz and the largest L' [B, splits, H], d1); given z and L_m what `_finish_dz` has."""
    dtype = compute_dtype(k.dtype)
    shape = describe(q, k, dtype)
    tile = tile_for("dz", shape)
    blocks = pl.cdiv(shape.m, tile.latents)
    splits, tiles = splits_for(shape, tile, shape.groups * blocks * shape.b)
    specs = Specs(shape)
    masks, mask_specs = mask_operand(mask, specs)
    split_of = lambda i: lax.div(i, shape.groups * blocks)
    top_spec = pl.BlockSpec(
        (None, None, shape.group), lambda i, b: (b, split_of(i), specs.group(i))
    )
    f32 = lambda *sizes: jax.ShapeDtypeStruct((shape.b, *sizes), jnp.float32)
    latents, stats = specs.latents(), specs.latent_stats()
    final = encoded is not None and gather is None and splits == 1
    finished = dict(
        out_specs=[latents, latents, stats, stats, specs.head(), specs.head()],
        out_shape=[jax.ShapeDtypeStruct(f32(shape.m, shape.h * shape.d).shape, dtype)] * 2
        + [f32(shape.m, shape.h)] * 2
        + [f32(shape.h)] * 2,
    )
    partial = dict(
        out_specs=[specs.split(shape.width, split_of), top_spec],
        out_shape=[f32(splits, shape.m, shape.h * shape.d), f32(splits, shape.h)],
    )
    outputs = finished if final else partial
    *out, d1 = pallas_call(
        functools.partial(
            _dz_kernel,
            shape=shape,
            tile=tile,
            tiles=tiles,
            blocks=blocks,
            scale2=scale * LOG2E,
            masked=mask is not None,
            final=final,
        ),
        name="flare_dz",
        grid=(shape.groups * blocks * splits, shape.b),
        in_specs=[
            specs.queries(),
            *[specs.tokens()] * 3,
            specs.token_stats(),
            *mask_specs,
            *[latents, stats] * final,
        ],
        out_specs=[*outputs["out_specs"], specs.token_stats()],
        out_shape=[*outputs["out_shape"], f32(shape.h, shape.n)],
        warps=tile.warps,
        stages=tile.stages,
    )(flat(q), flat(k), flat(dy), flat(y), lse_n, *masks, *(encoded if final else ()))
    if final or encoded is None:
        return out, d1
    if gather is not None:  # a device is a split
        out = gather(jnp.sum(out[0], axis=1), jnp.max(out[1], axis=1))
        splits = out[0].shape[1]
    rows = min(8, pow2(shape.m))
    out = pallas_call(
        functools.partial(
            _merge_dz_kernel, shape=shape, splits=splits, rows=rows, chunk=min(32, pow2(splits))
        ),
        name="flare_dz_merge",
        grid=(shape.groups * pl.cdiv(shape.m, rows), shape.b),
        in_specs=[
            specs.splits(shape.width, splits),
            specs.head(splits),
            latents,
            stats,
        ],
        warps=4,
        stages=2,
        **finished,
    )(*out, *encoded)
    return out, d1


@traced_once(0, 1)
def gradients(mode, scale, mask, arrays):
    """dq (float32), dk and, unless mode is "decode", dv, from the operands in `input_names`."""
    q, k = arrays["q"], arrays["k"]
    shape = describe(q, k, compute_dtype(k.dtype))
    specs = Specs(shape)
    masks, mask_specs = mask_operand(mask, specs)
    kinds = {"q": specs.queries(), "c": specs.head(), "wide": specs.head()}
    kinds |= dict.fromkeys(("k", "v", "dy"), specs.tokens())
    kinds |= dict.fromkeys(("z", "dz", "bdz"), specs.latents())
    kinds |= dict.fromkeys(("lse_m", "d2", "bd2"), specs.latent_stats())
    kinds |= dict.fromkeys(("lse_n", "d1"), specs.token_stats())
    with_dq = fuses_dq(shape)
    wide = ("q", "k", "v", "dy", "z", "dz")
    arrays = {name: flat(x) if name in wide else x for name, x in arrays.items()}
    if not with_dq:  # read again for every tile of tokens
        dtype = compute_dtype(k.dtype)
        cast = {name: arrays[name].astype(dtype) for name in ("q", "z", "dz") if name in arrays}
        arrays = arrays | cast
    operands = [arrays[name] for name in input_names(mode)] + masks
    in_specs = [kinds[name] for name in input_names(mode)] + mask_specs
    common = dict(shape=shape, scale=scale, mode=mode, masked=mask is not None)

    def partial_dq(splits):
        return jax.ShapeDtypeStruct((shape.b, splits, shape.m, shape.h * shape.d), jnp.float32)

    tile = tile_for("dkv", shape)
    splits, tiles = splits_for(shape, tile, shape.groups * shape.b)
    token_shape = jax.ShapeDtypeStruct((shape.b, shape.n, shape.h * shape.d), k.dtype)
    outputs = 1 if mode == "decode" else 2
    split_of = lambda i: lax.div(i, shape.groups)
    out = pallas_call(
        functools.partial(_dkv_kernel, tile=tile, tiles=tiles, with_dq=with_dq, **common),
        name="flare_dkv",
        grid=(shape.groups * splits, shape.b),
        in_specs=in_specs,
        out_specs=[specs.tokens()] * outputs + [specs.split(shape.width, split_of)] * with_dq,
        out_shape=[token_shape] * outputs + [partial_dq(splits)] * with_dq,
        warps=tile.warps,
        stages=tile.stages,
    )(*operands)
    if not with_dq:
        tile = tile_for("dq", shape)
        blocks = pl.cdiv(shape.m, tile.latents)
        splits, tiles = splits_for(shape, tile, shape.groups * blocks * shape.b)
        split_of = lambda i: lax.div(i, shape.groups * blocks)
        dq = pallas_call(
            functools.partial(_dq_kernel, tile=tile, tiles=tiles, blocks=blocks, **common),
            name="flare_dq",
            grid=(shape.groups * blocks * splits, shape.b),
            in_specs=in_specs,
            out_specs=specs.split(shape.width, split_of),
            out_shape=partial_dq(splits),
            warps=tile.warps,
            stages=tile.stages,
        )(*operands)
        out = [*out, dq]
    *tokens, dq = out
    dq = scale * jnp.sum(dq, axis=(0, 1)).reshape(q.shape)
    return dq, *(x.reshape(k.shape) for x in tokens)
