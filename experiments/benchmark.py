"""Time and memory of every implementation of the operator, beside two PyTorch SDPA calls.

    python -m experiments.benchmark --out experiments/results/operator.json

Each row is checked against the float32 reference first (relative L2 error of y, dq, dk, dv, the
largest is printed); a row that is wrong is not timed. Times are medians of synchronised calls
after warm-up; memory is what the compiled program needs beyond its arguments (for PyTorch, the
peak above them).
"""

import argparse
import datetime
import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs room too

import jax
import jax.numpy as jnp
import numpy as np

from flare_jax.ops.flare import DEFAULT, flare_attention

SIZES = ((64, 64), (128, 128), (128, 512), (128, 2048))  # (C, M)
TOLERANCE = {"bfloat16": 2e-2, "float32": 5e-3}  # float32 products may be TF32


def seconds(run, repeats: int = 20) -> float:
    """Median time of `run()`, which returns when the device is done."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def inputs(n: int, c: int, h: int, m: int, dtype: str):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((m, h, c // h), *[(1, n, h, c // h)] * 3)
    return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]


def functions(implementation: str):
    """Jitted forward, and forward with backward, of one implementation."""
    f = lambda q, k, v: flare_attention(q, k, v, implementation=implementation)

    def both(q, k, v, dy):
        y, pullback = jax.vjp(f, q, k, v)
        return y, *pullback(dy)

    return jax.jit(lambda q, k, v, dy: f(q, k, v)), jax.jit(both)


def errors(results, expected) -> dict[str, float]:
    relative = lambda x, y: float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y))
    flat = lambda x: x.astype(jnp.float32).ravel()
    names = ("y", "dq", "dk", "dv")
    pairs = zip(names, results, expected, strict=True)
    return {name: relative(flat(x), flat(y)) for name, x, y in pairs}


def jax_row(implementation: str, arrays, expected, tolerance: float) -> dict:
    """Error, times and memory of one implementation, or the reason why it does not run."""
    forward, both = functions(implementation)
    try:
        found = errors(both(*arrays), expected)
    except NotImplementedError as reason:
        return {"skipped": str(reason)}
    except Exception as error:  # out of memory, or a library that refuses a shape
        return {"skipped": f"{type(error).__name__}: {str(error)[:200]}"}
    row = {"error": found}
    if not max(found.values()) <= tolerance:  # NaN is wrong too
        return row | {"skipped": "wrong"}
    for name, f in (("forward", forward), ("both", both)):
        memory = f.lower(*arrays).compile().memory_analysis()
        row[f"{name}_ms"] = 1e3 * seconds(lambda f=f: jax.block_until_ready(f(*arrays)))
        row[f"{name}_bytes"] = memory.temp_size_in_bytes + memory.output_size_in_bytes
    return row


def torch_row(arrays, expected, tolerance: float) -> dict:
    """The published formulation: two `scaled_dot_product_attention` calls in PyTorch."""
    try:
        import torch
        from torch.nn.functional import scaled_dot_product_attention as sdpa
    except ImportError:
        return {"skipped": "torch is not installed"}
    if not torch.cuda.is_available():
        return {"skipped": "torch sees no GPU"}
    to_torch = lambda x: torch.from_numpy(np.array(x.astype(jnp.float32))).cuda()
    dtype = getattr(torch, arrays[0].dtype.name)
    q, k, v, dy = (to_torch(x).to(dtype) for x in arrays)
    q = q.permute(1, 0, 2)[None].contiguous().requires_grad_()  # [1, H, M, D]
    # As a model would hand them over: a projection's [B, N, C], seen heads first.
    k, v = (x.transpose(1, 2).requires_grad_() for x in (k, v))
    dy = dy.transpose(1, 2)

    def forward():
        y = sdpa(k, q, sdpa(q, k, v, scale=1.0), scale=1.0)
        torch.cuda.synchronize()
        return y

    def both():
        y = sdpa(k, q, sdpa(q, k, v, scale=1.0), scale=1.0)
        gradients = torch.autograd.grad(y, (q, k, v), dy)
        torch.cuda.synchronize()
        return y, *gradients

    y, dq, dk, dv = both()
    back = lambda x: jnp.asarray(x.detach().float().cpu().numpy())
    tokens = lambda x: back(x.transpose(1, 2))
    found = errors((tokens(y), back(dq[0].permute(1, 0, 2)), tokens(dk), tokens(dv)), expected)
    row = {"error": found}
    if not max(found.values()) <= tolerance:
        return row | {"skipped": "wrong"}
    for name, f in (("forward", forward), ("both", both)):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        row[f"{name}_ms"] = 1e3 * seconds(f)
        row[f"{name}_bytes"] = torch.cuda.max_memory_allocated() - before
    return row


def operator(n: int, sizes, dtypes, heads: int) -> list[dict]:
    """One row for each size, dtype and implementation."""
    rows = []
    for (c, m), dtype in ((s, d) for s in sizes for d in dtypes):
        arrays = inputs(n, c, heads, m, dtype)
        dense = "reference" if m * n * heads <= 2**31 else "xla"  # the reference is O(M N)
        with jax.default_matmul_precision("highest"):
            _, both = functions(dense)
            expected = [x.astype(jnp.float32) for x in both(*[x.astype("float32") for x in arrays])]
        case = {"C": c, "M": m, "H": heads, "N": n, "dtype": dtype}
        for name in DEFAULT:
            row = jax_row(name, arrays, expected, TOLERANCE[dtype])
            rows.append(case | {"implementation": name} | row)
        row = torch_row(arrays, expected, TOLERANCE[dtype])
        rows.append(case | {"implementation": "two torch SDPA calls"} | row)
    return rows


def show(rows: list[dict]) -> None:
    head = ("implementation", "dtype", "C", "M", "error", "forward ms", "both ms", "both GB")
    print("{:22s} {:9s} {:>4s} {:>5s} {:>9s} {:>11s} {:>9s} {:>8s}".format(*head))
    for r in rows:
        error = f"{max(r['error'].values()):.1e}" if "error" in r else ""
        line = f"{r['implementation']:22s} {r['dtype']:9s} {r['C']:4d} {r['M']:5d} {error:>9s} "
        if "skipped" in r:
            print(line + r["skipped"][:70])
            continue
        memory = r["both_bytes"] / 1e9
        print(line + f"{r['forward_ms']:11.3f} {r['both_ms']:9.3f} {memory:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_024_000)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--sizes", nargs="*", default=[f"{c},{m}" for c, m in SIZES], help="C,M")
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    sizes = [tuple(map(int, s.split(","))) for s in args.sizes]
    rows = operator(args.tokens, sizes, args.dtypes, args.heads)
    show(rows)
    if args.out:
        record = {
            "command": "python -m experiments.benchmark " + " ".join(sys.argv[1:]),
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "date": datetime.date.today().isoformat(),
            "precision": "float32 products by JAX's default (TF32 on NVIDIA)",
            "rows": rows,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
