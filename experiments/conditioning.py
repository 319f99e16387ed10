"""Errors of every implementation and precision of the operator, and how well it is conditioned.

    python -m experiments.conditioning                            a few minutes on two CPU cores
    python -m experiments.conditioning --large --out experiments/results/conditioning_gpu.json
    python -m experiments.conditioning --smoke                    a few tiny cases

Cases change one thing of a base case at a time (size of q and k, head width, scale, M, N), or are
made to break a naive softmax. For y and for the gradients dq, dk, dv of sum(y dy):

- `error`: relative L2 distance to the float64 result for the same rounded q, k, v, dy. That result
  is the dense one, or the chunked one (equal to it to 1e-12 in the tests) where dense is too large.
- `condition`: relative L2 change in float64 per relative change of the entries of q, k, v and dy,
  for random signs; the larger of two draws. Rounding the inputs alone does u times this, with u the
  unit round-off of the precision.
- `backward error`: error / (condition u): by how many rounding steps the inputs would have to be
  moved to explain the error. About 1 or less is all that can be asked for; large numbers are the
  implementation's own loss.

`norm` is the size of y and of each gradient: where a softmax is saturated dq and dk are differences
of nearly equal numbers, and an error that is large relative to them is still round-off of dy.

`naive` is softmax without subtracting a maximum, the formula as written: it shows what a case
breaks. TF32 needs an NVIDIA GPU; its row runs the same float32 inputs, multiplied as
`jax.default_matmul_precision("tensorfloat32")` has it. `--precision tf32` of training is not that:
it takes three bfloat16 products, as `fused` does here too. Records call this row "tf32".
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.benchmark.measure import Program
from experiments.records import command, write
from flare_jax.ops import flare, reference
from flare_jax.ops.flare import IMPLEMENTATIONS, flare_attention
from flare_jax.plots import plt

NAMES = ("y", "dq", "dk", "dv")
GRADIENTS = NAMES[1:]
DENSE = 2**24  # scores; above, the float64 result is computed in tiles
HEADS, STEP = 2, 1e-6  # heads of every case; relative step of the condition number
# precision: (dtype of the arrays, matmul precision, unit round-off)
PRECISIONS = {
    "float32": ("float32", "highest", 2.0**-24),
    "tf32": ("float32", "tensorfloat32", 2.0**-11),
    "bfloat16": ("bfloat16", "highest", 2.0**-9),
    "float16": ("float16", "highest", 2.0**-11),
}
LABELS = {"tf32": "TF32"}  # in figures


@dataclasses.dataclass(frozen=True)
class Case:
    """One set of inputs: q and k standard normal times `size`, v and dy standard normal."""

    sweep: str  # which table it belongs to
    name: str
    n: int = 4096  # tokens
    m: int = 64  # latents a head
    d: int = 8  # head width
    scale: float = 1.0
    size: float = 1.0
    kind: str = "normal"  # see `BREAKERS`

    def arrays(self) -> tuple:
        """q, k, v, dy in float64 and the mask."""
        rng = np.random.default_rng(0)
        shapes = ((self.m, HEADS, self.d), *[(1, self.n, HEADS, self.d)] * 3)
        q, k, v, dy = (rng.standard_normal(shape) for shape in shapes)
        return BREAKERS[self.kind](self.size * q, self.size * k, v, dy)

    @property
    def dense(self) -> bool:
        """Whether all scores fit at once."""
        return self.n * self.m * HEADS <= DENSE


def offset(q, k, v, dy):
    """All scores are 400 higher: exp overflows."""
    q[..., 0], k[..., 0] = 4.0, 100.0
    return q, k, v, dy, None


def spread(q, k, v, dy):
    """Latents whose log-sum-exps lie between about -300 and 300."""
    q[..., 0] = np.linspace(-30, 30, len(q))[:, None]
    k[..., 0] = 10.0
    return q, k, v, dy, None


def tokens_spread(q, k, v, dy):
    """Tokens whose log-sum-exps over latents lie between about -300 and 300."""
    k[..., 0] = np.linspace(-30, 30, k.shape[1])[:, None]
    q[..., 0] = 10.0
    return q, k, v, dy, None


def dominating(q, k, v, dy):
    """One token has a score about 40 above all others, for every latent."""
    q[..., 0] = 4.0
    k[:, 17, :, 0] += 10.0
    return q, k, v, dy, None


def masked(q, k, v, dy):
    """Half the tokens are masked and hold NaN."""
    mask = np.arange(k.shape[1])[None] % 2 == 0
    k, v, dy = (np.where(mask[:, :, None, None], x, np.nan) for x in (k, v, dy))
    return q, k, v, dy, mask


def equal(q, k, v, dy):
    """All scores are zero: every latent is the mean of all tokens."""
    return 0 * q, k, v, dy, None


BREAKERS = {
    "normal": lambda q, k, v, dy: (q, k, v, dy, None),
    "offset": offset,
    "spread": spread,
    "spread tokens": tokens_spread,
    "dominating": dominating,
    "masked": masked,
    "equal": equal,
}


def cases(large: bool, smoke: bool) -> list[Case]:
    """The base case varied in one thing at a time, and the breakers."""
    if smoke:
        small = dict(n=96, m=8, d=4)
        return [Case("inputs", kind, kind=kind, **small) for kind in ("normal", "offset", "masked")]
    tokens = (1024, 4096, 16384, 131072) + ((1_000_000,) if large else ())
    return [
        *(Case("size of q, k", f"{x:g}", size=x) for x in (0.1, 0.3, 1.0, 3.0, 10.0)),
        *(Case("head width D", f"{d}, scale 1", d=d) for d in (4, 16, 32, 64)),
        *(Case("head width D", f"{d}, scale D^-1/2", d=d, scale=d**-0.5) for d in (16, 64)),
        *(Case("scale", f"{x:g}", scale=x) for x in (0.1, 0.3, 3.0)),
        *(Case("latents M", str(m), m=m) for m in (16, 256, 1024)),
        *(Case("tokens N", f"{n:,}", n=n) for n in tokens),
        *(Case("inputs", kind, kind=kind) for kind in BREAKERS if kind != "normal"),
    ]


# ----------------------------------------------------------------------- one case ---


def naive(q, k, v, mask, scale):
    """exp(S) over its sums, nothing subtracted."""
    k, v = reference.drop(mask, k, v)
    e = jnp.exp(reference.scores(q, k, scale))  # [B, H, M, N]
    real = e if mask is None else jnp.where(mask[:, None, None], e, 0)
    z = jnp.einsum("bhmn,bnhd->bmhd", real / real.sum(-1, keepdims=True), v)
    y = jnp.einsum("bhmn,bmhd->bnhd", e / e.sum(2, keepdims=True), z)
    return reference.drop(mask, y.astype(k.dtype))[0]


def both_ways(name: str, scale: float):
    """`(q, k, v, dy[, mask]) -> y, dq, dk, dv` of one implementation."""

    def f(q, k, v, dy, mask=None):
        if name == "naive":
            operator = lambda q, k, v: naive(q, k, v, mask, scale)
        else:
            options = dict(mask=mask, scale=scale, implementation=name)
            operator = lambda q, k, v: flare_attention(q, k, v, **options)
        y, pullback = jax.vjp(operator, q, k, v)
        return y, *pullback(dy)

    return f


def programs(case: Case) -> dict:
    """{(precision, implementation): Program, or the reason why there is none}."""
    found = {}
    for precision in PRECISIONS:
        for name in (*IMPLEMENTATIONS, "naive"):
            if (case.dense or name not in ("reference", "naive")) and (
                precision != "tf32" or jax.default_backend() == "gpu"
            ):
                size = case.n, case.m, case.d, case.kind == "masked"
                found[precision, name] = program(name, precision, case.scale, *size)
    return found


@functools.cache  # cases of one size share a compiled program
def program(name: str, precision: str, scale: float, n: int, m: int, d: int, masked: bool):
    """The Program of one implementation, or the reason why there is none."""
    dtype, matmul, _ = PRECISIONS[precision]
    shapes = [jax.ShapeDtypeStruct(s, dtype) for s in ((m, HEADS, d), *[(1, n, HEADS, d)] * 3)]
    mask = jax.ShapeDtypeStruct((1, n), bool) if masked else None
    try:
        if name != "naive":
            flare.pick(name, *shapes[:3], mask)
    except NotImplementedError as reason:
        return str(reason)
    return Program(both_ways(name, scale), *shapes, *[mask] * masked, precision=matmul)


def exact(case: Case, *arrays) -> list[np.ndarray]:
    """y, dq, dk, dv in float64."""
    f = exact_program("reference" if case.dense else "xla", case.scale)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in arrays[:4]]
        return [np.asarray(x) for x in f(*wide, *(x for x in arrays[4:] if x is not None))]


@functools.cache
def exact_program(name: str, scale: float):
    """Jitted once, so that cases of one shape compile once."""
    return jax.jit(both_ways(name, scale))


def relative(x, want) -> float:
    """||x - want|| / ||want||; 0 where both are zero; NaN if x is not finite."""
    x = np.asarray(x, np.float64)
    if not np.isfinite(x).all():
        return float("nan")
    distance, size = np.linalg.norm(x - want), np.linalg.norm(want)
    return float(distance / size) if size else float("inf") if distance else 0.0


def condition(case: Case, arrays) -> dict:
    """Relative change of y, dq, dk, dv per relative change of the entries of q, k, v, dy."""
    rng = np.random.default_rng(1)
    base, found = exact(case, *arrays), dict.fromkeys(NAMES, 0.0)
    wide = [np.asarray(x, np.float64) for x in arrays[:4]]
    for _ in range(2):
        moved = [x * (1 + STEP * rng.choice([-1.0, 1.0], x.shape)) for x in wide]
        for name, x, want in zip(NAMES, exact(case, *moved, arrays[4]), base, strict=True):
            found[name] = max(found[name], relative(x, want) / STEP)
    return found


def measure(case: Case, compiled: dict) -> dict:
    """The case's condition numbers, and the errors of every implementation and precision."""
    arrays = case.arrays()
    single = rounded(arrays, "float32")
    row = dataclasses.asdict(case) | {"condition": condition(case, single)}
    norms = [float(np.linalg.norm(x)) for x in exact(case, *single)]
    row["norm"] = dict(zip(NAMES, norms, strict=True))
    row["results"], wanted = [], {}
    for (precision, name), found in compiled.items():
        dtype, _, unit = PRECISIONS[precision]
        result = {"implementation": name, "precision": precision}
        row["results"].append(result)
        if isinstance(found, str):
            result["skipped"] = found
            continue
        inputs = rounded(arrays, dtype)
        if dtype not in wanted:
            wanted = {dtype: exact(case, *inputs)}
        try:
            got = found(*(x for x in inputs if x is not None))
        except Exception as error:  # out of memory, refused by the compiler: an answer
            result["skipped"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
            continue
        errors = [relative(x, want) for x, want in zip(got, wanted[dtype], strict=True)]
        result["error"] = dict(zip(NAMES, errors, strict=True))
        result["backward_error"] = {
            n: None if not row["condition"][n] else e / (row["condition"][n] * unit)
            for n, e in result["error"].items()
        }
    return row


def rounded(arrays, dtype) -> list:
    """q, k, v, dy as jax arrays of `dtype`, and the mask."""
    return [jnp.asarray(np.asarray(x), dtype) for x in arrays[:4]] + [arrays[4]]


# ------------------------------------------------------------------------ results ---


def show(rows: list[dict], console: Console) -> None:
    """One line a case: condition numbers, then y error / worst gradient error of each column."""
    columns = columns_of(rows)
    table = Table(title="relative L2 errors: y / worst of dq, dk, dv (nan: not finite)")
    for name in ("case", "condition", *("\n".join(c) for c in columns)):
        table.add_column(name)
    for row in rows:
        results = {(r["implementation"], r["precision"]): r for r in row["results"]}
        cells = [cell(results.get(c, {}).get("error")) for c in columns]
        table.add_row(f"{row['sweep']}: {row['name']}"[:60], cell(row["condition"]), *cells)
    console.print(table)


def columns_of(rows: list[dict]) -> list[tuple[str, str]]:
    """(implementation, precision) pairs that have a result, in a fixed order."""
    have = {
        (r["implementation"], r["precision"]) for x in rows for r in x["results"] if "error" in r
    }
    return [(i, p) for i in (*IMPLEMENTATIONS, "naive") for p in PRECISIONS if (i, p) in have]


def cell(values: dict | None) -> str:
    if values is None:
        return ""
    return f"{values['y']:.0e} / {worst(values):.0e}"


def worst(values: dict) -> float:
    """The largest of the gradients' numbers; NaN wins."""
    return float(np.max([values[n] for n in GRADIENTS if values[n] is not None]))


def figure(path: Path, rows: list[dict]) -> None:
    """Error of y and of the worst gradient against the condition number, one panel each."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    kinds = {"y": lambda x: x["y"], "worst of dq, dk, dv": worst}
    markers = dict(zip((*IMPLEMENTATIONS, "naive"), "osd^x", strict=True))
    colours = {"float32": "C0", "tf32": "C2", "bfloat16": "C3", "float16": "C1"}
    for axis, (title, value) in zip(axes, kinds.items(), strict=True):
        for name, precision in columns_of(rows):
            points = [
                (value(row["condition"]), value(r["error"]))
                for row in rows
                for r in row["results"]
                if (r["implementation"], r["precision"]) == (name, precision) and "error" in r
            ]
            x, y = np.array(points).T
            style = dict(marker=markers[name], color=colours[precision], s=18, alpha=0.7)
            axis.scatter(x, y, label=f"{name}, {LABELS.get(precision, precision)}", **style)
        low, high = axis.get_xlim()
        low = max(low, 0.1)
        for precision in {precision: None for _, precision in columns_of(rows)}:
            unit = PRECISIONS[precision][2]
            ends = np.array([low, high])
            axis.plot(ends, unit * ends, color=colours[precision], lw=0.8, ls=":", zorder=0)
        axis.set(xscale="log", yscale="log", title=title, xlabel="condition number")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("relative L2 error (dotted: condition × unit round-off)")
    axes[1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments=None) -> list[dict]:
    parser = argparse.ArgumentParser(prog="python -m experiments.conditioning")
    parser.add_argument("--large", action="store_true", help="also a million tokens")
    parser.add_argument("--smoke", action="store_true", help="a few tiny cases")
    parser.add_argument("--out", type=Path, help="JSON to write; the figure goes beside it")
    args = parser.parse_args(arguments)
    console, began = Console(width=200), time.perf_counter()
    todo = [(case, programs(case)) for case in cases(args.large, args.smoke)]
    start_compiling([table for _, table in todo])
    rows = []
    for number, (case, table) in enumerate(todo, 1):
        rows.append(measure(case, table))
        line = f"{number}/{len(todo)} {time.perf_counter() - began:.0f} s {case.sweep}: {case.name}"
        print(line, file=sys.stderr, flush=True)
    show(rows, console)
    seconds = time.perf_counter() - began
    print(f"{seconds:.0f} s")
    if args.out:
        facts = dict(precision="as each row says; reference float64", seeds=[0])
        how = dict(command=command("conditioning", arguments), seconds=seconds)
        write(args.out, rows, **how, **facts)
        figure(args.out.with_suffix(".png"), rows)
    return rows


def start_compiling(tables: list[dict]) -> None:
    """Compiles in threads, in the order of use, while the first cases are measured."""
    pool = concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1))
    for program in [program for table in tables for program in table.values()]:
        if isinstance(program, Program):
            program.start(pool)
    pool.shutdown(wait=False)


if __name__ == "__main__":
    main()
