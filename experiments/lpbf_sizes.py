"""What meshes of different sizes cost in training, without a solver: LPBF's sizes, random fields.

    python -m experiments.lpbf_sizes --out experiments/results/lpbf_sizes.json
    python -m experiments.lpbf_sizes --out FILE --smoke        # tiny, on any machine

The paper's preset in bfloat16, in the loop of training. Sizes are drawn evenly between those of the
buckets that the generated parts were grouped into (cost_of_sizes in the record of
`experiments.lpbf`), as many in each as there; points and fields decide nothing about the time.
"""

import argparse
import json
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments import lpbf, records
from flare_jax.data.buckets import bucketed_splits, describe
from flare_jax.problems.metrics import rel_l2
from flare_jax.problems.problem import Normalizer, Problem, count_of

PARTS = Path(__file__).parent / "results" / "lpbf.json"


def sizes_of(buckets: str, rng: np.random.Generator) -> list[int]:
    """As many sizes as meshes in each bucket of the text "96 of 4608, ... points, ...".

    Evenly above the size of the bucket before and up to its own; the first from half its size on.
    """
    pairs = [part.split() for part in buckets.split(" points")[0].split(", ")]
    counts, ends = zip(*((int(n), int(size)) for n, _, size in pairs), strict=True)
    between = pairwise([ends[0] // 2, *ends])
    return [
        int(size)
        for n, (low, high) in zip(counts, between, strict=True)
        for size in rng.integers(low, high, n) + 1
    ]


def problem_of(sizes: list[int], num_buckets: int, rng: np.random.Generator) -> Problem:
    """Meshes of these sizes: random points and a smooth field."""
    points = [rng.random((size, 3), np.float32) for size in sizes]
    samples = [(x, np.sin(6 * x[:, 2:])) for x in points]
    splits = bucketed_splits({"train": samples, "test": samples[:1]}, num_buckets)
    same = lambda n: Normalizer(np.zeros(n, np.float32), np.ones(n, np.float32))
    return Problem(
        name="lpbf",
        train=splits["train"],
        valid=None,
        test=splits["test"],
        x_normalizer=same(3),
        y_normalizer=same(1),
        loss=rel_l2,
        inputs=("x", "y", "z"),
        targets=("u",),
    )


def show(record: dict) -> None:
    points = record["points_of_one_size"]
    table = Table("", f"ms for {points:,} points", "million real points/s")
    for name in ("points_per_second", "points_per_second_of_one_size"):
        label = "one size" if name.endswith("size") else "sizes of LPBF's parts"
        table.add_row(label, f"{1e3 * points / record[name]:.3f}", f"{record[name] / 1e6:.3f}")
    Console().print(table)
    print(f"ratio {record['ratio']:.3f}, padding {record['padding']:.1%}, {record['device']}")


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.lpbf_sizes")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--smoke", action="store_true", help="a tiny configuration")
    args = parser.parse_args(arguments)
    began, rng = time.perf_counter(), np.random.default_rng(0)
    options = ["--out", str(args.out), "--precision", "bfloat16", "--seeds", "1"]
    config = lpbf.configuration(lpbf.parse([*options, *["--smoke"] * args.smoke]))
    buckets = json.loads(PARTS.read_text())["cost_of_sizes"]["buckets"]
    sizes = sizes_of("4 of 40, 4 of 64 points" if args.smoke else buckets, rng)
    problem = problem_of(sizes, config.problem.num_buckets, rng)
    print(f"{count_of(problem.train)} meshes: {describe(problem.train)}", flush=True)
    seconds = lpbf.seconds_of_an_epoch(problem, config)
    facts = {"precision": config.train.precision, "seconds_per_epoch": seconds}
    facts |= lpbf.cost_of_sizes(problem, config, seconds)
    seconds = time.perf_counter() - began
    command = records.command("lpbf_sizes", arguments)
    records.write(args.out, [], command=command, seconds=seconds, **facts)
    show(json.loads(args.out.read_text()))


if __name__ == "__main__":
    main()
