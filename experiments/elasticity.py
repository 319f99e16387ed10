"""FLARE's elasticity result: the paper's recipe on generated or published cells, several seeds.

    python -m experiments.elasticity --out FOLDER                   # the result, with its figures
    python -m experiments.elasticity --out FOLDER --ablations blocks heads depth
    python -m experiments.elasticity --out FOLDER --ablations ... --share 0 2   # every second model
    python -m experiments.elasticity --out FOLDER --smoke           # everything, tiny, on a CPU

FOLDER gets elasticity.json (or ablations_*.json), figures, and the training runs. A command that is
cut off goes on where it stopped when it is given again; what it reached by then is in the runs'
metrics.jsonl, and after a SIGTERM in the record too. Processes with a share of the ablations each
train side by side, on one GPU or several; the command without a share then makes the record.
Validation chooses the parameters called `best`; the test samples measure and choose nothing. Times
are those of all seeds, trained side by side. The time to reach an error is that spent in training
steps, compilation included, until the mean over seeds of the validation error is at or below it;
`seconds` adds validations and checkpoints.
"""

import dataclasses
import datetime
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments import elasticity_ablations as tables
from experiments.records import history
from flare_jax.plots import curves_figure, prediction_figure, samples_figure
from flare_jax.predict import load_run
from flare_jax.problems import elasticity
from flare_jax.problems.metrics import rel_l2
from flare_jax.train.config import Config, Precision, differences, preset, to_dict
from flare_jax.train.loop import Interrupted, fit

GOALS = (0.01, 0.005, 0.0034)  # rel-L2
PAPER = 3.38e-3  # test rel-L2 of FLARE in its paper, on the published files
MAGNIFIED = 200  # displacement in the figures: strains are about 1e-4


@dataclasses.dataclass(frozen=True)
class Options:
    """FLARE on the elasticity benchmark: several seeds by the paper's recipe, or ablations."""

    out: Path  # folder for the record, the figures and the runs
    data: Path | None = None  # folder of the published files; None generates samples
    cache: Path | None = None  # folder for generated samples
    num_train: int = 1000  # training samples
    epochs: int = 500  # passes over the training samples
    precision: Precision = "tf32"  # of products
    seed: int = 0  # the first
    seeds: int = 3  # trained side by side, with seed, seed + 1, ...
    eval_every: int = 20  # epochs between validations and checkpoints
    ablations: tuple[tables.Family, ...] = ()  # tables to make instead of the one result
    share: tuple[int, int] = (0, 1)  # K N: only models K, K + N, ... of the tables
    smoke: bool = False  # a tiny model on few samples, to see that everything runs


def configuration(options: Options, **changes) -> Config:
    """The paper preset with these options, and other values of the model config."""
    config = preset("elasticity", "paper")
    problem = {"data": options.data, "cache": options.cache, "num_train": options.num_train}
    train = {
        name: getattr(options, name)
        for name in ("epochs", "precision", "seed", "seeds", "eval_every")
    }
    if options.smoke:
        problem |= {"num_train": 16, "num_valid": 4, "num_test": 4}
        sizes = {"num_blocks": 8, "num_heads": 8} | changes
        changes = {name: min(size, 2) for name, size in sizes.items()} | {"channel_dim": 8}
        train |= {"epochs": min(options.epochs, 4), "eval_every": 1}
    return dataclasses.replace(
        config,
        problem=dataclasses.replace(config.problem, **problem),
        model=dataclasses.replace(config.model, **changes),
        train=dataclasses.replace(config.train, **train),
    )


def trained(problem, config: Config, folder: Path) -> dict | None:
    """Trains, or goes on training, or reads what was trained; None if a signal stopped it."""
    if (folder / "result.json").exists():
        result = json.loads((folder / "result.json").read_text())
        if not differences(result["config"], to_dict(config)):
            return result
    started = (folder / "checkpoints").is_dir() and any((folder / "checkpoints").iterdir())
    try:
        return fit(problem, config, folder, resume=started)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return None


def reached(curves: dict[str, np.ndarray]) -> dict[str, dict[str, float | None]]:
    """{parameters: {error: seconds}} until the mean over seeds is at or below each goal."""
    times = {}
    for name in ("valid", "valid_ema"):
        below = curves[name].mean(1)[:, None] <= np.array(GOALS)
        times[name] = {
            f"{goal:g}": float(curves["seconds"][b.argmax()]) if b.any() else None
            for goal, b in zip(GOALS, below.T, strict=True)
        }
    return times


def about(options: Options, config: Config) -> dict:
    """Where and how a record was made."""
    t = config.train
    flags = [
        f"--{f.name.replace('_', '-')} {value}"
        for f in dataclasses.fields(options)
        if f.name not in ("out", "data", "cache", "ablations", "share", "smoke")
        and (value := getattr(options, f.name)) != f.default
    ]
    flags += ["--data FOLDER"] if options.data else []
    flags += [f"--ablations {' '.join(options.ablations)}"] if options.ablations else []
    flags += ["--smoke"] if options.smoke else []
    return {
        "command": " ".join(["python -m experiments.elasticity --out FOLDER", *flags]),
        "data": "published files" if options.data else "generated",
        "device": jax.devices()[0].device_kind,
        "versions": {name: version(name) for name in ("jax", "flax", "optax")},
        "date": datetime.date.today().isoformat(),
        "epochs": t.epochs,
        "precision": t.precision,
        "seeds": list(range(t.seed, t.seed + t.seeds)),
    }


