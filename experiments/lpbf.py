"""FLARE's LPBF result: the paper's recipe on meshes of different sizes, several seeds.

    python -m experiments.lpbf --out FILE                      # parts are generated, or cached
    python -m experiments.lpbf --out FILE --data FOLDER        # parts in the published layout
    python -m experiments.lpbf --out FILE --epochs 50          # shorter, and the record says so
    python -m experiments.lpbf --out FILE --train 300 --test 80        # fewer parts, likewise
    python -m experiments.lpbf --out FILE --seconds 500        # stops then, and goes on when called
    python -m experiments.lpbf --out FILE --epochs 0           # only makes the missing parts
    python -m experiments.lpbf --out FILE --smoke              # tiny, on any machine

A seed on a GPU each, then one record of both:

    CUDA_VISIBLE_DEVICES=0 python -m experiments.lpbf --out A.json --seeds 1 &
    CUDA_VISIBLE_DEVICES=1 python -m experiments.lpbf --out B.json --seeds 1 --seed 1
    python -m experiments.lpbf --out FILE --join A.json B.json

A shorter run is the whole recipe, its learning rate schedule included, over fewer epochs. The run
and its figure go into a folder beside the record; a command that is cut off goes on where it
stopped. Validation chooses the parameters called `best`; the test samples measure and choose
nothing. `legacy` is the error of the published table, see `flare_jax/problems/lpbf.py`.

What meshes of different sizes cost beside meshes of one size: `experiments.lpbf_sizes`.
"""

import argparse
import dataclasses
import json
import os
import signal
import sys
import threading
import time
import typing
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments import records
from flare_jax.data.buckets import describe, waste
from flare_jax.plots import prediction_figure
from flare_jax.predict import load_run, one_sample
from flare_jax.problems import lpbf
from flare_jax.problems.metrics import rel_l2
from flare_jax.problems.problem import Problem, buckets_of, count_of
from flare_jax.train.config import Config, Precision, differences, preset, to_dict
from flare_jax.train.loop import Interrupted, fit
from flare_jax.train.programs import plan_of

PAPER = 18.5e-3  # test error of FLARE in its paper, on the published set: the legacy metric


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.lpbf")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--data", type=Path, help="folder of parts in the published layout")
    parser.add_argument("--cache", type=Path, help="folder for generated parts")
    parser.add_argument("--train", type=int, default=1050, help="training parts")
    parser.add_argument("--valid", type=int, default=50, help="validation parts")
    parser.add_argument("--test", type=int, default=290, help="test parts")
    parser.add_argument("--epochs", type=int, default=250, help="of training; 0: none")
    parser.add_argument("--precision", choices=typing.get_args(Precision), default="tf32")
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--seeds", type=int, default=2, help="trained side by side")
    parser.add_argument("--eval-every", type=int, default=10, help="epochs between checkpoints")
    parser.add_argument("--seconds", type=float, help="stop training after so long, and save")
    parser.add_argument("--smoke", action="store_true", help="a tiny configuration")
    parser.add_argument("--join", type=Path, nargs="+", help="records of other seeds, to make one")
    return parser.parse_args(arguments)


def configuration(args) -> Config:
    config = preset("lpbf", "paper")
    problem = {"data": args.data, "cache": args.cache}
    problem |= {f"num_{name}": getattr(args, name) for name in ("train", "valid", "test")}
    names = ("epochs", "precision", "seed", "seeds", "eval_every")
    train = {name: getattr(args, name) for name in names}
    train["epochs"] = max(args.epochs, 1)
    model = {}
    if args.smoke:
        problem |= {"size": "small", "num_train": 6, "num_valid": 2, "num_test": 3}
        problem |= {"num_buckets": 2}
        model = {"channel_dim": 16, "num_blocks": 1, "num_heads": 2, "num_latents": 8}
        train |= {"epochs": min(train["epochs"], 2), "eval_every": 1}
    return dataclasses.replace(
        config,
        problem=dataclasses.replace(config.problem, **problem),
        model=dataclasses.replace(config.model, **model),
        train=dataclasses.replace(config.train, **train),
    )


