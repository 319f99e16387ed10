"""FLARE's Darcy result: how long the paper's samples take to make, and its recipe on them.

    python -m experiments.darcy --out FILE                 # 500 epochs, as published
    python -m experiments.darcy --epochs 40 --out FILE     # shorter, and the record says so
    python -m experiments.darcy --epochs 0 --out FILE      # only makes the samples
    python -m experiments.darcy --smoke --out FILE         # tiny, on any machine

A shorter run is the whole recipe, its learning rate schedule included, over fewer epochs. The run
goes into a folder beside the record. One that a signal stops says how far it came. Validation
chooses the parameters called `best`; the test samples measure and choose nothing.
"""

import argparse
import dataclasses
import datetime
import json
import time
import typing
from importlib.metadata import version
from pathlib import Path

import jax

from experiments.records import command, history
from flare_jax.problems import darcy
from flare_jax.solvers import darcy as solver
from flare_jax.train.config import Config, Precision, preset
from flare_jax.train.loop import Interrupted, fit

PAPER = 5.10e-3  # test rel-L2 of FLARE in its paper, on the published files
SAMPLES = 1200  # of the published split


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.darcy")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--data", type=Path, help="folder of the published files")
    parser.add_argument("--cache", type=Path, help="folder for generated samples")
    parser.add_argument("--epochs", type=int, default=500, help="of training; 0: none")
    parser.add_argument("--precision", choices=typing.get_args(Precision), default="tf32")
    parser.add_argument("--seeds", type=int, default=1, help="trained side by side")
    parser.add_argument("--smoke", action="store_true", help="a tiny configuration")
    return parser.parse_args(arguments)


def configuration(args) -> Config:
    config = preset("darcy", "paper")
    problem = {"data": args.data, "cache": args.cache}
    train = {"epochs": max(args.epochs, 1), "precision": args.precision, "seeds": args.seeds}
    model = {}
    if args.smoke:
        problem |= {"grid": 21, "stride": 1, "num_train": 8, "num_valid": 2, "num_test": 2}
        model = {"channel_dim": 16, "num_blocks": 1, "num_heads": 2, "num_latents": 8}
        train |= {"epochs": 2, "eval_every": 1}
    return dataclasses.replace(
        config,
        problem=dataclasses.replace(config.problem, **problem),
        model=dataclasses.replace(config.model, **model),
        train=dataclasses.replace(config.train, **train),
    )


def generation(config: Config, count: int) -> dict:
    """Seconds that `count` new samples on the full grid take, compilation apart and included."""
    times = []
    for seed in (1, 2):  # the first compiles
        start = time.perf_counter()
        problem = config.problem
        solver.generate(range(count), seed=seed, grid=problem.grid, stride=problem.stride)
        times.append(time.perf_counter() - start)
    return {"samples": count, "grid": config.problem.grid, "first": times[0], "seconds": times[1]}


def main(arguments=None) -> dict:
    args = parse(arguments)
    config = configuration(args)
    device = jax.devices()[0]
    record = {
        "command": command("darcy", arguments),
        "data": "published files" if args.data else "generated",
        "device": device.device_kind,
        "versions": {name: version(name) for name in ("jax", "flax", "optax")},
        "date": datetime.date.today().isoformat(),
        "epochs": config.train.epochs if args.epochs else 0,
        "precision": args.precision,
        "seeds": list(range(args.seeds)),
        "paper_test_rel_l2": PAPER,
    }
    if not args.data:
        record["generation"] = generation(config, 8 if args.smoke else SAMPLES)
        print(json.dumps(record["generation"]), flush=True)
    if args.epochs:
        folder = args.out.with_suffix("")
        try:
            record["result"] = fit(darcy.load(config.problem), config, folder)
            record["result"]["config"]["problem"] |= {"data": None, "cache": None}
            show(record)
        except Interrupted as stopped:
            print(stopped)
        record |= progress(folder)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    return record


def progress(folder: Path) -> dict:
    """How far a run came, and its validation errors on the way."""
    curves = history(folder)
    return {
        "epochs_done": float(curves["epoch"][-1]),
        "history": {name: a.tolist() for name, a in curves.items()},
    }


def show(record: dict) -> None:
    result = record["result"]
    for name, error in result["rel_l2"].items():
        print(f"test rel-L2 ({name}): {error['mean']:.5f} +- {error['std']:.5f}")
    print(f"predicting the training mean: {result['mean_predictor_rel_l2']:.5f}, paper {PAPER}")
    print(
        f"{record['epochs']} epochs, {record['precision']}, {record['device']}: "
        f"{result['milliseconds_per_step']:.2f} ms a step, {result['seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
