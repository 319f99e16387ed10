"""How the mixers' spectra move with latents M, points N, depth and training time, on Darcy flow.

    python -m experiments.spectrum --out experiments/results/spectrum.json   on two CPU cores
    python -m experiments.spectrum --smoke                                   seconds, learns nothing

The base model is smaller and trained shorter than the `small` preset (BASE below). One thing is
changed at a time and the model trained anew from each seed: latents, blocks, points of the grid it
trains on. Training time is followed within the base runs; `other grid` evaluates the base model,
trained on one grid, on others. Spectra are of the first test samples, in float64.
"""

import argparse
import functools
import sys
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from experiments.records import command, write
from flare_jax.models.flare import FLAREConfig, FLAREModel
from flare_jax.models.functional import functional
from flare_jax.ops.spectrum import effective_rank
from flare_jax.plots import plt
from flare_jax.predict import Surrogate
from flare_jax.problems import darcy
from flare_jax.problems.metrics import rel_l2
from flare_jax.problems.problem import Problem, Split
from flare_jax.spectra import model_spectra, summary
from flare_jax.train.config import Config, TrainConfig
from flare_jax.train.optimizer import OptimizerConfig, make_optimizer
from flare_jax.train.step import init_state, make_train_step, surrogate_loss

BASE = dict(channel_dim=32, num_heads=4, num_latents=64, num_blocks=2)
DATA = dict(grid=141, stride=5, num_train=200, num_valid=0, num_test=20)
SAMPLES, BATCH, EPOCHS = 4, 2, 12  # test samples looked at, samples a step, passes
MOMENTS = (0, 0.02, 0.1, 0.3, 1)  # parts of the base training after which spectra are taken
SWEEPS = {
    "latents M": [dict(num_latents=m) for m in (16, 64, 256)],
    "blocks": [dict(num_blocks=b) for b in (1, 2, 4)],
    "points N": [dict(stride=s) for s in (10, 5)],
}
OTHER_STRIDES = (10, 5, 2)  # grids on which the base model is looked at as well


def train(problem: Problem, data: dict, model: dict, epochs: int, seed: int, moments=(1,)):
    """Yields (part of the training done, surrogate) at each of `moments`.

    The next step takes the surrogate's parameters away: use it before going on.
    """
    optimizer = OptimizerConfig(learning_rate=2e-3)
    config = Config(darcy.DarcyConfig(**data), FLAREConfig(**model), optimizer, TrainConfig())
    steps = epochs * len(problem.train.x) // BATCH
    tx = make_optimizer(optimizer, steps)
    widths = len(problem.inputs), len(problem.targets)
    apply, params = functional(FLAREModel(config.model, *widths, rngs=nnx.Rngs(seed)))
    loss = surrogate_loss(apply, problem.loss, problem.y_normalizer)
    step, state = make_train_step(loss, tx, optimizer.ema_decay), init_state(params, tx)
    predict = jax.jit(apply)
    normalizers = problem.x_normalizer, problem.y_normalizer
    rng, order = np.random.default_rng(seed), np.arange(0)
    for done in range(steps + 1):
        for moment in moments:
            if done == round(moment * steps):
                yield moment, Surrogate("darcy", config, predict, state.params, *normalizers)
        if done == steps:
            return
        if len(order) < BATCH:
            order = rng.permutation(len(problem.train.x))
        rows, order = order[:BATCH], order[BATCH:]
        state, _ = step(state, Split(problem.train.x[rows], problem.train.y[rows]))


def look(surrogate: Surrogate, problem: Problem, **labels) -> dict:
    """One row of the result: test error and spectra of the first test samples."""
    x = problem.x_normalizer.decode(problem.test.x)
    found = model_spectra(surrogate, x[:SAMPLES])
    with jax.enable_x64(True):
        ranks = np.asarray(effective_rank(found.eigenvalues))
    fields = surrogate.apply(surrogate.params, surrogate.x_normalizer.encode(x))
    error = float(np.mean(rel_l2(surrogate.y_normalizer.decode(fields), problem.test.y)))
    blocks = summary(found)
    curves = np.median(found.eigenvalues, axis=(1, 2))  # [blocks, M]
    ranges = np.stack([ranks.min((1, 2)), ranks.max((1, 2))], 1)
    for block, curve, span in zip(blocks, curves, ranges, strict=True):
        block |= {"effective_rank_range": span.tolist(), "median_eigenvalues": curve.tolist()}
    return {**labels, "N": x.shape[1], "test_rel_l2": error, "blocks": blocks}