def write(path: Path, record: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def main_result(options: Options, problem, data_seconds: float) -> dict:
    """Trains the preset; writes its record and figures."""
    config = configuration(options)
    folder = options.out / "runs" / tables.folder(config)
    result = trained(problem, config, folder)
    curves = history(folder)
    record = about(options, config) | {
        "finished": result is not None,
        "epochs_done": float(curves["epoch"][-1]),
        "paper_test_rel_l2": PAPER,
        "mean_predictor_rel_l2": problem.mean_error,
        "samples_seconds": data_seconds,
        "seconds_to_reach": reached(curves),
        "training_seconds": float(curves["seconds"][-1]),
        "history": {name: a.tolist() for name, a in curves.items()},
        "result": result,
    }
    write(options.out / "elasticity.json", record)
    draw(options, config, problem, folder, curves)
    return record


def draw(options: Options, config: Config, problem, folder: Path, curves: dict) -> None:
    """Error against time and epochs, and the best, the median and the worst test sample."""
    errors = {"last parameters": curves["valid"], "running average": curves["valid_ema"]}
    axes = {
        "time": ("minutes of training, all seeds", curves["seconds"] / 60),
        "epochs": ("epochs", curves["epoch"]),
    }
    for name, (label, x) in axes.items():
        path = options.out / f"elasticity_error_{name}.png"
        curves_figure(path, x, errors, labels=(label, "validation rel-L2"), levels=GOALS)
    surrogate = load_run(folder)
    prediction = surrogate(problem.test.x)
    error = np.asarray(rel_l2(prediction, problem.test.y))
    rows = np.argsort(error)[[0, len(error) // 2, -1]]
    shift = None
    if options.data is None:
        shift = MAGNIFIED * elasticity.generated(config.problem, "test")["displacement"][rows]
    prediction_figure(
        options.out / "elasticity_prediction.png",
        problem.test.x[rows],
        prediction[rows],
        problem.test.y[rows],
        inputs=problem.inputs,
        targets=problem.targets,
        titles=[
            f"{n}: {error[i]:.2%}" for n, i in zip(("best", "median", "worst"), rows, strict=True)
        ],
        longest_edge=elasticity.LONGEST_EDGE,
        displacement=shift,
    )


def show(record: dict) -> None:
    """The result as a table."""
    table = Table("elasticity", "test rel-L2", "standard deviation over seeds")
    if record["result"] is not None:
        for name, error in record["result"]["rel_l2"].items():
            table.add_row(name, f"{error['mean']:.5f}", f"{error['std']:.5f}")
    table.add_row("FLARE's paper", f"{PAPER:.5f}", "")
    table.add_row("predicting the training mean", f"{record['mean_predictor_rel_l2']:.5f}", "")
    console = Console()
    console.print(table)
    for name, times in record["seconds_to_reach"].items():
        text = ", ".join(
            f"{float(goal):.2%} " + ("not reached" if t is None else f"after {t:.0f} s")
            for goal, t in times.items()
        )
        console.print(f"{name}: {text}")
    step = record["result"] and record["result"]["milliseconds_per_step"]
    console.print(
        f"{record['epochs_done']:g} epochs, {len(record['seeds'])} seeds, {record['precision']}, "
        f"{record['training_seconds']:.0f} s of training"
        + (f", {step:.3f} ms a step" if step else "")
        + f", {record['device']}"
    )


def shared_out(folders: list[str], share: tuple[int, int]) -> list[str]:
    """The folders K, K + N, ... of those that differ."""
    k, n = share
    return list(dict.fromkeys(folders))[k::n]


def ablate(options: Options, problem) -> None:
    """Trains the models of the tables, or this process's share of them, and writes the record."""
    found = [(c, configuration(options, **c.changes)) for c in tables.cases(options.ablations)]
    mine = shared_out([tables.folder(config) for _, config in found], options.share)
    if not mine:
        raise ValueError(f"share {options.share} of {len(found)} models is empty")
    path, rows = options.out / f"ablations_{'_'.join(options.ablations)}.json", []
    for case, config in found:
        if tables.folder(config) not in mine:
            continue
        result = trained(problem, config, options.out / "runs" / tables.folder(config))
        if result is None:
            break
        rows.append(tables.row(case, result))
        if options.share[1] == 1:
            write(path, about(options, config) | {"rows": rows})
        print(f"{case.label}: {result['rel_l2']['last']['mean']:.5f}", flush=True)
    tables.show(rows, config.train.epochs)


def main(options: Options) -> None:
    began = time.perf_counter()
    problem = elasticity.load(configuration(options).problem)
    seconds = time.perf_counter() - began
    options.out.mkdir(parents=True, exist_ok=True)
    samples_figure(
        options.out / "elasticity_samples.png",
        problem.train.x[:9],
        problem.train.y[:9, :, 0],
        longest_edge=elasticity.LONGEST_EDGE,
    )
    if options.ablations:
        ablate(options, problem)
    else:
        show(main_result(options, problem, seconds))


if __name__ == "__main__":
    main(tyro.cli(Options))
