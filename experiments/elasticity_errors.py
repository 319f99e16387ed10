"""Where a surrogate of elasticity errs: against how far a cell is from those it was trained on.

    python -m experiments.elasticity_errors RUN --out experiments/results/elasticity_errors.json

RUN is a folder below FOLDER/runs of `experiments.elasticity`. All cells share one topology, so the
positions of a cell's points are a vector that stands for its shape. Coordinates are the principal
components of the training cells that hold 99 % of their variance, each scaled to variance 1. Then

    distance   mean Euclidean distance to the NEAREST training cells (of a training cell: others)
    radius     distance from the mean of the training cells

The record holds rank correlations (Spearman) of both with the error, averaged over seeds, of the
last parameters; the errors of each quarter of the cells by distance; and how alike the seeds err.
Of the training cells only the first `--train` are looked at. The figure shows all that are.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from scipy.spatial import cKDTree
from scipy.stats import spearmanr

from experiments import records
from flare_jax.plots import plt
from flare_jax.predict import load_data, load_run
from flare_jax.train.checkpoint import load
from flare_jax.train.errors import Errors

NEAREST = 5
VARIANCE = 0.99  # of the training cells' positions, in the components kept


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.elasticity_errors")
    parser.add_argument("run", type=Path, help="folder of a training run")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--cache", type=Path, help="folder of generated samples")
    parser.add_argument("--train", type=int, default=200, help="training cells to look at")
    return parser.parse_args(arguments)


def coordinates(train: Float[np.ndarray, "n N 2"]) -> Callable[[np.ndarray], np.ndarray]:
    """`cells [m, N, 2] -> [m, k]`, in the scaled principal components of the training cells."""
    flat = lambda x: x.reshape(len(x), -1).astype(np.float64)
    mean = flat(train).mean(0)
    _, size, axes = np.linalg.svd(flat(train) - mean, full_matrices=False)
    kept = 1 + int(np.searchsorted(np.cumsum(size**2) / np.sum(size**2), VARIANCE))
    scale = size[:kept] / np.sqrt(len(train))
    return lambda cells: (flat(cells) - mean) @ axes[:kept].T / scale


def distances(train: np.ndarray, cells: np.ndarray, own: bool) -> dict[str, np.ndarray]:
    """`distance` and `radius` of cells at these coordinates; `own`: they are training cells."""
    found, _ = cKDTree(train).query(cells, NEAREST + own)
    return {"distance": found[:, int(own) :].mean(1), "radius": np.linalg.norm(cells, axis=1)}


def statistics(error: Float[np.ndarray, "seeds n"], where: dict[str, np.ndarray]) -> dict:
    """What the record says of a split."""
    mean, order = error.mean(0), np.argsort(where["distance"])
    alike = np.corrcoef(error)[np.triu_indices(len(error), 1)]
    return {
        "mean": float(mean.mean()),
        "median": float(np.median(mean)),
        "spearman_distance": float(spearmanr(mean, where["distance"])[0]),
        "spearman_radius": float(spearmanr(mean, where["radius"])[0]),
        "quarters_by_distance": [float(q.mean()) for q in np.array_split(mean[order], 4)],
        "median_distance": float(np.median(where["distance"])),
        "correlation_of_seeds": float(alike.mean()) if len(alike) else None,
    }


def draw(path: Path, found: dict[str, tuple]) -> None:
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for name, (error, where) in found.items():
        label = f"{name}: mean {error.mean():.2%}"
        axis.scatter(where["distance"], error.mean(0), s=9, alpha=0.6, lw=0, label=label)
    axis.set(xlabel=f"distance to the {NEAREST} nearest training cells", ylabel="rel-L2")
    axis.set_yscale("log")
    axis.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments=None) -> None:
    args = parse(arguments)
    began, surrogate = time.perf_counter(), load_run(args.run)
    if surrogate.problem != "elasticity":
        raise ValueError(f"run must be one of elasticity, got one of {surrogate.problem}")
    problem = load_data(surrogate, args.cache)
    params = load(args.run / "checkpoints")["state"]["params"]
    errors = Errors(surrogate.apply, surrogate.y_normalizer)
    some = jax.tree.map(lambda a: a[: args.train], problem.train)
    place = coordinates(problem.train.x)  # normalised or not: the components are scaled
    train, found = place(problem.train.x), {}
    for name, split in (("training", some), ("validation", problem.valid), ("test", problem.test)):
        if split is not None:
            where = distances(train, place(split.x), own=name == "training")
            with jax.default_matmul_precision("highest"):
                found[name] = errors(params, split)["rel_l2"], where
    rows = [{"split": name, **statistics(*pair)} for name, pair in found.items()]
    given = sys.argv[1:] if arguments is None else list(map(str, arguments))
    given[given.index(str(args.run))] = "RUN"
    records.write(
        args.out,
        rows,
        command=records.command("elasticity_errors", given),
        seconds=time.perf_counter() - began,
        precision="float32",
        training_cells=len(problem.train.x),
        components=train.shape[1],
    )
    draw(args.out.with_suffix(".png"), found)
    table = Table("split", "mean", "quarters by distance", "rank correlation", "between seeds")
    for r in rows:
        quarters = ", ".join(f"{1e3 * q:.2f}" for q in r["quarters_by_distance"])
        alike = r["correlation_of_seeds"]
        cells = [f"{1e3 * r['mean']:.2f}", quarters, f"{r['spearman_distance']:.2f}"]
        table.add_row(r["split"], *cells, "" if alike is None else f"{alike:.2f}")
    Console().print("rel-L2 x 1000", table)


if __name__ == "__main__":
    main()
