"""The training loop: seeds side by side, chunks of steps on the device, checkpoints, one summary.

Every array of a run has a leading axis of seeds, trained together by `vmap`. What one call of the
device takes is in `programs.py`. The order of an epoch follows from (seed, epoch) alone
(`data/buckets.py`), so a resumed run sees what an undisturbed one sees. On many devices the same
code runs on arrays spread over them: see `parallel.py`.
"""

import contextlib
import functools
import gc
import io
import json
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console

from flare_jax import parallel
from flare_jax.data.buckets import waste
from flare_jax.models.flare import FLAREModel
from flare_jax.models.functional import Params, functional, num_parameters
from flare_jax.problems.problem import Normalizer, Problem, buckets_of, count_of
from flare_jax.train.checkpoint import (
    CheckpointError,
    Checkpoints,
    other_configuration,
    steps_in,
)
from flare_jax.train.config import Config, differences, read_config, to_dict
from flare_jax.train.errors import Errors
from flare_jax.train.log import MetricsFile, progress_bar
from flare_jax.train.optimizer import make_optimizer
from flare_jax.train.programs import make_steps, plan_of
from flare_jax.train.step import TrainState, init_state

# "tf32" is three bfloat16 products (2^-16), as in the kernels; TF32 itself has 2^-11
MATMUL = {"float32": "highest", "tf32": "BF16_BF16_F32_X3", "bfloat16": "bfloat16"}

CHECKPOINTS, RESULT = "checkpoints", "result.json"  # in a run's folder


class NonFiniteError(RuntimeError):
    """The loss or the gradient stopped being a number."""


class Interrupted(RuntimeError):
    """SIGINT or SIGTERM arrived; the state was saved."""


class Best(NamedTuple):
    """The parameters with the smallest validation error so far, per seed."""

    params: Params
    error: jax.Array  # [seeds] validation rel-L2; infinite before the first validation
    step: jax.Array  # [seeds]
    averaged: jax.Array  # [seeds] True: these are averaged parameters


class Run(NamedTuple):
    """Everything that a checkpoint holds."""

    state: TrainState
    best: Best
    keys: jax.Array  # [seeds, 2] key data of the sample order
    x_normalizer: Normalizer
    y_normalizer: Normalizer


def build(config: Config, in_dim: int, out_dim: int, seed: int = 0) -> tuple[Callable, Params]:
    """`(apply, params)` of the configured model, computing in the configured precision."""
    dtype = jnp.bfloat16 if config.train.precision == "bfloat16" else jnp.float32
    rngs = nnx.Rngs(seed)
    return functional(FLAREModel(config.model, in_dim, out_dim, dtype=dtype, rngs=rngs))


def start(problem: Problem, config: Config, tx) -> tuple[Callable, Run]:
    """The model's `apply` and the run before its first step."""
    widths = len(problem.inputs), len(problem.targets)
    seeds = range(config.train.seed, config.train.seed + config.train.seeds)
    models = [build(config, *widths, seed) for seed in seeds]
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
    params, count = stack([params for _, params in models]), len(models)
    state = jax.vmap(functools.partial(init_state, tx=tx))(params)
    best = Best(
        params=jax.tree.map(jnp.copy, params),
        error=jnp.full(count, jnp.inf),
        step=jnp.zeros(count, jnp.int32),
        averaged=jnp.zeros(count, bool),
    )
    keys = stack([jax.random.key_data(jax.random.key(seed)) for seed in seeds])
    as_arrays = lambda normalizer: jax.tree.map(jnp.asarray, normalizer)
    return models[0][0], Run(
        state, best, keys, as_arrays(problem.x_normalizer), as_arrays(problem.y_normalizer)
    )


@functools.partial(jax.jit, donate_argnums=0)
def better(best: Best, state: TrainState, raw: jax.Array, averaged: jax.Array) -> Best:
    """The best so far, given the validation errors [seeds] of raw and averaged parameters."""
    for params, error, flag in ((state.params, raw, False), (state.ema, averaged, True)):
        wins = error < best.error
        choose = lambda a, b, wins=wins: jnp.where(
            wins.reshape(-1, *[1] * (a.ndim - 1)), a.astype(b.dtype), b
        )
        new = Best(params, error, state.step, jnp.full_like(best.averaged, flag))
        best = jax.tree.map(choose, new, best)
    return best


