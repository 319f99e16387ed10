"""Checks and times each kernel of the operator over a handful of block sizes, on one NVIDIA GPU.

    OUT=FOLDER python -m experiments.tune_attention        about two and a half minutes on an H200
    python -m experiments.tune_attention --seconds 60      stop timing after 60 s
    python -m experiments.tune_attention --case 128,512,bfloat16 --candidates dz:64x128/4/2/16 ...
        only these tiles (tokens x latents / warps / stages / waves), beside the table's
    FLARE_JAX_INTERPRET=1 python -m experiments.tune_attention --smoke      tiny sizes, any machine

Kernels: encode (and its merge), decode, dz (and its merge), dkv (with dq where that fits), dq.
Every variant is first compared, by relative norm, with the XLA implementation in float32 at the
highest matmul precision, at a ragged number of tokens, and run twice: the bits must be equal. A
variant that is wrong (nan is) is not timed. Large problems: median over several series of calls
that follow each other, synchronised at their end. Small ones: calls chained in one jit, the last
result added to q, which is one small kernel a call. Writes tune_attention.json to the folder
--out ($OUT if not given) after every measurement.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import os
import pathlib
import re
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flare_jax.ops import xla
from flare_jax.ops.fused import attention, attention_backward, attention_forward, tiles
from flare_jax.ops.fused.math import LOG2E
from flare_jax.ops.fused.tiles import Tile

BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
TOLERANCE = {"bfloat16": 2e-2, "float16": 5e-3, "float32": 2e-4, "exact": 3e-5}
CHAINED = 50  # calls of a small problem in one jit
KERNELS = ("encode", "decode", "dz", "dkv", "dq")


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one problem; `exact`: float32 products in IEEE arithmetic."""

    n: int
    c: int
    m: int
    dtype: str
    h: int = 8
    b: int = 1
    masked: bool = False
    scale: float = 1.0
    exact: bool = False

    def name(self):
        extra = [f"B={self.b}"] * (self.b > 1) + ["masked"] * self.masked + ["exact"] * self.exact
        extra += [f"H={self.h}"] * (self.h != 8) + [f"scale={self.scale:g}"] * (self.scale != 1)
        return " ".join([f"C={self.c} M={self.m} N={self.n} {self.dtype}", *extra])

    @property
    def shape(self):
        precision = "exact" if self.exact else "fast" if self.dtype == "float32" else "native"
        return tiles.Shape(self.b, self.n, self.m, self.h, self.c // self.h, precision)

    @property
    def small(self):
        return self.b * self.n <= tiles.FEW_TOKENS

    def ragged(self, n=66_001):
        """The problem on which the variants of this one are checked."""
        return self if self.small else dataclasses.replace(self, n=n)


LARGE = 1_024_000
CASES = [
    Case(LARGE, 64, 64, "bfloat16"),
    Case(LARGE, 128, 128, "bfloat16"),
    Case(972, 64, 64, "float32", b=2),
    Case(972, 64, 64, "bfloat16", b=2),
    Case(LARGE, 64, 64, "float32"),
    Case(LARGE, 128, 128, "float32"),
    Case(LARGE, 128, 512, "bfloat16"),
    Case(LARGE, 128, 2048, "bfloat16"),
]
FEATURES = [
    Case(5003, 64, 64, "bfloat16", b=2, masked=True),
    Case(5003, 128, 128, "float32", b=2, masked=True),
    Case(5003, 64, 300, "bfloat16", h=4, masked=True),
    Case(5003, 64, 512, "float32"),
    Case(5003, 128, 128, "float16"),
    Case(5003, 64, 64, "float16", masked=True),
    Case(5003, 64, 64, "bfloat16", h=16),
    Case(5003, 64, 40, "float32", h=16),
    Case(5003, 128, 128, "bfloat16", h=4),
    Case(5003, 128, 128, "float32", h=4),
    Case(5003, 128, 128, "bfloat16", h=2),
    Case(5003, 128, 64, "float32", h=2),
    Case(5003, 128, 64, "float16", h=2, masked=True),
    Case(5003, 64, 64, "float32", exact=True),
    Case(5003, 128, 128, "float32", exact=True, masked=True),
    Case(5003, 64, 64, "bfloat16", scale=30.0),  # scores over hundreds of nats
    Case(5003, 128, 300, "bfloat16", scale=20.0, masked=True),
    Case(5003, 64, 64, "float32", scale=30.0, exact=True),
    Case(1, 64, 64, "bfloat16", b=2),
]


def variants(case):
    """[(kernel, Tile)] beside the table's choice; tokens, latents, warps, stages, waves."""
    f32, m = case.dtype == "float32", case.m
    if case.small:  # waves 0: one split, and so no merge
        out = {
            "encode": [Tile(64, 64, 4, 2, 0), Tile(64, 16, 1, 2, 0), Tile(128, 64, 4, 2, 0),
                       Tile(128, 64, 4, 2, 1), Tile(64, 16, 1, 2, 1)],
            "decode": [Tile(32, 64, 2, 1, 64), Tile(16, 64, 1, 1, 64), Tile(128, 64, 8, 1, 64)],
            "dz": [Tile(64, 64, 4, 2, 0), Tile(64, 16, 1, 2, 0), Tile(128, 64, 4, 2, 0),
                   Tile(128, 64, 4, 2, 1)],
            "dkv": [Tile(32, 64, 2, 1, 64), Tile(64, 64, 4, 1, 1)],
        }  # fmt: skip
    elif m <= 128:
        out = {
            "encode": [Tile(64, 128, 4, 3, 8), Tile(64, 128, 4, 4, 8)],
            "decode": [Tile(64, 128, 4, 3, 32)],
            "dz": [Tile(64, 128, 4, 3, 16)],
            "dkv": [Tile(32, 64, 2, 2, 3), Tile(32, 64, 2, 2, 6), Tile(32, 64, 2, 3, 4),
                    Tile(32, 64, 2, 1, 4)],
        }  # fmt: skip
        if f32:  # larger tiles spill
            out["dkv"] = [Tile(64, 64, 4, 1, 2), Tile(32, 64, 2, 1, 8)]
    else:
        out = {
            "encode": [Tile(64, 128, 4, 3, 4), Tile(64, 128, 8, 3, 8), Tile(128, 128, 4, 3, 8),
                       Tile(64, 256, 8, 3, 8), Tile(64, 64, 4, 3, 8)],
            "decode": [Tile(64, 128, 4, 2, 64), Tile(128, 64, 8, 2, 64), Tile(128, 128, 4, 2, 64),
                       Tile(64, 64, 4, 2, 64)],
            "dz": [Tile(64, 128, 4, 3, 4), Tile(64, 128, 8, 3, 8), Tile(128, 128, 4, 3, 8),
                   Tile(64, 256, 8, 3, 8)],
            "dkv": [Tile(128, 64, 8, 2, 16), Tile(64, 32, 4, 2, 16), Tile(64, 64, 4, 3, 16),
                    Tile(64, 64, 4, 1, 16)],
            "dq": [Tile(32, 128, 4, 2, 8), Tile(64, 128, 8, 2, 8), Tile(64, 64, 4, 3, 8),
                   Tile(32, 64, 4, 2, 8)],
        }  # fmt: skip
        if m > 1000:  # the sizes that M = 512 does not decide
            out = {name: list_[:3] for name, list_ in out.items()}
    return [(name, tile) for name in KERNELS for tile in out.get(name, [])]


# ------------------------------------------------------------------- reference ---


def tokens(case, seed=0):
    """q, k, v, dy, mask; masked tokens hold NaN, and the last of several samples is padding."""
    keys = jax.random.split(jax.random.key(seed), 5)
    d, dtype = case.c // case.h, jnp.dtype(case.dtype)
    q = jax.random.normal(keys[0], (case.m, case.h, d)).astype(dtype)
    k, v, dy = (
        jax.random.normal(key, (case.b, case.n, case.h, d)).astype(dtype) for key in keys[1:4]
    )
    if not case.masked:
        return q, k, v, dy, None
    mask = jax.random.uniform(keys[4], (case.b, case.n)) < 0.6
    mask = mask.at[-1].set(mask[-1] & (case.b == 1))
    nan = lambda x: jnp.where(mask[:, :, None, None], x, jnp.nan)
    return q, nan(k), nan(v), nan(dy), mask


def expected(case, q, k, v, dy, mask):
    """Results and gradients of the inputs in float32, by XLA at the highest precision."""
    with jax.default_matmul_precision("highest"):
        q, k, v, dy = (x.astype(F32) for x in (q, k, v, dy))
        if mask is not None:
            dy = jnp.where(mask[:, :, None, None], dy, 0)
        z, lse = xla.encode(q, k, v, mask, case.scale)
        y = xla.decode(q, k, z, mask, case.scale)
        dq, dk, dz = xla.decode_vjp(q, k, z, mask, case.scale, dy)
        more_dq, more_dk, dv = xla.encode_vjp(q, k, v, mask, case.scale, z, lse, dz)
        out = dict(z=z, lse_m=lse, y=y, dz=dz, dq=dq + more_dq, dk=dk + more_dk, dv=dv)
        if mask is None and case.scale == 1:  # what the kernels hand to each other
            s = jnp.einsum("bnhd,mhd->bhnm", k, q)
            out["lse_n"] = jax.nn.logsumexp(s, axis=-1) * LOG2E
            out["d1"] = jnp.einsum("bnhd,bnhd->bhn", dy, y.astype(case.dtype).astype(F32))
    return out


def handed_on(x, dtype):
    """The operands of dkv and dq that the merge of dz makes."""
    wide = lambda b: jnp.swapaxes(b, 1, 2)[..., None]  # [B, H, M] -> [B, M, H, 1]
    lse = jnp.swapaxes(x["lse_m"], 1, 2) * LOG2E  # [B, H, M]
    c = lse.min(-1)
    bdz = (x["dz"] * wide(jnp.exp2(c[..., None] - lse))).astype(dtype)
    dz = x["dz"].astype(dtype)
    d2, bd2 = (jnp.sum(g.astype(F32) * x["z"], -1) for g in (dz, bdz))
    flat = lambda g: g.reshape(*g.shape[:2], -1)
    wide = jnp.zeros_like(c)  # scores of size 10
    return dict(dz=dz, d2=d2, bdz=flat(bdz), bd2=bd2, c=c, wide=wide)


# --------------------------------------------------------------------- kernels ---


def kernel(name, x, scale=1.0):
    """One kernel (and its merge) on the operands x, as a dict of results."""
    q, k = x["q"], x["k"]
    if name == "encode":
        return dict(zip(("z", "lse_m"), attention.encode(q, k, x["v"], None, scale), strict=True))
    if name == "decode":
        results = attention_forward.decode(q, k, x["z"], None, scale, True)
        return dict(zip(("y", "lse_n"), results, strict=True))
    if name == "dz":
        rest = x["y"], x["lse_n"], x["dy"], scale, x["z"], x["lse_m"], None
        return attention_backward.dz_merged(q, k, None, *rest)
    dq, dk, dv = attention_backward.gradients("shared", scale, None, x)
    if name == "dq":  # what is not returned is not run
        return {"dq": dq}
    fused = tiles.fuses_dq(attention_forward.describe(q, k))
    return {"dk": dk, "dv": dv} | ({"dq": dq} if fused else {})


def operands(name, x):
    """What the kernel reads."""
    names = {
        "encode": ("q", "k", "v"),
        "decode": ("q", "k", "z"),
        "dz": ("q", "k", "y", "lse_n", "dy", "z", "lse_m"),
    }
    backward = attention_backward.input_names("shared")
    return {key: x[key] for key in names.get(name, backward)}


def make_operands(case):
    """All operands by the kernels of the table, for timing at sizes no reference reaches."""
    q, k, v, dy, _ = tokens(case)
    x = dict(q=q, k=k, v=v, dy=dy)
    x |= kernel("encode", x)
    x |= kernel("decode", x)
    return x | kernel("dz", x)


def attend(case, backward):
    """The whole operator: y and, if asked for, dq, dk and dv."""

    def run(q, k, v, dy, mask=None):
        y, residuals = attention.attention_fwd(q, k, v, mask, case.scale)
        if not backward:
            return {"y": y}
        names = ("dq", "dk", "dv")
        grads = attention.attention_bwd(case.scale, residuals, dy)
        return {"y": y} | dict(zip(names, grads, strict=True))

    return run


def chained(fn, calls):
    """`calls` calls of fn(x), each with q moved by nothing, but known only after the last call."""

    def run(x):
        def body(_, x):
            results = jax.tree.leaves(fn(x))
            nothing = sum(r.ravel()[0].astype(F32) for r in results) * 1e-30
            return x | {"q": x["q"] + nothing.astype(x["q"].dtype)}

        return lax.fori_loop(0, calls, body, x)["q"]

    return run


def compared(fn):
    """(results' relative errors, a sum over their bits) of fn(*args), given what is wanted."""

    def relative(a, b):
        a, b = a.astype(F32), b.astype(F32).reshape(a.shape)
        floor = jnp.where(jnp.any(b), 0.0, 1.0)  # a result that is all zero: absolute
        return jnp.linalg.norm((a - b).ravel()) / (jnp.linalg.norm(b.ravel()) + floor)

    def bits(a):
        kind = {2: jnp.uint16, 4: jnp.uint32}[a.dtype.itemsize]
        a = lax.bitcast_convert_type(a, kind).astype(jnp.uint32).ravel()
        return jnp.sum(a * (2 * lax.iota(jnp.uint32, a.size) + 1), dtype=jnp.uint32)

    def run(want, *args):
        got = fn(*args)
        return {k: relative(a, want[k]) for k, a in got.items()}, [*map(bits, got.values())]

    return run


# --------------------------------------------------------------------- running ---


class Clock:
    def __init__(self, budget):
        self.begin, self.budget = time.perf_counter(), budget

    def now(self):
        return time.perf_counter() - self.begin

    def over(self, share=1.0):
        return self.now() > share * self.budget


class Programs:
    """Programs compiled by several threads: {key: future of an executable}."""

    def __init__(self):
        self.pool = concurrent.futures.ThreadPoolExecutor(min(14, os.cpu_count() or 1))
        self.futures = {}

    def add(self, key, fn, *args, entry=None, exact=False, options=None):
        """Lowers fn here, where table and precision may be set, and compiles it in a thread."""
        if key in self.futures:
            return
        saved = dict(tiles.TABLE)
        if entry is not None:
            tiles.TABLE[entry[0]] = entry[1]
        try:
            with jax.default_matmul_precision("highest" if exact else "default"):
                lowered = jax.jit(fn).lower(*args)
            self.futures[key] = self.pool.submit(lowered.compile, options)
        except Exception as error:
            self.futures[key] = concurrent.futures.Future()
            self.futures[key].set_exception(error)
        finally:
            tiles.TABLE.update(saved)
            for extra in set(tiles.TABLE) - set(saved):
                del tiles.TABLE[extra]

    def get(self, key):
        return self.futures[key].result()


def median_ms(run, x, calls, series):
    jax.block_until_ready(run(x))
    times = []
    for _ in range(series):
        start = time.perf_counter()
        for _ in range(calls):
            out = run(x)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times) * 1e3


