"""FLARE beside a Fourier neural operator on real Darcy data that others made, 16 x 16 nodes.

    pip install torch neuraloperator  # beside this package; their CPU builds suffice
    python -m experiments.darcy_16 --data FOLDER  # with darcy_train_16.npz and darcy_test_16.npz

The FNO is that of the `neuraloperator` package, whose project also made the data; its settings
start from that project's own Darcy recipe. Both models see the same samples, normalisation,
epochs and batches, and keep the parameters, raw or averaged, that are best on validation. Each
gets as many configurations, trained for `search_epochs`; the best on validation is trained anew
for `epochs` with several seeds, and only that is measured on the test samples. FLARE trains by
JAX on its default device, the FNO by PyTorch on the CPU, both in float32. About 46 minutes on one
CPU core.
"""

import copy
import dataclasses
import datetime
import json
import platform
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from flare_jax.models.flare import FLAREConfig
from flare_jax.predict import load_run
from flare_jax.problems import darcy
from flare_jax.problems.metrics import rel_l2
from flare_jax.problems.problem import Problem, Split
from flare_jax.train.config import TrainConfig, config_class
from flare_jax.train.log import progress_bar
from flare_jax.train.loop import fit
from flare_jax.train.optimizer import OptimizerConfig

try:
    import torch
    from neuralop import H1Loss, LpLoss
    from neuralop.models import FNO
except ImportError as error:
    raise SystemExit(
        f"experiments.darcy_16 needs the packages torch and neuraloperator ({error}): "
        "pip install torch neuraloperator"
    ) from error

EVAL_EVERY = 5  # epochs between validations

FLARE_CHOICES = [  # loss: l2 is rel-L2 of u; derivative is the package's, with 0.1 of du/dx, du/dy
    base := dict(channel_dim=32, num_blocks=4, num_latents=32, learning_rate=2e-3)
    | dict(loss="derivative"),
    base | dict(loss="l2"),
    base | dict(learning_rate=5e-3),
    base | dict(channel_dim=64, num_blocks=2),
]
FNO_CHOICES = [  # the first has the library's Darcy settings; n_modes 16 keeps every mode
    base := dict(n_modes=16, hidden_channels=32, norm="group_norm", learning_rate=5e-3)
    | dict(loss="h1"),
    base | dict(loss="l2"),
    base | dict(learning_rate=2e-3),
    base | dict(n_modes=8, hidden_channels=48),
]


@dataclasses.dataclass(frozen=True)
class Options:
    """FLARE beside a Fourier neural operator on Darcy data of 16 x 16 nodes."""

    data: Path  # folder with darcy_train_16.npz and darcy_test_16.npz
    out: Path = Path("experiments/results/darcy_16.json")  # file to write
    num_train: int = 900  # training samples
    num_valid: int = 100  # validation samples, those after them
    num_test: int = 50  # test samples
    epochs: int = 80  # of the runs that are measured
    search_epochs: int = 25  # of the runs that choose a configuration
    batch_size: int = 10  # samples a step
    seeds: int = 2  # runs of the chosen configuration

    @property
    def problem(self) -> darcy.DarcyConfig:
        sizes = {f"num_{n}": getattr(self, f"num_{n}") for n in ("train", "valid", "test")}
        return darcy.DarcyConfig(data=self.data, **sizes)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model after its training."""

    predict: Callable[[Split], np.ndarray]  # fields in physical units [n, N, 1]
    valid: float  # rel-L2 on validation of the parameters that were kept
    parameters: int  # real numbers
    seconds: float


def train_flare(problem: Problem, options: Options, choice: dict, epochs: int, seed: int):
    """FLARE by the package's own loop and recipe."""
    values = dict(choice)
    optimizer = OptimizerConfig(learning_rate=values.pop("learning_rate"))
    if values.pop("loss") == "l2":
        problem = dataclasses.replace(problem, loss=rel_l2)
    train = TrainConfig(
        epochs=epochs, batch_size=options.batch_size, seed=seed, eval_every=EVAL_EVERY
    )
    config = config_class(problem.name)(
        problem=options.problem, model=FLAREConfig(**values), optimizer=optimizer, train=train
    )
    with tempfile.TemporaryDirectory() as folder:
        result = fit(problem, config, Path(folder))
        surrogate = load_run(folder)
    predict = lambda split: surrogate(surrogate.x_normalizer.decode(split.x))
    return Trained(predict, result["valid_rel_l2"][0], result["parameters"], result["seconds"])