def fit(
    problem: Problem,
    config: Config,
    folder: Path,
    *,
    resume: bool = False,
    mesh: Mesh | None = None,
    fsdp: bool = False,
) -> dict:
    """Trains, and returns and writes the summary `result.json`.

    Args:
        problem: samples, normalisers and loss.
        config: everything that decides the numbers.
        folder: gets config.json, metrics.jsonl, checkpoints/ and result.json. Several processes
            share it.
        resume: continue from the newest checkpoint, to the numbers of a run that never stopped.
        mesh: devices to train on, from `parallel.make_mesh`; None is one device.
        fsdp: keep parameters and optimizer state in parts over the mesh's "data" axis.

    Raises:
        NonFiniteError: names step, learning rate, seed and the last good checkpoint.
        CheckpointError: the folder cannot be written, or holds another configuration.
        Interrupted: after a signal, once the state is saved.
        ValueError: the batch is larger than the training split, the folder holds a run, or the
            mesh does not divide the batch.
    """
    t, samples = config.train, count_of(problem.train)
    if t.batch_size > samples:
        raise ValueError(f"batch_size must be at most the {samples} samples, got {t.batch_size}")
    if mesh is not None and t.batch_tokens is None and t.batch_size % mesh.shape[parallel.DATA]:
        raise ValueError(
            f"data={mesh.shape[parallel.DATA]} of the mesh must divide the batch of {t.batch_size}"
        )
    folder = check_folder(folder, problem.name, config, resume)
    with (
        Checkpoints(folder / CHECKPOINTS) as checkpoints,
        jax.default_matmul_precision(MATMUL[t.precision]),
    ):
        return _fit(problem, config, folder, checkpoints, resume, mesh, fsdp)


def check_folder(folder: Path | str, problem: str, config: Config, resume: bool) -> Path:
    """The folder of a run, made if need be: what can be told of it before there are samples.

    Raises:
        CheckpointError: it cannot be written; or is to be resumed, and holds no checkpoint or the
            run of another configuration or problem.
        ValueError: it holds a run that is not to be resumed.
    """
    folder = writable(folder)
    steps = steps_in(folder / CHECKPOINTS)
    if not resume:
        if steps:
            raise ValueError(f"{folder} already holds a run: resume it or choose another folder")
        return folder
    if not steps:
        raise CheckpointError(f"no checkpoint to resume from in {folder / CHECKPOINTS}")
    now = {"name": problem, **to_dict(config)}
    changed = differences(deciding(read_config(folder)), deciding(now))
    if changed:
        raise CheckpointError(other_configuration(folder, changed))
    return folder


def deciding(plain: dict) -> dict:
    """Of a config.json what decides the numbers: not where generated samples are kept."""
    plain = {name: value for name, value in plain.items() if name != "fields"}
    problem = {name: x for name, x in plain["problem"].items() if name != "cache"}
    return plain | {"problem": problem}