def parse(candidates):
    """[(kernel, Tile)] of "kernel:TOKENSxLATENTS/warps/stages/waves"."""
    out = []
    for text in candidates:
        match = re.fullmatch(r"(\w+):(\d+)x(\d+)/(\d+)/(\d+)/(\d+)", text)
        if match is None or match[1] not in KERNELS:
            raise ValueError(f"--candidates: expected one of {KERNELS}:64x128/4/3/8, got {text!r}")
        out.append((match[1], Tile(*map(int, match.groups()[1:]))))
    return out


def plan(case, choice=None):
    """[(kernel, table entry, Tile)]: for each kernel the table's choice, then the variants."""
    out, seen = [], set()
    shape = case.shape
    names = [k for k in KERNELS if k != "dq" or not tiles.fuses_dq(shape)]
    tables = [(k, tiles.TABLE[tiles.entry_for(k, shape)]) for k in names]
    for name, tile in tables + (variants(case) if choice is None else choice):
        entry = tiles.entry_for(name, shape)
        saved = tiles.TABLE[entry]
        tiles.TABLE[entry] = tile
        actual = tiles.tile_for(name, shape)  # clamped to the problem
        tiles.TABLE[entry] = saved
        if (name, actual) not in seen:
            seen.add((name, actual))
            out.append((name, entry, tile))
    return out


