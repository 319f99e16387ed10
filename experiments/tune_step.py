"""Times elasticity's training step under other plans of its MLPs, on one NVIDIA GPU.

    python -m experiments.tune_step --out FOLDER --dtype float32 --seeds 4 \\
        --plans "32x4w/264p/1sb | 3:32x4w/264p/1sb 2:32x4w/264p/1sb" ...
    python -m experiments.tune_step --out FOLDER --smoke       tiny, on any machine

On few tokens kernels run beside each other, so what a plan is worth shows in the whole step only. A
plan is the forward's tile, a bar and the backward's segments, written as `tune_mlp` writes them;
the table's comes first. All are compiled side by side, then timed in turn, several rounds of the
whole list, so that a GPU that slows down slows all of them. The last loss tells whether a plan
computes the same. Writes tune_step.json to the folder --out ($OUT if not given).
"""

import argparse
import concurrent.futures
import dataclasses
import os
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from experiments import records
from experiments.benchmark import training
from experiments.tune_mlp import parse
from flare_jax.models import FLAREConfig
from flare_jax.ops.fused import mlp
from flare_jax.ops.fused.mlp_plans import Plan

TABLE = "the table's"
ROUNDS, CALLS = 3, 10


def plan_of(text: str) -> Plan:
    """The plan `FORWARD | BACKWARD`, for few tokens.

    Raises:
        ValueError: the text is no such plan.
    """
    forward, bar, backward = text.partition("|")
    tile, segments = parse(forward), parse(backward)
    if not bar or len(tile) != 1 or any(layers is None for layers, _ in segments):
        raise ValueError(f"--plans: expected 'TILE | LAYERS:TILE ...', got {text!r}")
    return Plan(tile[0][1], tuple(segments), apart=True)


def case_of(args) -> training.Case:
    if args.smoke:
        layers = ("num_layers_k_proj", "num_layers_v_proj", "num_layers_ffn")
        model = FLAREConfig(16, num_blocks=1, num_heads=2, **dict.fromkeys(layers, 0))
        return training.Case("tiny", model, 64, 2, dtype=args.dtype, length=2, seeds=args.seeds)
    elasticity = next(c for c in training.paper_cases(1000) if c.name == "elasticity")
    return dataclasses.replace(elasticity, dtype=args.dtype, seeds=args.seeds)


def lowered(case: training.Case, plan: Plan | None):
    """The initial state of parameters, and the steps under the plan, ready to compile."""
    table, width = mlp.plan_for, case.model.channel_dim
    mlp.plan_for = lambda n, c, *rest: plan if plan and c == width else table(n, c, *rest)
    try:
        start, steps = training.make_steps(case, case.apply(case.dtype))
        state = jax.eval_shape(start, jax.eval_shape(case.params))
        return start, steps.lower(state, jax.eval_shape(case.samples))
    finally:
        mlp.plan_for = table


def timed(case: training.Case, programs: dict) -> list[dict]:
    """A row for each program: the median time of a step in each round, and the last loss."""
    samples, rows = case.samples(), {name: {"plan": name, "ms": []} for name in programs}
    states = {
        name: start(jax.tree.map(jnp.copy, case.params())) for name, (start, _) in programs.items()
    }
    for _ in range(ROUNDS):
        for name, (_, program) in programs.items():
            times = []
            for _ in range(CALLS):
                began = time.perf_counter()
                states[name], metrics = program(states[name], samples)
                loss = jax.block_until_ready(metrics["loss"])
                times.append(time.perf_counter() - began)
            rows[name]["ms"].append(1e3 * statistics.median(times) / case.length)
            rows[name]["loss"] = float(loss.ravel()[-1])
    return sorted(rows.values(), key=lambda row: min(row["ms"]))


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.tune_step")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")), help="folder")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seeds", type=int, default=1, help="models side by side")
    parser.add_argument("--plans", nargs="+", default=[], help="'TILE | LAYERS:TILE ...' each")
    parser.add_argument("--smoke", action="store_true", help="a tiny model")
    args = parser.parse_args(arguments)
    began, case = time.perf_counter(), case_of(args)
    plans = {TABLE: None} | {text: plan_of(text) for text in args.plans}
    found, programs = {name: lowered(case, plan) for name, plan in plans.items()}, {}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        compiled = {name: pool.submit(steps.compile) for name, (_, steps) in found.items()}
    for name, future in compiled.items():
        if error := future.exception():  # out of shared memory, say: an answer, not a failure
            print(f"{name}: {str(error)[:150]}")
        else:
            programs[name] = found[name][0], future.result()
    rows = timed(case, programs)
    facts = {"dtype": case.dtype, "model_seeds": case.seeds}
    command = records.command("tune_step", arguments)
    seconds = time.perf_counter() - began
    records.write(args.out / "tune_step.json", rows, command=command, seconds=seconds, **facts)
    print(f"# ms a step in each of {ROUNDS} rounds, fastest first; {jax.devices()[0].device_kind}")
    for row in rows:
        print(f"{row['plan']:60s} {'  '.join(f'{ms:.3f}' for ms in row['ms'])}  {row['loss']:.6f}")


if __name__ == "__main__":
    main()