def trained(problem: Problem, config: Config, folder: Path, seconds: float | None) -> dict | None:
    """Trains, goes on, or reads what was trained; None if a signal or the time limit stopped it."""
    if (folder / "result.json").exists():
        result = json.loads((folder / "result.json").read_text())
        if not differences(result["config"], to_dict(config)):
            return result
    started = (folder / "checkpoints").is_dir() and any((folder / "checkpoints").iterdir())
    over = threading.Event()
    if seconds is not None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # while it compiles; training catches it
        threading.Thread(target=terminate, args=(seconds, over), daemon=True).start()
    try:
        return fit(problem, config, folder, resume=started)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return None
    finally:
        over.set()


def terminate(seconds: float, over: threading.Event) -> None:
    """Sends SIGTERM after `seconds`, and every two seconds more until it is `over`."""
    while not over.wait(seconds):
        os.kill(os.getpid(), signal.SIGTERM)
        seconds = 2


def points_of(problem: Problem, config: Config) -> float:
    """Real points of an epoch: all but those of the samples that it leaves over, on average."""
    plan = plan_of(problem, config)
    each = zip(buckets_of(problem.train), plan.steps, plan.batches, strict=True)
    points = sum(s.mask.sum() * steps * batch / len(s.x) for s, steps, batch in each)
    return float(points * plan.per_epoch / sum(plan.steps))


def legacy_of_the_mean(problem: Problem) -> float:
    """The published metric of predicting the training mean: how little it tells."""
    errors = []
    for split in buckets_of(problem.test):
        mean = np.broadcast_to(problem.y_normalizer.mean, split.y.shape)
        errors.append(lpbf.legacy(mean, split.y, split.mask))
    return float(np.mean(np.concatenate(errors)))


