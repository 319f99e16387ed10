"""What meshes of different sizes cost in training, without a solver: LPBF's sizes, random fields.

    python -m experiments.lpbf_sizes --out experiments/results/lpbf_sizes.json
    python -m experiments.lpbf_sizes --out FILE --smoke        # tiny, on any machine

The paper's preset in bfloat16, as many meshes as in LPBF's training set, through the programs of
the training loop. Sizes are drawn by the published mean and deviation, between the published
extremes; points and fields decide nothing about the time. Beside it as many meshes that all have
the mean size, on the same machine right after. The ratio is that of the real points a second.
"""

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments import lpbf, records
from experiments.lpbf_parts import PUBLISHED
from flare_jax.data.buckets import bucketed_splits, describe, waste
from flare_jax.problems.metrics import rel_l2
from flare_jax.problems.problem import Normalizer, Problem, Split, buckets_of, count_of
from flare_jax.train.config import Config
from flare_jax.train.loop import MATMUL, start
from flare_jax.train.optimizer import make_optimizer
from flare_jax.train.programs import make_steps, plan_of

EPOCHS = 4  # the first compiles, the median of the others is told


def sizes_like(nodes: dict, count: int, rng: np.random.Generator) -> np.ndarray:
    """Normally distributed, drawn again where below the smallest or above the largest."""
    found = np.empty(0, int)
    while len(found) < count:
        drawn = rng.normal(nodes["mean"], nodes["std"], count).astype(int)
        found = np.append(found, drawn[(drawn >= nodes["min"]) & (drawn <= nodes["max"])])
    return found[:count]


def problem_of(sizes: np.ndarray, num_buckets: int, rng: np.random.Generator) -> Problem:
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


def of_one_size(problem: Problem) -> Problem:
    """As many training samples of the mean size, cut from the points of the real ones."""
    count = count_of(problem.train)
    points = sum(int(split.mask.sum()) for split in buckets_of(problem.train))
    size = max(points // count // 256, 1) * 256
    together = lambda name: np.concatenate(
        [getattr(split, name)[split.mask] for split in buckets_of(problem.train)]
    )
    cut = lambda a: np.resize(a, (count, size, a.shape[1]))
    x, y = cut(together("x")), cut(together("y"))
    return dataclasses.replace(problem, train=(Split(x, y, np.ones((count, size), bool)),))


def seconds_of_epochs(problem: Problem, config: Config) -> list[float]:
    """Time of the training steps of each of a few epochs, without the first one."""
    t, plan = config.train, plan_of(problem, config)
    tx = make_optimizer(config.optimizer, t.epochs * plan.per_epoch)
    apply, run = start(problem, config, tx)
    state, found = run.state, []
    with jax.default_matmul_precision(MATMUL[t.precision]):
        chunk = make_steps(problem, config, plan, tx, apply, run, None, False)
        for epoch in range(EPOCHS):
            done, began = epoch * plan.per_epoch, time.perf_counter()
            while done < (epoch + 1) * plan.per_epoch:
                state, values = chunk(state, done)
                done += values["loss"].shape[1]
            found.append(time.perf_counter() - began)
    return found[1:]


def measured(problem: Problem, config: Config) -> dict:
    seconds = seconds_of_epochs(problem, config)
    median = statistics.median(seconds)
    points, steps = lpbf.points_of(problem, config), plan_of(problem, config).per_epoch
    return {
        "buckets": describe(problem.train),
        "padding": waste(problem.train),
        "seconds_of_epochs": seconds,
        "steps": steps,
        "points": points,
        "ms_per_step": 1e3 * median / steps,
        "points_per_second": points / median,
    }


def show(record: dict) -> None:
    table = Table("", "points a step", "ms a step", "million real points/s", "padding")
    for label, row in zip(("sizes of LPBF's parts", "one size"), record["rows"], strict=True):
        cells = f"{row['points'] / row['steps']:,.0f}", f"{row['ms_per_step']:.3f}"
        cells += f"{row['points_per_second'] / 1e6:.3f}", f"{row['padding']:.1%}"
        table.add_row(label, *cells)
    Console().print(table)
    print(f"ratio {record['cost_of_sizes']['ratio']:.3f}, {record['device']}")


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.lpbf_sizes")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--smoke", action="store_true", help="a tiny configuration")
    args = parser.parse_args(arguments)
    began, rng = time.perf_counter(), np.random.default_rng(0)
    options = ["--out", str(args.out), "--precision", "bfloat16", "--seeds", "1"]
    config = lpbf.configuration(lpbf.parse([*options, *["--smoke"] * args.smoke]))
    tiny = {"mean": 40, "std": 20, "min": 20, "max": 64}
    nodes = tiny if args.smoke else PUBLISHED["nodes"]
    sizes = sizes_like(nodes, config.problem.num_train, rng)
    ragged = problem_of(sizes, config.problem.num_buckets, rng)
    rows = [measured(problem, config) for problem in (ragged, of_one_size(ragged))]
    speeds = [row["points_per_second"] for row in rows]
    cost = {name: rows[0][name] for name in ("buckets", "padding", "points_per_second")}
    cost |= {"ratio": speeds[0] / speeds[1]}
    records.write(
        args.out,
        rows,
        command=records.command("lpbf_sizes", arguments),
        seconds=time.perf_counter() - began,
        precision=config.train.precision,
        seeds=[0],
        cost_of_sizes=cost,
    )
    show(json.loads(args.out.read_text()))


if __name__ == "__main__":
    main()