def show(tile):
    return f"{tile.tokens}x{tile.latents} {tile.warps}w {tile.stages}s {tile.waves}v"


def short(error):
    return " ".join(str(error).split())[:60] or type(error).__name__


class Study:
    """Checks and times; collects the lines of the report."""

    def __init__(self, clock, cases, features, smoke, choice, path):
        self.clock, self.cases, self.features, self.smoke = clock, cases, features, smoke
        self.choice, self.path = choice, path
        self.ragged = 70 if smoke else 66_001
        self.programs, self.rows, self.lines, self.wants = Programs(), [], [], {}

    def write(self):
        result = dict(device=jax.devices()[0].device_kind, jax=jax.__version__, rows=self.rows)
        self.path.write_text(json.dumps(result, indent=1))

    # -- compiling, the most important first; what is late is not compiled

    def lower(self):
        for case in self.cases:
            if self.clock.over(0.4):
                break
            self.lower_case(case)
        for case in self.features:
            if self.clock.over(0.5):
                break
            self.lower_reference(case)
            self.lower_whole_check(case)
        for future in self.programs.futures.values():
            future.exception()  # waits

    def lower_reference(self, case):
        args = jax.eval_shape(functools.partial(tokens, case))
        fn = functools.partial(expected, case)
        # float32 in IEEE arithmetic has nothing to choose from; choosing takes seconds
        gpu = jax.default_backend() == "gpu"
        options = {"xla_gpu_autotune_level": 0} if gpu else None
        self.programs.add(("reference", case), fn, *args, options=options)

    def lower_whole_check(self, case):
        args = jax.eval_shape(functools.partial(tokens, case))
        want = jax.eval_shape(functools.partial(expected, case), *args)
        fn = compared(attend(case, backward=True))
        self.programs.add(("whole", case), fn, want, *args, exact=case.exact)

    def lower_case(self, case):
        small, repeat = case.ragged(self.ragged), (lambda f: chained(f, CHAINED))
        self.lower_reference(small)
        x = jax.eval_shape(functools.partial(make_operands, case))
        self.programs.add(("operands", case), functools.partial(make_operands, case))
        y = jax.eval_shape(functools.partial(self.check_operands, small))
        for name, entry, tile in plan(case, self.choice):
            fn = functools.partial(kernel, name)
            self.programs.add(
                ("check", case, name, tile), compared(fn), y, operands(name, y),
                entry=(entry, tile),
            )  # fmt: skip
            self.programs.add(
                ("time", case, name, tile), repeat(fn) if case.small else fn, operands(name, x),
                entry=(entry, tile),
            )  # fmt: skip
        self.lower_whole_check(small)
        x = {name: x[name] for name in ("q", "k", "v", "dy")}
        for backward in (False, True):
            run = attend(case, backward)
            fn = lambda x, run=run: run(**x)
            self.programs.add(
                ("time", case, "whole", backward), repeat(fn) if case.small else fn, x
            )

    # -- running

    def check_operands(self, case):
        """Operands and results of every kernel from the reference."""
        q, k, v, dy, mask = tokens(case)
        x = expected(case, q, k, v, dy, mask)
        dtype = attention_backward.compute_dtype(k.dtype)
        x |= dict(q=q, k=k, v=v, dy=dy, y=x["y"].astype(k.dtype)) | handed_on(x, dtype)
        return x

    def want(self, case):
        """The same as arrays, computed once a problem."""
        if case not in self.wants:
            q, k, v, dy, mask = tokens(case)
            x = self.programs.get(("reference", case))(q, k, v, dy, mask)
            if "lse_n" in x:
                dtype = attention_backward.compute_dtype(k.dtype)
                made = dict(q=q, k=k, v=v, dy=dy, y=x["y"].astype(k.dtype)) | handed_on(x, dtype)
                self.wants = {case: (x, x | made)}  # one problem at a time
            else:
                self.wants = {case: (x, None)}
        return self.wants[case]

    def verdict(self, program, case, *args):
        """(is right, what to print) of two runs of a check."""
        (errs, bits), (_, again) = program(*args), program(*args)
        errs = {k: float(v) for k, v in errs.items()}
        worst = max(errs, key=lambda k: float("inf") if np.isnan(errs[k]) else errs[k])
        kind = "exact" if case.exact else case.dtype
        # a score of S carries a rounding error of S 2^-24 (or what its dots leave), which exp
        # makes relative
        tolerance = TOLERANCE[kind] * (1 if kind == "bfloat16" else max(1.0, case.scale))
        if any(int(a) != int(b) for a, b in zip(bits, again, strict=True)):
            return False, "two runs differ"
        return errs[worst] < tolerance, f"{worst} {errs[worst]:.0e}"  # False for nan

    def check_whole(self, case):
        try:
            want = self.want(case)[0]
            program = self.programs.get(("whole", case))
            right, note = self.verdict(program, case, want, *tokens(case))
        except KeyError:
            right, note = None, "no time left"
        except Exception as error:
            right, note = False, f"failed: {short(error)}"
        state = {True: "ok", False: "WRONG", None: "-"}[right]
        self.lines.append(f"{state:5s} {case.name()}: {note}")
        self.rows.append(dict(check=case.name(), state=state, note=note))
        print(self.lines[-1], flush=True)

    def measure(self, case, what, program, x):
        if self.clock.over():
            return None
        if case.small:
            return median_ms(program, x, 1, 1 if self.smoke else 7) / CHAINED
        return median_ms(program, x, *((1, 1) if self.smoke else (6, 5)))

    def run_kernel(self, case, x, name, tile, first):
        row = dict(case=case.name(), kernel=name, tile=show(tile), table=first, ms=None, note="")
        small = case.ragged(self.ragged)
        try:
            check = self.programs.get(("check", case, name, tile))
            program = self.programs.get(("time", case, name, tile))
            if self.clock.over():
                raise KeyError
            made = self.want(small)[1]
            right, row["note"] = self.verdict(check, small, made, operands(name, made))
            if right:
                row["ms"] = self.measure(case, name, program, operands(name, x))
            else:
                row["note"] = "WRONG " + row["note"]
        except KeyError:
            row["note"] = "no time left"
        except Exception as error:  # out of shared memory, say: an answer, not a failure
            row["note"] = short(error)
        self.rows.append(row)
        self.write()
        print(case.name(), name, row["tile"], row["ms"], row["note"], flush=True)

    def run_case(self, case):
        if ("operands", case) not in self.programs.futures:
            self.lines.append(f"-     {case.name()}: no time left")
            return
        try:
            x = self.programs.get(("operands", case))()
        except Exception as error:
            self.lines.append(f"WRONG {case.name()}: operands: {short(error)}")
            return
        seen = set()
        for name, _, tile in plan(case, self.choice):
            self.run_kernel(case, x, name, tile, name not in seen)
            seen.add(name)
        x = {name: x[name] for name in ("q", "k", "v", "dy")}
        for backward in (False, True):
            label = "forward+backward" if backward else "forward"
            row = dict(case=case.name(), kernel=label, tile="", table=True, note="")
            try:
                program = self.programs.get(("time", case, "whole", backward))
                row["ms"] = self.measure(case, label, program, x)
            except Exception as error:
                row |= dict(ms=None, note=short(error))
            self.rows.append(row)

    def report(self):
        """One line a kernel, variants side by side as `tile ms`, fastest first, * the table's."""
        out = ["# checks of the whole operator, forward and backward", *self.lines]
        out += ["", "# ms a call, fastest first: tokens x latents, warps, stages, waVes; * table"]
        timed = [r for r in self.rows if "kernel" in r]
        for case in dict.fromkeys(r["case"] for r in timed):
            out.append(f"## {case}")
            mine = [r for r in timed if r["case"] == case]
            for name in dict.fromkeys(r["kernel"] for r in mine):
                rows = [r for r in mine if r["kernel"] == name]
                good = sorted((r for r in rows if r["ms"] is not None), key=lambda r: r["ms"])
                cells = [f"{r['tile']}{'*' * r['table']} {r['ms']:.4f}" for r in good]
                out += wrap(f"{name:7s}", cells)
                out += [f"  {r['tile']}: {r['note']}"[:118] for r in rows if r["ms"] is None]
        return out