def draw(path: Path, folder: Path, problem: Problem) -> None:
    """The first test part of the smallest, the middle and the largest bucket."""
    counts = [len(split.x) for split in buckets_of(problem.test)]
    starts = np.cumsum([0, *counts[:-1]])
    surrogate = load_run(folder)
    rows = sorted({int(starts[i]) for i in (0, len(starts) // 2, len(starts) - 1)})
    samples = [one_sample(surrogate, problem, row) for row in rows]
    errors = [float(rel_l2(p[None], y[None])[0]) for _, p, y in samples]
    x, prediction, truth = zip(*samples, strict=True)
    titles = [f"{len(a)} nodes: {e:.2%}" for a, e in zip(x, errors, strict=True)]
    names = dict(inputs=problem.inputs, targets=problem.targets)
    prediction_figure(path, x, prediction, truth, **names, titles=titles, unit="mm")


def told(arguments) -> str:
    """The command line without the names of folders on this machine."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--data" in given:
        given[given.index("--data") + 1] = "FOLDER"
    return records.command("lpbf", given)


def show(record: dict) -> None:
    """The record as a table."""
    table = Table("LPBF", "rel-L2", "legacy")
    result = record["result"]
    for name in result["rel_l2"] if result else ():
        table.add_row(name, *(mean_and_spread(result[m][name]) for m in ("rel_l2", "legacy")))
    table.add_row("FLARE's paper, published set", "", f"{PAPER:.5f}")
    mean = (f"{record[f'mean_predictor_{name}']:.5f}" for name in ("rel_l2", "legacy"))
    table.add_row("predicting the training mean", *mean)
    console, cost = Console(), record["cost_of_sizes"]
    console.print(table)
    memory = (
        f", {result['peak_bytes'] / 1e9:.2f} GB at most" if result and result["peak_bytes"] else ""
    )
    console.print(
        f"{record['epochs_done']:g} of {record['epochs']} epochs, {len(record['seeds'])} seeds, "
        f"{record['precision']}, {record['seconds_per_epoch']:.1f} s an epoch{memory}, "
        f"{record['device']}; padding {cost['padding']:.1%}, {cost['points_per_second']:.3g} real "
        "points/s"
    )


def mean_and_spread(error: dict) -> str:
    return f"{error['mean']:.5f} +- {error['std']:.5f}"


SAME = ("device", "data", "parts", "epochs", "epochs_done", "finished", "precision")


def joined(found: list[dict]) -> dict:
    """One record of runs that differ in their seeds, each on a device of its own.

    Raises ValueError if they differ in anything else, or share a seed.
    """
    first = found[0]
    for name in SAME:
        if any(r[name] != first[name] for r in found):
            raise ValueError(f"--join: records differ in {name}: {[r[name] for r in found]}")
    seeds = [seed for r in found for seed in r["seeds"]]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--join: records share a seed: {[r['seeds'] for r in found]}")
    together = lambda dicts, name: [x for d in dicts for x in d[name]]
    others = ", ".join(f"`{r['command']}`" for r in found[1:])
    note = f"{len(found)} runs, each on a device of its own, the others by {others}, then --join"
    record = first | {"seeds": seeds, "note": note}
    slowest = max(found, key=lambda r: r["seconds_per_epoch"])
    record |= {name: slowest[name] for name in ("seconds_per_epoch", "cost_of_sizes")}
    for name in ("seconds", "training_seconds"):
        record[name] = max(r[name] for r in found)
    record["rows"] = [
        rows[0]
        | {"loss": float(np.mean([row["loss"] for row in rows]))}
        | {name: together(rows, name) for name in ("valid", "valid_ema")}
        for rows in zip(*(r["rows"] for r in found), strict=True)
    ]
    if first["result"] is None:
        return record
    results = [r["result"] for r in found]
    record["result"] = result = results[0] | {"valid_rel_l2": together(results, "valid_rel_l2")}
    for metric in ("rel_l2", "legacy"):
        result[metric] = {}
        for which in results[0][metric]:
            errors = together([r[metric][which] for r in results], "seeds")
            spread = {"mean": float(np.mean(errors)), "std": float(np.std(errors))}
            result[metric][which] = spread | {"seeds": errors}
    result["test_rel_l2"] = result["rel_l2"][result["chosen"]]["mean"]
    return record


def main(arguments=None) -> None:
    args = parse(arguments)
    if args.join:
        record = joined([json.loads(path.read_text()) for path in args.join])
        args.out.write_text(records.text(record, record.pop("rows")))
        show(json.loads(args.out.read_text()))
        return
    began = time.perf_counter()
    config = configuration(args)
    problem = lpbf.load(config.problem)
    data_seconds = time.perf_counter() - began
    print(f"training parts: {describe(problem.train)}; {data_seconds:.0f} s", flush=True)
    if args.epochs == 0:
        return
    folder = args.out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    result = trained(problem, config, folder, args.seconds)
    if result is not None:  # where its parts were is nobody's business
        result["config"]["problem"] |= {"data": None, "cache": None}
        result["mean_predictor_legacy"] = legacy_of_the_mean(problem)
    curves = records.history(folder)
    done, spent = float(curves["epoch"][-1]), float(curves["seconds"][-1])
    epochs = records.epoch_seconds(folder) or [spent / done]
    an_epoch = float(np.median(epochs[1:] or epochs))
    facts = {
        "data": "folder" if args.data else f"generated, seed {config.problem.data_seed}",
        "parts": {n: count_of(getattr(problem, n)) for n in ("train", "valid", "test")},
        "epochs": config.train.epochs,
        "epochs_done": done,
        "finished": result is not None,
        "seeds": [config.train.seed + i for i in range(config.train.seeds)],
        "precision": config.train.precision,
        "mean_predictor_rel_l2": problem.mean_error,
        "mean_predictor_legacy": legacy_of_the_mean(problem),
        "paper_legacy": PAPER,
        "data_seconds": round(data_seconds, 1),
        "seconds_per_epoch": an_epoch,
        "training_seconds": spent,
        "cost_of_sizes": {
            "padding": waste(problem.train),
            "buckets": describe(problem.train),
            "points_per_second": points_of(problem, config) / an_epoch,
        },
        "result": result,
    }
    names = ("epoch", "seconds", "loss", "valid", "valid_ema")
    columns = zip(*(curves[name].tolist() for name in names), strict=True)
    rows = [dict(zip(names, row, strict=True)) for row in columns]
    seconds = time.perf_counter() - began
    records.write(args.out, rows, command=told(arguments), seconds=seconds, **facts)
    draw(folder / "figure.png", folder, problem)
    show(json.loads(args.out.read_text()))


if __name__ == "__main__":
    main()
