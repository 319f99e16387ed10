"""Checks and times the residual MLP kernels over a handful of block sizes, on one NVIDIA GPU.

    OUT=FOLDER python -m experiments.tune_mlp              under two minutes on an H100
    python -m experiments.tune_mlp --seconds 60            stop timing after 60 s
    python -m experiments.tune_mlp --case 128,bfloat16 --candidates "1:128x8w/132p/1r4b" ...
        only these plans, one a quoted word, written as the table at the end writes them, beside
        the table's; with layers: in front segments of the backward (0: the norm's), else tiles of
        the forward; with --norm LayerNorm and skip are part of it
    python -m experiments.tune_mlp --tokens 300 ...        fewer tokens, for interpret mode

Every variant is first compared, by relative norm, with float32 autodiff at the highest matmul
precision (out, dx, each dW and db); a variant that is wrong is not timed. Times are medians per
call, several calls chained in one jit, synchronised. Writes tune_mlp.json to the folder --out
($OUT if not given) after every measurement.
"""

import argparse
import concurrent.futures
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

from flare_jax.ops.fused import mlp
from flare_jax.ops.fused.mlp_plans import Plan, Tile, plan_for, streamed

LARGE, SMALL, RAGGED = 1_024_000, 1944, 66_001
BF16, F32 = jnp.bfloat16, jnp.float32
TOLERANCE = {"native": 2e-2, "bf16x3": 2e-4, "ieee": 1e-5}


def forward(base, *tiles):
    return [Plan(tile, base.backward, base.norm) for tile in tiles]


def backward(base, *segments):
    return [Plan(base.forward, s, base.norm) for s in segments]


def variants():
    """[(C, dtype, N, what is timed, Plan)]: the table's plan first."""
    out = []

    def add(width, dtype, n, forwards=(), backwards=()):
        base = plan_for(n, width, "native" if dtype == BF16 else "bf16x3")
        out.extend((width, dtype, n, "forward", p) for p in [base, *forward(base, *forwards)])
        out.extend((width, dtype, n, "both", p) for p in [base, *backward(base, *backwards)])

    half = functools.partial(Tile, bias=False)
    add(
        64, BF16, LARGE,
        [half(64, 4, 264)],
        [((5, half(128, 8, 132)),), ((5, Tile(128, 8, 132, 1)),), ((5, half(64, 4, 132)),),
         ((5, streamed(128, 8, 132)),), ((3, half(64, 4, 264)), (2, half(64, 4, 264))),
         ((3, Tile(64, 4, 264, 1)), (2, Tile(64, 4, 264, 1)))],
    )  # fmt: skip
    for dtype in (F32, BF16):
        few = [streamed(16, 4, 132), streamed(32, 8, 132)]
        add(64, dtype, SMALL, few, [((5, tile),) for tile in few])
    one = half(128, 8, 132, 1)
    add(
        128, BF16, LARGE,
        [half(128, 8, 132, 1), half(64, 4, 132), streamed(128, 8, 264), streamed(64, 4, 264)],
        [((1, streamed(128, 8, 132)),), ((2, streamed(128, 8, 132)),),
         ((1, streamed(128, 8, 132)), (1, streamed(128, 8, 132)), (1, one)),
         ((1, streamed(64, 4, 264)),), ((2, streamed(64, 8, 132)),)],
    )  # fmt: skip
    add(
        64, F32, LARGE,
        [half(64, 4, 132), half(128, 8, 132)],
        [((1, Tile(64, 4, 264)),), ((1, Tile(128, 8, 132)),), ((2, Tile(64, 4, 132)),)],
    )  # fmt: skip
    add(128, F32, LARGE, [streamed(128, 8, 132)], [((1, streamed(64, 8, 132)),)])
    return out


TILE = re.compile(r"(?:(\d+):)?(\d+)x(\d+)w/(\d+)p/(\d+)(s|r\d+)?(b)?")