def wrap(head, cells, width=118):
    """Cells after a head, in lines of at most `width`."""
    lines = [head]
    for cell in cells:
        if len(lines[-1]) + len(cell) + 3 > width:
            lines.append(" " * len(head))
        lines[-1] += " | " + cell.strip()
    return lines


def smoke_sizes():
    """Sizes that interpret mode can walk, and few programs."""
    tiles.multiprocessors = lambda: 1
    cases = [Case(4200, 32, 20, "bfloat16", h=2), Case(60, 32, 20, "float32", h=4, b=2),
             Case(4200, 16, 300, "bfloat16", h=1)]  # fmt: skip
    features = [Case(130, 32, 20, "float32", h=2, b=2, masked=True),
                Case(130, 16, 20, "bfloat16", h=2, scale=30.0)]  # fmt: skip
    return cases, features


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=130.0, help="then stop timing")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, for interpret mode")
    parser.add_argument("--case", default="128,512,bfloat16", help="C,M,dtype of the candidates")
    parser.add_argument("--candidates", nargs="+", help="kernel:TOKENSxLATENTS/warps/stages/waves")
    parser.add_argument("--out", default=os.environ.get("OUT", "."), help="folder")
    args = parser.parse_args()
    choice = parse(args.candidates) if args.candidates else None
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    clock = Clock(args.seconds)
    device = jax.devices()[0]
    print(f"# {device.device_kind}, jax {jax.__version__}", flush=True)
    cases, features = smoke_sizes() if args.smoke else (CASES, FEATURES)
    if args.smoke:
        global CHAINED
        CHAINED = 2
    if choice is not None:
        c, m, dtype = args.case.split(",")
        n = 4200 if args.smoke else LARGE
        cases, features = [Case(n, int(c), int(m), dtype)], []
    study = Study(clock, cases, features, args.smoke, choice, out / "tune_attention.json")
    study.lower()
    print(f"# {len(study.programs.futures)} programs compiled in {clock.now():.0f} s", flush=True)
    for case in cases:
        study.check_whole(case.ragged(study.ragged))
        study.run_case(case)
        print(f"# {clock.now():.0f} s", flush=True)
    for case in features:
        study.check_whole(case)
    study.write()
    print("", *study.report(), f"# {clock.now():.0f} s", sep="\n")


if __name__ == "__main__":
    main()
