"""Times every implementation of the operator, a layer, the model and training steps, on one device.

    python -m experiments.benchmark --out experiments/results/benchmark.json
    python -m experiments.benchmark --smoke                        tiny, on any machine
    python -m experiments.benchmark --parts operator --dtypes bfloat16 --sizes 64,64

Rows are first checked against the float32 model or operator at the highest matmul precision
(relative L2 error of outputs and of gradients, both printed); one that is wrong is not timed.
Times are medians after warm-up; short calls are queued, up to 50 of them, before each wait for the
device: `forward ms`, and `ms` of forward with backward (parts operator and layer) or of a training
step (parts model and step). `peak GB` is
what the row needs in all: arguments, results and temporaries of the compiled program, or
PyTorch's peak of allocated memory. `TB/s` and `Texp/s` are the least work that `ms` stands for
(formulas in operator.py and layer.py) over `ms`, and the percentage that of what a device copy and
a loop of exponentials reach here: 100 % in either means that no faster program exists.

PyTorch sees float32 products as TF32, as JAX's default does on NVIDIA GPUs.
"""

import argparse
import datetime
import json
import os
import sys
import time
from pathlib import Path

import jax

from experiments.benchmark import layer, measure, operator, training
from experiments.benchmark.measure import Row
from experiments.records import command
from flare_jax.models import FLAREConfig

PARTS = ("operator", "layer", "model", "step")
COMPILE_SHARE = 0.5  # of the budget, at most
HEAD = "part", "case", "implementation", "error y", "grad", "forward ms", "ms", "peak GB"
LINE = "{:8s} {:46s} {:21s} {:>7s} {:>7s} {:>10s} {:>9s} {:>7s} {:>11s} {:>11s}  {}"


def main(arguments=None) -> list[dict]:
    args = parse(arguments)
    began = time.perf_counter()
    measure.TIMING_SECONDS = 0.05 if args.smoke else 0.5
    rows = make_rows(args)
    order = sorted(rows, key=lambda row: row.rank)
    measure.compile_all(order, min(16, os.cpu_count() or 1), COMPILE_SHARE * args.budget)
    limits = measure.ceilings(args.smoke)
    compiled = time.perf_counter() - began
    results = {}
    for row in order:
        late = time.perf_counter() - began > args.budget
        results[id(row)] = {"skipped": "no time left"} if late else fill_in(row)
        release()
        print(line(row, finish(row, results[id(row)], limits)), file=sys.stderr, flush=True)
    record = [finish(row, results[id(row)], limits) for row in rows]
    show(rows, record, limits)
    print(f"{time.perf_counter() - began:.0f} s, {compiled:.0f} of them to compile")
    if args.out:
        write(args.out, record, limits)
    return record


def parse(arguments) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmark")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--tokens", type=int, help="of operator, layer and model")
    parser.add_argument("--sizes", nargs="+", help="C,M of the operator")
    parser.add_argument("--dtypes", nargs="+", help="of the rows to keep")
    parser.add_argument("--problems", nargs="+", help="of part step; all others too if not given")
    parser.add_argument("--implementations", nargs="+", help="names of rows to keep")
    parser.add_argument("--budget", type=float, default=240, help="seconds; then rows are skipped")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--smoke", action="store_true", help="a tiny configuration")
    args = parser.parse_args(arguments)
    args.only_dtypes = args.dtypes
    args.dtypes = args.dtypes or (["float32"] if args.smoke else ["bfloat16", "float32"])
    many = ["16,8"] if args.smoke else ["64,64", "128,128", "128,512", "128,2048"]
    args.sizes = [tuple(map(int, size.split(","))) for size in args.sizes or many]
    return args


