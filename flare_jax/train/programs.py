"""The programs of a training run: which steps a call of the device takes, and on which samples.

One call runs a `lax.scan` over a chunk of an epoch's steps; where samples differ in size, each step
switches to the gradient of its bucket. The samples live on the device. Training samples larger than
DEVICE_BYTES stay on the host: then there is a program for each bucket, and the batches of the next
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
from flare_jax.data.buckets import Plan, calls, make_plan, take_samples
from flare_jax.ops.fused.mlp_plans import SEEDS
from flare_jax.problems.problem import Problem, Split, buckets_of
from flare_jax.train.config import Config
from flare_jax.train.step import TrainState, make_train_step, surrogate_loss

DEVICE_BYTES = 4 * 2**30  # larger training sets stay on the host
AHEAD = 3  # calls that wait on the device while the host prepares the next
# Steps in a call where batches travel. A call hands over 1,267 arrays for eight blocks (parameters,
# their average, two moments): 3 to 7 ms of the host's time.
RUN = 8


def plan_of(problem: Problem, config: Config, ranks: int = 1) -> Plan:
    """What an epoch takes of each bucket, and how many steps a call: on the device many, of any
    buckets; else those of one bucket, which among several rarely follows itself.
    """
    t, single = config.train, len(buckets_of(problem.train)) == 1
    run = t.chunk_steps if fits(problem) else min(RUN, t.chunk_steps) if single else 1
    return make_plan(problem.train, t.batch_size, t.batch_tokens, ranks, run)


def fits(problem: Problem) -> bool:
    """Whether the training samples are kept on the device."""
    arrays = (a for split in buckets_of(problem.train) for a in split if a is not None)
    return sum(a.nbytes for a in arrays) <= DEVICE_BYTES


def make_steps(problem, config, plan, tx, apply, run, mesh, fsdp) -> Callable:
    """`(state, done) -> (state, metrics [seeds, length])`: the next steps after step `done`.

    They are whole calls of the plan, within the epoch, and chunk_steps at most.
    """
    keys = np.asarray(run.keys)
    make = functools.partial(make_program, problem, config, tx, apply, run, mesh, fsdp)
    buckets = buckets_of(problem.train)
    if fits(problem):
        call = resident(buckets, plan, make, mesh)
    else:
        call = travelling(buckets, plan, make, mesh, run.state)

    def chunk(state, done):
        values, left = [], config.train.chunk_steps
        for which, rows in calls(plan, keys, done):
            left -= len(which)
            if left < 0:
                break
            state, value = call(state, which, rows)
            values.append(value)
            if len(values) >= AHEAD:
                jax.block_until_ready(values[-AHEAD])
        values = jax.device_get(values)
        return state, {name: np.concatenate([v[name] for v in values], 1) for name in values[0]}

    return chunk


def resident(buckets, plan, make, mesh) -> Callable:
    """`(state, which, rows) -> (state, metrics)` on samples that are kept on the device."""
    program = make(buckets, plan.batches)
    placed = tuple(parallel.place_samples(split, mesh) for split in buckets)
    return lambda state, which, rows: program(state, placed, which, rows)


def travelling(buckets, plan, make, mesh, state) -> Callable:
    """`(state, which, rows) -> (state, metrics)` on samples that are taken from the host."""

    def arguments(bucket, rows):
        rows = rows[..., : plan.batches[bucket]]
        samples = take_samples(buckets[bucket], rows.ravel())
        which = np.zeros(rows.shape[1], np.int32)
        taken = np.arange(rows.size, dtype=rows.dtype).reshape(rows.shape)
        return (parallel.place_samples(samples, mesh),), which, taken

    each = zip(buckets, plan.batches, strict=True)
    programs = [make((bucket,), (batch,)) for bucket, batch in each]
    if len(buckets) > 1:
        first = np.zeros((len(state.step), plan.run, max(plan.batches)), np.int32)
        programs = compiled(programs, [(state, *arguments(b, first)) for b in range(len(buckets))])
    return lambda state, which, rows: programs[which[0]](state, *arguments(which[0], rows))


def compiled(programs: Sequence[Callable], arguments: Sequence[tuple]) -> list[Callable]:
    """The jitted programs, compiled side by side: each keeps a core busy, and memory.

    Tracing is Python's, one after another; a program compiles while the next ones are traced.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        each = zip(programs, arguments, strict=True)
        found = [pool.submit(program.lower(*args).compile) for program, args in each]
    return [future.result() for future in found]


def make_program(problem, config, tx, apply, run, mesh, fsdp, buckets, batches) -> Callable:
    """`make_chunk`'s function for samples of these buckets' sizes, and for states like `run`'s."""
    normalizer, model = jax.tree.map(np.asarray, run.y_normalizer), parallel.model_over(apply, mesh)
    losses = [
        surrogate_loss(model, parallel.loss_over(problem.loss, mesh, split.y.shape[1]), normalizer)
        for split in buckets
    ]
    each = parallel.value_and_grad(mesh, fsdp)  # of one of the losses
    value_and_grad = functools.partial(switched, value_and_grad=each, batches=batches)
    train_step = make_train_step(losses, tx, config.optimizer.ema_decay, value_and_grad, fsdp)
    t, size = config.train, max(split.y.shape[1] for split in buckets)
    points = t.seeds * max(t.batch_size * size, t.batch_tokens or 0)
    options = {"compiler_options": parallel.compiler_options(points, mesh)}
    if mesh is not None:
        shardings = jax.tree.map(lambda x: x.sharding, run.state)
        options["out_shardings"] = shardings, NamedSharding(mesh, PartitionSpec())
    return make_chunk(train_step, **options)


def switched(
    losses: Sequence[Callable], value_and_grad: Callable, batches: Sequence[int]
) -> Callable:
    """`(params, (samples, which, rows)) -> (loss, gradient)` of rows of the bucket `which`.

    Differentiated within the branches: what a step keeps for its backward is of one bucket's size.
    """

    def step(params, batch):
        samples, which, rows = batch

        def branch(loss, split, size):
            take = lambda rows: jax.tree.map(lambda a: a[rows[:size]], split)
            return lambda params, rows: value_and_grad(loss)(params, take(rows))

        branches = map(branch, losses, samples, batches)
        return jax.lax.switch(which, list(branches), params, rows)

    return step


def make_chunk(train_step: Callable, **options) -> Callable:
    """Jits `(state, samples, which [length], rows [seeds, length, batch]) -> (state, metrics)`.

    A step for each batch of rows, of the samples of its bucket; metrics are [seeds, length].
    `options` are those of `jax.jit`.
    """

    def chunk(state: TrainState, samples: Sequence[Split], which, rows):
        step = lambda state, batch: train_step(state, (samples, *batch))
        return jax.lax.scan(step, state, (which, rows))

    # a step's bucket is that of all seeds: the switch stays one
    seeds = jax.vmap(chunk, in_axes=(0, None, None, 0), axis_name=SEEDS)
    return jax.jit(seeds, donate_argnums=0, **options)