def parse(text):
    """(layers or None, Tile) of each part of a plan as `describe` writes it."""
    out = []
    for part in text.split():
        match = TILE.fullmatch(part)
        if match is None:
            raise ValueError(
                f"--candidates: expected layers:TILExWARPSw/PROGRAMSp/..., got {part!r}"
            )
        layers, tile, warps, programs, stages, kept, bias = match.groups()
        resident = 99 if kept is None else 0 if kept == "s" else int(kept[1:])
        sizes = map(int, (tile, warps, programs, stages))
        out.append((layers and int(layers), Tile(*sizes, resident=resident, bias=bias is None)))
    return out


def chosen(case, candidates, n):
    """As `variants`: the plans named on the command line for one case "C,dtype"."""
    width, name = case.split(",")
    width, dtype = int(width), jnp.dtype(name)
    base = plan_for(n, width, "native" if dtype == BF16 else "bf16x3")
    plans = {"forward": [base], "both": [base]}
    for parts in map(parse, candidates):
        if parts[0][0] is None:
            plans["forward"].append(Plan(parts[0][1], base.backward, base.norm))
        else:
            norm = next((tile for layers, tile in parts if layers == 0), None)
            segments = tuple(part for part in parts if part[0])
            plans["both"].append(Plan(base.forward, segments, norm))
    return [(width, dtype, n, what, plan) for what in plans for plan in dict.fromkeys(plans[what])]


# ------------------------------------------------------------------------- work ---


def reference(x, layers, norm=None, skip=False):
    raw = x
    if norm is not None:
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        x = ((x - mean) * jax.lax.rsqrt(var + 1e-5) * norm[0] + norm[1]).astype(raw.dtype)
    for w, b in layers[:-1]:
        x = x + jax.nn.gelu(x @ w.astype(x.dtype) + b.astype(x.dtype))
    w, b = layers[-1]
    return x + x @ w.astype(x.dtype) + b.astype(x.dtype) + (raw if skip else 0)


def inputs(n, width, dtype, scale=1.0, seed=0):
    keys = iter(jax.random.split(jax.random.key(seed), 14))
    x, dy = (jax.random.normal(next(keys), (n, width)).astype(dtype) for _ in range(2))
    layers = tuple(
        (
            scale * jax.random.normal(next(keys), (width, width)) / width**0.5,
            0.3 * jax.random.normal(next(keys), (width,)),
        )
        for _ in range(5)
    )
    norm = tuple(c + 0.2 * jax.random.normal(next(keys), (width,)) for c in (1, 0))
    return x, layers, norm, dy


def value_and_grads(f, dy, *args):
    out, vjp = jax.vjp(f, *args)
    dx, dlayers, *rest = vjp(dy)
    named = {"out": out, "dx": dx}
    for i, (dw, db) in enumerate(dlayers):
        named |= {f"dW{i}": dw, f"db{i}": db}
    return named | {f"dnorm{i}": d for i, d in enumerate(jax.tree.leaves(rest))}


def errors(got, want):
    def relative(a, b):
        a, b = a.astype(F32), b.astype(F32)
        return jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel())

    return {k: float(v) for k, v in jax.jit(
        lambda a, b: {k: relative(a[k], b[k]) for k in b})(got, want).items()}  # fmt: skip


def passes(errs, tolerance):
    return all(e < tolerance for e in errs.values())  # False for nan


def repeated(f, what, calls):
    """`calls` calls of f, or of f and its derivative, each on what the last one returned."""

    def once(x, weights):
        if what == "forward":
            return f(x, *weights)
        out, vjp = jax.vjp(f, x, *weights)
        dx, *grads = vjp(out)
        # with the weights' gradients, which would not be computed otherwise
        return dx + sum(g.ravel()[0] for g in jax.tree.leaves(grads)).astype(dx.dtype) * 0

    return lambda x, *weights: jax.lax.fori_loop(0, calls, lambda _, x: once(x, weights), x)