def run(seeds: int, epochs: int, base: dict, data: dict, sweeps: dict, strides) -> list[dict]:
    """All rows; each training is done once for each seed."""
    rows = []

    def add(model: Surrogate, problem: Problem, **labels) -> None:
        rows.append(look(model, problem, **labels))
        say(rows[-1])

    for seed in range(seeds):
        problem = load(**data)
        for part, trained in train(problem, data, base, epochs, seed, MOMENTS):
            add(trained, problem, sweep="training", value=part, seed=seed)
        for other in (load(**data | {"stride": stride}) for stride in strides):
            add(trained, other, sweep="other grid, N", value=other.test.x.shape[1], seed=seed)
        for sweep, changes in sweeps.items():
            for change in changes:
                part = lambda old, change=change: old | {k: change[k] for k in old.keys() & change}
                new = part(data), part(base)
                problem, last = load(**new[0]), trained
                if new != (data, base):
                    ((_, last),) = train(problem, *new, epochs, seed)
                value = problem.test.x.shape[1] if "stride" in change else [*change.values()][0]
                add(last, problem, sweep=sweep, value=value, seed=seed)
    return rows


@functools.cache
def load(**data) -> Problem:
    return darcy.load(darcy.DarcyConfig(**data))


def say(row: dict) -> None:
    ranks = ", ".join(f"{b['effective_rank']:.1f}" for b in row["blocks"])
    text = f"seed {row['seed']}  {row['sweep']} {row['value']:g}: rank {ranks}"
    print(f"{text}, rel-L2 {row['test_rel_l2']:.4f}", file=sys.stderr, flush=True)


def show(rows: list[dict]) -> None:
    """Means over seeds."""
    table = Table(title="per block: effective rank, λ₂ (medians over samples and heads)")
    for name in ("", "value", "test rel-L2", "effective rank", "λ₂", "averaging heads"):
        table.add_column(name)
    for (sweep, value), same in grouped(rows).items():
        mean = lambda name, same=same: np.mean([[b[name] for b in r["blocks"]] for r in same], 0)
        join = lambda values, form: ", ".join(format(x, form) for x in values)
        table.add_row(
            sweep,
            f"{value:g}",
            f"{np.mean([r['test_rel_l2'] for r in same]):.4f}",
            join(mean("effective_rank"), ".1f"),
            join(mean("second_eigenvalue"), ".2g"),
            join(mean("averaging_heads"), ".0%"),
        )
    Console(width=110).print(table)


def grouped(rows: list[dict]) -> dict:
    """{(sweep, value): rows of all seeds}."""
    found: dict = {}
    for row in rows:
        found.setdefault((row["sweep"], row["value"]), []).append(row)
    return found


def figure(path: Path, rows: list[dict]) -> None:
    """Median eigenvalues of the last block for each value of each sweep; a line a seed."""
    sweeps = list(dict.fromkeys(row["sweep"] for row in rows))
    figure, axes = plt.subplots(
        1, len(sweeps), figsize=(3 * len(sweeps), 3.2), sharey=True, layout="constrained"
    )
    for axis, sweep in zip(axes, sweeps, strict=True):
        values = list(dict.fromkeys(row["value"] for row in rows if row["sweep"] == sweep))
        for row in (row for row in rows if row["sweep"] == sweep):
            curve = np.array(row["blocks"][-1]["median_eigenvalues"])
            colour = plt.get_cmap("viridis")(
                0.9 * values.index(row["value"]) / max(1, len(values) - 1)
            )
            label = f"{row['value']:g}" if row["seed"] == 0 else None
            axis.semilogy(np.arange(1, len(curve) + 1), curve, color=colour, label=label, lw=1.2)
        axis.set(title=sweep, xlabel="number", ylim=(1e-14, 3), xscale="log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", loc="lower left")
    axes[0].set_ylabel("eigenvalue, last block")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments=None) -> list[dict]:
    parser = argparse.ArgumentParser(prog="python -m experiments.spectrum")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--smoke", action="store_true", help="tiny models, hardly trained")
    parser.add_argument("--out", type=Path, help="JSON to write; the figure goes beside it")
    args = parser.parse_args(arguments)
    began = time.perf_counter()
    settings = dict(base=BASE, data=DATA, sweeps=SWEEPS, strides=OTHER_STRIDES)
    if args.smoke:
        base = dict(channel_dim=8, num_heads=1, num_latents=4, num_blocks=1)
        data = dict(grid=9, stride=1, num_train=4, num_valid=0, num_test=2)
        sweeps = {"latents M": [dict(num_latents=2)]}
        settings = dict(base=base, data=data, sweeps=sweeps, strides=(2,))
        args.seeds, args.epochs = 1, 1
    rows = run(args.seeds, args.epochs, **settings)
    show(rows)
    seconds = time.perf_counter() - began
    print(f"{seconds:.0f} s")
    if args.out:
        base = settings["base"] | settings["data"] | {"epochs": args.epochs, "batch": BATCH}
        facts = dict(precision="training float32, spectra float64", seeds=[*range(args.seeds)])
        how = dict(command=command("spectrum", arguments), seconds=seconds)
        write(args.out, rows, **how, **facts, base=base)
        figure(args.out.with_suffix(".png"), rows)
    return rows


if __name__ == "__main__":
    main()
