"""The programs of a training run: which steps a call of the device takes, and on which samples.

One call runs a `lax.scan` over a chunk of an epoch's steps. Where samples differ in size there is a
program for each bucket of them, and a call for every few steps on one bucket. The samples live on
the device; training samples larger than DEVICE_BYTES stay on the host, and the batches of the next
calls travel while one runs.
"""

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from flare_jax import parallel
from flare_jax.data.buckets import Plan, batches, make_plan, take_samples
from flare_jax.ops.fused.mlp_plans import SEEDS
from flare_jax.problems.problem import Problem, Split, buckets_of
from flare_jax.train.config import Config
from flare_jax.train.step import TrainState, make_train_step, surrogate_loss

DEVICE_BYTES = 4 * 2**30  # larger training sets stay on the host
AHEAD = 3  # calls that wait on the device while the host prepares the next
# Steps in a call where a bucket or a batch must follow another. A call hands over 1,267 arrays for
# eight blocks (parameters, their average, two moments): 3 to 7 ms of the host's time.
RUN = 8


def plan_of(problem: Problem, config: Config, ranks: int = 1) -> Plan:
    """What an epoch takes of each bucket; a single one on the device is one call after another."""
    t, single = config.train, len(buckets_of(problem.train)) == 1
    run = t.chunk_steps if single and fits(problem) else min(RUN, t.chunk_steps)
    return make_plan(problem.train, t.batch_size, t.batch_tokens, ranks, run)


def fits(problem: Problem) -> bool:
    """Whether the training samples are kept on the device."""
    arrays = (a for split in buckets_of(problem.train) for a in split if a is not None)
    return sum(a.nbytes for a in arrays) <= DEVICE_BYTES


def make_steps(problem, config, plan, tx, apply, run, mesh, fsdp) -> Callable:
    """`(state, done) -> (state, metrics [seeds, length])`: the next steps after step `done`.

    They are whole runs of the plan, within the epoch, and chunk_steps at most.
    """
    buckets, resident = buckets_of(problem.train), fits(problem)
    placed = [parallel.place_samples(split, mesh) for split in buckets] if resident else None
    keys = np.asarray(run.keys)

    def arguments(bucket, rows):
        if resident:
            return placed[bucket], rows
        samples = take_samples(buckets[bucket], rows.ravel())
        rows = np.arange(rows.size, dtype=rows.dtype).reshape(rows.shape)
        return parallel.place_samples(samples, mesh), rows

    make = functools.partial(make_program, problem, config, tx, apply, run.y_normalizer)
    programs = [make(bucket, run.state, mesh, fsdp) for bucket in buckets]
    if len(buckets) > 1:
        sizes = zip(plan.runs, plan.batches, strict=True)
        first = [np.zeros((len(keys), *size), np.int32) for size in sizes]
        programs = compiled(programs, [(run.state, *arguments(*a)) for a in enumerate(first)])

    def chunk(state, done):
        values, left = [], config.train.chunk_steps
        for bucket, rows in batches(plan, keys, done):
            left -= rows.shape[1]
            if left < 0:
                break
            state, value = programs[bucket](state, *arguments(bucket, rows))
            values.append(value)
            if len(values) >= AHEAD:
                jax.block_until_ready(values[-AHEAD])
        values = jax.device_get(values)
        return state, {name: np.concatenate([v[name] for v in values], 1) for name in values[0]}

    return chunk


def compiled(programs: Sequence[Callable], arguments: Sequence[tuple]) -> list[Callable]:
    """The jitted programs, compiled side by side: each keeps a core busy, and memory.

    Tracing is Python's, one after another; a program compiles while the next ones are traced.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        each = zip(programs, arguments, strict=True)
        found = [pool.submit(program.lower(*args).compile) for program, args in each]
    return [future.result() for future in found]


def make_program(problem, config, tx, apply, y_normalizer, bucket, state, mesh, fsdp) -> Callable:
    """`make_chunk`'s function for samples of a bucket's size, and for states like `state`."""
    loss = surrogate_loss(
        parallel.model_over(apply, mesh),
        parallel.loss_over(problem.loss, mesh, bucket.y.shape[1]),
        jax.tree.map(np.asarray, y_normalizer),
    )
    value_and_grad = parallel.value_and_grad(mesh, fsdp)
    train_step = make_train_step(loss, tx, config.optimizer.ema_decay, value_and_grad)
    t, size = config.train, bucket.y.shape[1]
    points = t.seeds * max(t.batch_size * size, t.batch_tokens or 0)
    options = {"compiler_options": parallel.compiler_options(points, mesh)}
    if mesh is not None:
        shardings = jax.tree.map(lambda x: x.sharding, state)
        options["out_shardings"] = shardings, NamedSharding(mesh, PartitionSpec())
    return make_chunk(train_step, **options)


def make_chunk(train_step: Callable, **options) -> Callable:
    """Jits `(state, samples, rows [seeds, length, batch]) -> (state, metrics [seeds, length])`.

    A step for each batch of rows. `options` are those of `jax.jit`.
    """

    def chunk(state: TrainState, samples: Split, rows):
        take = lambda rows: jax.tree.map(lambda a: a[rows], samples)
        return jax.lax.scan(lambda state, rows: train_step(state, take(rows)), state, rows)

    seeds = jax.vmap(chunk, in_axes=(0, None, 0), axis_name=SEEDS)
    return jax.jit(seeds, donate_argnums=0, **options)