def median_ms(compiled, args, calls, repeats=9, queued=5):
    """Of a call; several programs are queued, so that the host's share does not show."""
    jax.block_until_ready(compiled(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready([compiled(*args) for _ in range(queued)])
        times.append(time.perf_counter() - start)
    return statistics.median(times) / (calls * queued) * 1e3


def describe(plan, what):
    def tile(t):
        flags = ("" if t.resident > 4 else f"r{t.resident}" if t.resident else "s") + (
            "" if t.bias else "b"
        )
        return f"{t.tile}x{t.warps}w/{t.programs}p/{t.stages}{flags}"

    if what == "forward":
        return tile(plan.forward)
    norm = [(0, plan.norm)] if plan.norm else []
    return " ".join(f"{n}:{tile(t)}" for n, t in [*plan.backward, *norm])


def compile_all(jobs):
    """{key: executable or the exception}, compiled by several threads."""

    def one(job):
        key, fn, args = job
        try:
            return key, jax.jit(fn).lower(*args).compile()
        except Exception as error:  # out of shared memory, say: an answer, not a failure
            return key, error

    with concurrent.futures.ThreadPoolExecutor(min(12, os.cpu_count() or 1)) as pool:
        return dict(pool.map(one, jobs))


def kernel(plan, **kwargs):
    return lambda x, layers, *norm: mlp.residual_mlp(
        x, layers, plan=plan, norm=norm[0] if norm else None, **kwargs
    )


def check_features(report):
    """LayerNorm, skip, pair, vmap and IEEE float32 with the table's plans, at a ragged N."""
    for dtype, n in ((BF16, 3001), (F32, 3001), (F32, 1944)):
        x, layers, norm, dy = inputs(n, 64, dtype)
        want = jax.jit(functools.partial(value_and_grads, reference_f32))(
            dy.astype(F32), x.astype(F32), layers, norm
        )
        precisions = ("native",) if dtype == BF16 else ("bf16x3", "ieee")
        for precision in precisions:
            name = f"norm+skip C=64 N={n} {precision}"
            try:
                f = kernel(None, skip=True, precision=precision)
                got = jax.jit(functools.partial(value_and_grads, f))(dy, x, layers, norm)
                errs = errors(got, want)
            except Exception as error:  # report it, go on
                errs = {f"failed: {str(error)[:150]}": float("nan")}
            report(name, errs, TOLERANCE[precision])
    x, layers, norm, dy = inputs(3001, 64, BF16)
    _, other, _, _ = inputs(3001, 64, BF16, seed=1)

    def pair(x, both, norm):
        return sum(o.astype(F32) for o in mlp.residual_mlps(x, both, norm=norm))

    def two(x, both, norm):
        return sum(mlp.residual_mlp(x, w, norm=norm).astype(F32) for w in both)

    run = lambda f: jax.jit(jax.grad(lambda *a: jnp.sum(f(*a) * dy.astype(F32)), (0, 1)))  # noqa: E731
    got, want = (dict(enumerate(jax.tree.leaves(run(f)(x, (layers, other), norm))))
                 for f in (pair, two))  # fmt: skip
    report("pair against two", errors(got, want), 2e-2)
    stacked = jax.tree.map(lambda *a: jnp.stack(a), (x, layers), (x[::-1], other))
    got = jax.jit(jax.vmap(lambda x, w: mlp.residual_mlp(x, w)))(*stacked)
    want = jnp.stack([mlp.residual_mlp(x, layers), mlp.residual_mlp(x[::-1], other)])
    report("vmap against loop", errors({"out": got}, {"out": want}), 1e-6)


def reference_f32(x, layers, norm):
    with jax.default_matmul_precision("highest"):
        return reference(x, layers, norm, skip=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=105.0, help="then stop timing")
    parser.add_argument("--case", default="128,bfloat16", help="C,dtype of the candidates")
    parser.add_argument("--candidates", nargs="+", default=[], help="plans")
    parser.add_argument("--norm", action="store_true", help="with LayerNorm and skip")
    parser.add_argument("--tokens", type=int, default=LARGE, help="of the candidates")
    parser.add_argument("--out", default=os.environ.get("OUT", "."), help="folder")
    args = parser.parse_args()
    named = bool(args.candidates)
    todo = chosen(args.case, args.candidates, args.tokens) if named else variants()
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    device = jax.devices()[0]
    lines, rows = [], []
    print(f"# {device.device_kind}, jax {jax.__version__}", flush=True)

    def report(name, errs, tolerance):
        worst = max(errs, key=lambda k: float("inf") if np.isnan(errs[k]) else errs[k])
        state = "ok" if passes(errs, tolerance) else "WRONG"
        lines.append(f"{state:5s} {name}: worst {worst} {errs[worst]:.1e}")
        print(lines[-1], flush=True)
        rows.append(dict(check=name, state=state, errors=errs))

    def write():
        result = dict(device=device.device_kind, jax=jax.__version__, rows=rows)
        (out / "tune_mlp.json").write_text(json.dumps(result, indent=1))

    jobs = []

    def problem(n, width, dtype, **options):
        x, layers, norm, dy = inputs(n, width, dtype, **options)
        return dy, x, layers, *([norm] if args.norm else [])

    for i, (width, dtype, n, what, plan) in enumerate(todo):
        calls = 4 if n == LARGE else 20
        f = kernel(plan, skip=args.norm)
        _, *shapes = jax.eval_shape(functools.partial(problem, n, width, dtype))
        jobs.append((("time", i), repeated(f, what, calls), shapes))
        small = min(n, RAGGED)
        shapes = jax.eval_shape(functools.partial(problem, small, width, dtype))
        if (("check", plan, width, dtype)) not in [j[0] for j in jobs]:
            fn = functools.partial(value_and_grads, f)
            jobs.append((("check", plan, width, dtype), fn, shapes))
    compiled = compile_all(jobs)
    print(f"# {len(jobs)} programs compiled in {time.perf_counter() - begin:.0f} s", flush=True)

    wants, table = {}, []
    for i, (width, dtype, n, what, plan) in enumerate(todo):
        name = f"C={width} {jnp.dtype(dtype).name} N={n} {what} {describe(plan, what)}"
        check, timed = compiled["check", plan, width, dtype], compiled["time", i]
        failed = next((c for c in (check, timed) if isinstance(c, Exception)), None)
        if failed is not None:
            table.append((name, None, f"not compiled: {str(failed)[:110]}"))
            continue
        if time.perf_counter() - begin > args.seconds:
            table.append((name, None, "no time left"))
            continue
        small = min(n, RAGGED)
        given = problem(small, width, dtype)
        if (width, dtype, small) not in wants:
            plain = functools.partial(reference, skip=args.norm)
            exact = [x.astype(F32) for x in given[:2]]
            with jax.default_matmul_precision("highest"):
                want = jax.jit(functools.partial(value_and_grads, plain))(*exact, *given[2:])
            wants[width, dtype, small] = want
        errs = errors(check(*given), wants[width, dtype, small])
        precision = "native" if dtype == BF16 else "bf16x3"
        if not passes(errs, TOLERANCE[precision]):
            report(name, errs, TOLERANCE[precision])
            table.append((name, None, "WRONG"))
            continue
        ms = median_ms(timed, problem(n, width, dtype, scale=0.1)[1:], 4 if n == LARGE else 20)
        table.append((name, ms, f"worst error {max(errs.values()):.1e}"))
        rows.append(dict(width=width, dtype=jnp.dtype(dtype).name, n=n, what=what,
                         plan=describe(plan, what), ms=ms, errors=errs))  # fmt: skip
        print(name, f"{ms:.3f} ms", flush=True)
        write()
    try:
        if not named:
            check_features(report)
    except Exception as error:
        lines.append(f"WRONG features: {error}"[:300])
    write()

    print("\n# checks", *lines, sep="\n")
    print(
        "\n# ms a call (tile x warps / programs / stages; s: weights streamed, rK: but K layers')"
    )
    print("# b: biases streamed); fastest first")
    for name, ms, note in sorted(table, key=lambda r: (r[0].split()[:4], r[1] or 1e9)):
        print(f"{name:88s} {'-' if ms is None else format(ms, '.4f'):>8s}  {note}")
    print(f"# {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