def train_fno(problem: Problem, options: Options, choice: dict, epochs: int, seed: int):
    """A Fourier neural operator: AdamW, cosine schedule, loss on physical fields."""
    torch.manual_seed(seed)
    began, modes = time.perf_counter(), (choice["n_modes"],) * 2
    model = FNO(modes, 1, 1, choice["hidden_channels"], norm=choice["norm"])  # adds positions
    optimizer = torch.optim.AdamW(model.parameters(), choice["learning_rate"], weight_decay=1e-4)
    per_epoch = options.num_train // options.batch_size
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * per_epoch)
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(OptimizerConfig().ema_decay)
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average)
    loss = {"h1": H1Loss, "l2": LpLoss}[choice["loss"]](d=2, reduction="mean")
    x, y = fno_inputs(problem, problem.train), torch.from_numpy(problem.train.y)
    decode = lambda u: u * float(problem.y_normalizer.std[0]) + float(problem.y_normalizer.mean[0])
    best, lowest = None, float("inf")
    with progress_bar() as progress:
        bar = progress.add_task("", total=epochs, status="")
        for epoch in range(1, epochs + 1):
            order = torch.randperm(len(x))[: per_epoch * options.batch_size]
            for rows in order.split(options.batch_size):
                optimizer.zero_grad()
                value = loss(decode(model(x[rows])), y[rows].reshape(-1, 1, *problem.shape))
                value.backward()
                optimizer.step()
                schedule.step()
                averaged.update_parameters(model)
            if epoch % EVAL_EVERY == 0 or epoch == epochs:
                for candidate in (model, averaged.module):
                    error = errors(fno_predictor(candidate, problem), problem.valid).mean()
                    if error < lowest:
                        best, lowest = copy.deepcopy(candidate), float(error)
            status = f"loss {value.item():.4g}  valid rel-L2 {lowest:.4g}"
            progress.update(bar, completed=epoch, status=status)
    size = sum(p.numel() * (2 if p.is_complex() else 1) for p in model.parameters())
    return Trained(fno_predictor(best, problem), lowest, size, time.perf_counter() - began)


def fno_inputs(problem: Problem, split: Split) -> torch.Tensor:
    """Normalised coefficient [n, 1, s, s]."""
    return torch.from_numpy(split.x[..., 2].reshape(-1, 1, *problem.shape))


def fno_predictor(model: FNO, problem: Problem) -> Callable[[Split], np.ndarray]:
    @torch.no_grad()
    def predict(split: Split) -> np.ndarray:
        u = model(fno_inputs(problem, split)).numpy()
        return problem.y_normalizer.decode(u.reshape(split.y.shape))

    return predict


def errors(predict: Callable[[Split], np.ndarray], split: Split) -> np.ndarray:
    """rel-L2 of every sample, in physical units."""
    return np.asarray(rel_l2(predict(split), split.y))


def compare(name: str, train: Callable, choices: list[dict], problem: Problem, options: Options):
    """Chooses on validation, trains the chosen with every seed; the record and its test errors."""

    def run(choice: dict, epochs: int, seed: int) -> tuple[Trained, dict]:
        trained = train(problem, options, choice, epochs, seed)
        row = {"seed": seed, "epochs": epochs, "valid_rel_l2": round(trained.valid, 6)}
        row |= {"parameters": trained.parameters, "seconds": round(trained.seconds, 1)}
        text = ", ".join(f"{k} {v}" for k, v in (choice | row).items())
        print(f"{name}: {text}", flush=True)
        return trained, row

    tried = [{"config": c} | run(c, options.search_epochs, seed=0)[1] for c in choices]
    chosen = min(tried, key=lambda t: t["valid_rel_l2"])["config"]
    finals = [run(chosen, options.epochs, seed) for seed in range(options.seeds)]
    test = np.stack([errors(trained.predict, problem.test) for trained, _ in finals])
    rows = [r | {"test_rel_l2": float(e.mean())} for (_, r), e in zip(finals, test, strict=True)]
    record = {
        "chosen": chosen,
        "parameters": rows[0]["parameters"],
        "seconds": float(np.mean([r["seconds"] for r in rows])),
        "valid_rel_l2": float(np.mean([r["valid_rel_l2"] for r in rows])),
        "test_rel_l2": statistics(test.mean(0)) | {"std_over_seeds": float(test.mean(1).std())},
        "runs": rows,
        "search": tried,
    }
    return record, test.mean(0)


def statistics(x: np.ndarray) -> dict:
    """Mean over samples, and its standard error."""
    return {"mean": float(x.mean()), "standard_error": float(x.std(ddof=1) / len(x) ** 0.5)}


def show(record: dict) -> None:
    table = Table("", "test rel-L2", "validation", "parameters", "seconds a run")
    for name in ("FLARE", "FNO"):
        r, e = record[name], record[name]["test_rel_l2"]
        error = f"{e['mean']:.4f} ± {e['standard_error']:.4f}"
        row = error, f"{r['valid_rel_l2']:.4f}", f"{r['parameters']:,}", f"{r['seconds']:.0f}"
        table.add_row(name, *row)
    table.add_row("training mean", f"{record['mean_predictor_rel_l2']:.4f}", "", "", "")
    Console().print(table)
    difference = "{mean:+.4f} ± {standard_error:.4f}".format(**record["FLARE_minus_FNO"])
    print(f"FLARE - FNO, sample by sample: {difference}; ± is the standard error")


def main(options: Options) -> None:
    problem = darcy.load(options.problem)
    flare, flare_errors = compare("FLARE", train_flare, FLARE_CHOICES, problem, options)
    fno, fno_errors = compare("FNO", train_fno, FNO_CHOICES, problem, options)
    arguments = dataclasses.asdict(options) | {"data": options.data.resolve().name}
    flags = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in arguments.items() if k != "out")
    record = {
        "command": f"python -m experiments.darcy_16 {flags}",
        "device": f"FLARE on {jax.devices()[0].device_kind}, FNO on cpu ({platform.machine()})",
        "cpu_threads": torch.get_num_threads(),
        "versions": {n: version(n) for n in ("jax", "flax", "torch", "neuraloperator")},
        "date": datetime.date.today().isoformat(),
        "precision": "float32",
        "seeds": list(range(options.seeds)),
        "mean_predictor_rel_l2": problem.mean_error,
        "FLARE_minus_FNO": statistics(flare_errors - fno_errors),
        "FLARE": flare,
        "FNO": fno,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    show(record)


if __name__ == "__main__":
    main(tyro.cli(Options))