def make_rows(args) -> list[Row]:
    """The rows of the parts asked for, as the table shows them."""
    n, heads = args.tokens or (256 if args.smoke else 1_024_000), 2 if args.smoke else 8
    sizes = ((16, 8),) if args.smoke else layer.SIZES
    cases = training.paper_cases(args.tokens or 1_000_000)
    if args.smoke:
        shallow = dict(num_layers_k_proj=0, num_layers_v_proj=0, num_layers_ffn=0)
        tiny = FLAREConfig(16, num_blocks=1, num_heads=2, num_latents=8, **shallow)
        options = dict(batch=2, dtype="float32", length=2, seeds=2)
        cases = [training.Case("model", tiny, n, 3), training.Case("tiny", tiny, 64, 2, **options)]
    rows = {
        "operator": lambda: operator.rows(n, args.sizes, args.dtypes, heads),
        "layer": lambda: layer.rows(n, sizes, heads),
        "model": lambda: training.rows(cases[:1], "model"),
        "step": lambda: training.rows(cases[1:], "step"),
    }
    found = [row for part in args.parts for row in rows[part]()]
    kept = lambda row: (
        row.name in (args.implementations or [row.name])
        and row.labels["dtype"] in (args.only_dtypes or [row.labels["dtype"]])
        and row.labels.get("problem") in (*(args.problems or [row.labels.get("problem")]), None)
    )
    return list(filter(kept, found))


def fill_in(row: Row) -> dict:
    """The row's numbers, or the reason why there are none."""
    try:
        return row.measure()
    except Exception as error:  # refused, out of memory, not installed: an answer, not a failure
        text = " ".join(str(error).split())
        refused = isinstance(error, NotImplementedError)
        return {"skipped": text if refused else f"{type(error).__name__}: {text}"[:300]}


def release() -> None:
    """Lets JAX have the memory that PyTorch holds unused."""
    if "torch" in sys.modules:
        from experiments.benchmark import torch_side

        torch_side.release()


def finish(row: Row, result: dict, limits: dict) -> dict:
    """The row as the JSON file holds it: with its rates, and their shares of the ceilings."""
    record = {"part": row.part, **row.labels, "implementation": row.name, **result}
    for name, rate in (("bytes", "bytes_per_s"), ("exps", "exps_per_s")):
        record[f"least_{name}"] = row.work[name]
        if "ms" in result:
            record[rate] = row.work[name] / result["ms"] * 1e3
            record[f"share_of_{rate}"] = record[rate] / limits[rate]
    return record


def line(row: Row, record: dict) -> str:
    """One line of the table."""
    found = dict(record.get("error", {}))
    y, gradient = found.pop("y", None), max(found.values(), default=None)
    columns = [row.part, label(row), row.name]
    columns += ["" if error is None else f"{error:.1e}" for error in (y, gradient)]
    for key, unit, form in (("forward_ms", 1, ".3f"), ("ms", 1, ".3f"), ("peak_bytes", 1e9, ".2f")):
        columns.append(format(record[key] / unit, form) if key in record else "")
    for key in ("bytes_per_s", "exps_per_s"):
        share = 100 * record.get(f"share_of_{key}", 0)
        columns.append(f"{record[key] / 1e12:.3f} {share:3.0f}%" if key in record else "")
    return LINE.format(*columns, record.get("skipped", "")[:90]).rstrip()


def label(row: Row) -> str:
    """What the row is of: `elasticity float32 C=64 M=64 H=8 N=972 B=2`."""
    words = [str(row.labels[key]) for key in ("problem", "dtype") if key in row.labels]
    for key in ("C", "M", "H", "N", "B", "seeds"):
        if row.labels.get(key, 1) > 1:
            words.append(f"{key}={row.labels[key]}")
    return " ".join(words)


def show(rows: list[Row], record: list[dict], limits: dict) -> None:
    device = jax.devices()[0].device_kind
    print(f"\n{device}, jax {jax.__version__}, ", end="")
    print(f"copy {limits['bytes_per_s'] / 1e12:.3f} TB/s, {limits['exps_per_s'] / 1e12:.3f} Texp/s")
    print(LINE.format(*HEAD, "TB/s", "Texp/s", "").rstrip())
    for row, one in zip(rows, record, strict=True):
        print(line(row, one))


def write(path: Path, record: list[dict], limits: dict) -> None:
    torch = sys.modules.get("torch")
    summary = {
        "command": command("benchmark", None),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "torch": torch.__version__ if torch else None,
        "date": datetime.date.today().isoformat(),
        "precision": "float32 products by the defaults: TF32 in XLA and PyTorch on NVIDIA GPUs",
        "ceilings": limits,
        "rows": record,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