def writable(folder: Path | str) -> Path:
    """The folder, made if need be; raises CheckpointError if it cannot be written."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if parallel.is_main():
            probe = folder / ".writable"
            probe.touch()
            probe.unlink()
    except OSError as error:
        raise CheckpointError(f"cannot write into {folder}: {error.strerror or error}") from error
    return folder


def _fit(problem, config, folder, checkpoints, resume, mesh, fsdp) -> dict:
    t, plain = config.train, {"name": problem.name, **to_dict(config)}
    ranks = 1 if mesh is None else mesh.shape[parallel.DATA]
    plan = plan_of(problem, config, ranks)
    per_epoch = plan.per_epoch
    steps = t.epochs * per_epoch
    # the devices may have changed the batches, and with them all that follows
    saved = deciding(plain) | {"batches": list(plan.batches), "steps in an epoch": per_epoch}
    tx = make_optimizer(config.optimizer, steps, parts=fsdp)
    apply, run = start(problem, config, tx)
    if mesh is not None:
        run = parallel.place(run, mesh, parallel.parameter_specs(run, mesh, fsdp))
    if resume:
        kept = read_config(folder).get("fields", {}).get("samples")  # older runs kept none
        problem.check_contents(kept, config.problem.data)
        run = checkpoints.restore(run, saved)
    done = int(run.state.step[0])
    if done == steps and (folder / RESULT).exists():
        return json.loads((folder / RESULT).read_text())
    if parallel.is_main():
        text = json.dumps(plain | {"fields": fields(problem)}, indent=2)
        (folder / "config.json").write_text(text + "\n")

    chunk = make_steps(problem, config, plan, tx, apply, run, mesh, fsdp)
    y_normalizer = jax.tree.map(np.asarray, run.y_normalizer)
    errors_by_name = {"rel_l2": problem.rel_l2, **problem.metrics}
    errors = Errors(apply, y_normalizer, mesh, errors_by_name)

    times, began, main = [], time.perf_counter(), parallel.is_main()
    metrics = MetricsFile(folder / "metrics.jsonl" if main else Path(os.devnull), done)
    progress = progress_bar(None if main else Console(file=io.StringIO()))
    status, caught = {}, []
    stopping = lambda: parallel.any_process(bool(caught))
    with contextlib.closing(metrics), progress, signals(caught), frozen():
        bar = progress.add_task("", total=t.epochs, completed=done // per_epoch, status="")
        while done < steps:
            tick = time.perf_counter()
            state, values = chunk(run.state, done)
            run = run._replace(state=state)
            length = values["loss"].shape[1]
            times.append((time.perf_counter() - tick) / length)
            check_finite(values, done, config, checkpoints)
            done += length
            line = {name: float(np.mean(x)) for name, x in values.items()}
            metrics.write(step=done, epoch=done / per_epoch, seconds=times[-1] * length, **line)
            status["loss"] = line["loss"]
            due = done % (per_epoch * t.eval_every) == 0 or done == steps
            stop = stopping()  # saved as it is: a validation now would be one more than undisturbed
            if due and problem.valid is not None:
                raw = errors(run.state.params, problem.valid)["rel_l2"].mean(1)
                averaged = errors(run.state.ema, problem.valid)["rel_l2"].mean(1)
                run = run._replace(best=better(run.best, run.state, raw, averaged))
                metrics.write(step=done, valid=raw.tolist(), valid_ema=averaged.tolist())
                status["valid rel-L2"] = float(run.best.error.mean())
            if due or stop:
                checkpoints.save(done, run, saved)
            text = "  ".join(f"{name} {value:.4g}" for name, value in status.items())
            progress.update(bar, completed=done / per_epoch, status=text)
            if (stop or stopping()) and checkpoints.begun == done:
                checkpoints.wait()
                raise Interrupted(f"stopped by a signal at step {done}; saved, resume to go on")
    checkpoints.wait()
    seconds = metrics.seconds + time.perf_counter() - began
    return summarise(problem, config, folder, errors, run, seconds, times, mesh)


def fields(problem: Problem) -> dict:
    """What a run's user must know of its data: names of the columns, size of the largest sample,
    and what its splits hold.
    """
    largest = max(
        split.x.shape[1] if split.mask is None else int(split.mask.sum(1).max())
        for split in buckets_of(problem.train)
    )
    names = {"inputs": problem.inputs, "targets": problem.targets}
    return names | {"points": largest, "samples": problem.contents}


def check_finite(values: dict, done: int, config: Config, checkpoints: Checkpoints) -> None:
    """Raises NonFiniteError for the first step whose loss or gradient norm is not finite."""
    bad = ~(np.isfinite(values["loss"]) & np.isfinite(values["grad_norm"]))
    if not bad.any():
        return
    step = int(np.argmax(bad.any(0)))
    seed = int(np.argmax(bad[:, step]))
    checkpoints.wait()
    last = checkpoints.latest
    raise NonFiniteError(
        f"step {done + step}, seed {config.train.seed + seed}: loss {values['loss'][seed, step]}, "
        f"gradient norm {values['grad_norm'][seed, step]}, "
        f"learning rate {values['learning_rate'][seed, step]:.3g}; last good checkpoint: "
        + ("none" if last is None else f"step {last} in {checkpoints.folder}")
    )


@contextlib.contextmanager
def signals(caught: list[int]):
    """Adds SIGINT and SIGTERM to `caught` when they arrive (main thread only)."""
    kinds = (signal.SIGINT, signal.SIGTERM)
    try:
        before = {
            kind: signal.signal(kind, lambda number, _: caught.append(number)) for kind in kinds
        }
    except ValueError:  # not the main thread: leave signals alone
        yield
        return
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


@contextlib.contextmanager
def frozen():
    """What tracing left is not searched for garbage: 0.2 s every hundred calls or two, which is
    for samples on the host, with a call for each step or a few.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def summarise(problem, config, folder, errors, run, seconds, times, mesh) -> dict:
    """Test errors of the chosen, last and averaged parameters, and what the run cost."""
    candidates = {"last": run.state.params, "ema": run.state.ema}
    if problem.valid is not None:
        candidates["best"] = run.best.params
    found = {name: errors(p, problem.test) for name, p in candidates.items()}
    chosen = "best" if "best" in found else "last"
    per_seed = lambda metric: {name: e[metric].mean(1).tolist() for name, e in found.items()}
    spread = lambda x: {"mean": float(np.mean(x)), "std": float(np.std(x)), "seeds": x}
    spreads = lambda metric: {name: spread(x) for name, x in per_seed(metric).items()}
    memory = jax.local_devices()[0].memory_stats() or {}
    result = {
        "problem": problem.name,
        "test_rel_l2": float(np.mean(per_seed("rel_l2")[chosen])),
        "chosen": chosen,
        "rel_l2": spreads("rel_l2"),
        **{metric: spreads(metric) for metric in problem.metrics},
        "valid_rel_l2": None if problem.valid is None else run.best.error.tolist(),
        "mean_predictor_rel_l2": problem.mean_error,
        "parameters": num_parameters(run.state.params) // config.train.seeds,
        "steps": int(run.state.step[0]),
        "padding": waste(problem.train),  # padded points over real ones, less 1
        "milliseconds_per_step": 1e3 * float(np.median(times[1:])) if times[1:] else None,
        "seconds": seconds,  # of this process, and of the steps of those before it
        "peak_bytes": memory.get("peak_bytes_in_use"),
        "device": jax.devices()[0].device_kind,
        "mesh": None if mesh is None else dict(mesh.shape),
        "precision": config.train.precision,
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "config": to_dict(config),
    }
    if not math.isfinite(result["test_rel_l2"]):
        raise NonFiniteError(f"the test error is {result['test_rel_l2']}")
    if parallel.is_main():
        (folder / RESULT).write_text(json.dumps(result, indent=2) + "\n")
    return result
