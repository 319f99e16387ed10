"""Meshes of different sizes in arrays: a few bucket sizes, padding, and the order of batches.

A compiled program has one shape, so meshes are padded to one of a few sizes and masked. Every step
takes its batch from one bucket. An epoch uses every sample of every bucket once, but for those that
a bucket's batches and the epoch's calls leave over, which are other ones every time. Its order
follows from (seed, epoch) alone:

    which bucket a step takes   drawn from the epoch: the same for all seeds trained side by side
    which samples of it         drawn from (seed, epoch)

Samples that all have one size are one bucket.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from flare_jax.problems.problem import Samples, Split, buckets_of

MULTIPLE = 256  # most that bucket sizes are multiples of: whole tiles; parts over devices

# inputs and targets of a mesh
Sample = tuple[Float[np.ndarray, "N in"], Float[np.ndarray, "N O"]]


def bucket_sizes(sizes: Sequence[int], count: int, multiple: int | None = None) -> tuple[int, ...]:
    """At most `count` sizes, so that padding each mesh to the next one adds the fewest points.

    They are multiples of `multiple` (None: a power of two, at most MULTIPLE and about a sixteenth
    of the largest mesh), or where there are no more than `count` sizes those: nothing is padded.
    With u_1 < ... < u_m the sizes rounded up and n_i the number of meshes of each, the fewest
    padded points of the first j in k buckets are

        c(k, j) = min over i < j of  c(k - 1, i) + u_j (n_{i+1} + ... + n_j)

    Raises:
        ValueError: there is no mesh, one has no point, or `count` or `multiple` is below 1.
    """
    if count < 1 or (multiple is not None and multiple < 1):
        raise ValueError(f"count and multiple must be at least 1, got {count} and {multiple}")
    if len(sizes) == 0 or min(sizes) < 1:
        raise ValueError("buckets need at least one mesh, and each of them at least one point")
    if len(set(sizes)) <= count:
        return tuple(sorted(set(sizes)))
    if multiple is None:
        multiple = min(MULTIPLE, max(8, 2 ** int(np.log2(max(sizes) / 16))))
    u, n = np.unique(-(-np.asarray(sizes) // multiple) * multiple, return_counts=True)
    upto = np.concatenate([[0], np.cumsum(n)])  # meshes among the first j sizes
    cost = np.full(len(u) + 1, np.inf)
    cost[0] = 0
    choices = []  # for each k: the best i for each j
    for _ in range(min(count, len(u))):
        total = cost[:-1, None] + u * (upto[1:] - upto[:-1, None])  # [i, j - 1]
        total[np.tril_indices(len(u), -1)] = np.inf  # i < j
        choices.append(np.concatenate([[0], np.argmin(total, 0)]))
        cost = np.concatenate([[np.inf], np.min(total, 0)])
    ends = [len(u)]
    for choice in reversed(choices):
        ends.append(int(choice[ends[-1]]))
    return tuple(int(u[j - 1]) for j in reversed(ends[:-1]))


def bucketed(meshes: Sequence[Sample], sizes: Sequence[int]) -> tuple[Split, ...]:
    """The meshes padded to the smallest size that holds them: a Split for each size in use.

    Meshes keep their order within a bucket. Padding is zero, and masked.
    """
    sizes = sorted(sizes)
    which = np.searchsorted(sizes, [len(x) for x, _ in meshes])
    return tuple(
        padded([meshes[i] for i in np.flatnonzero(which == b)], sizes[b]) for b in np.unique(which)
    )


def bucketed_splits(
    splits: Mapping[str, Sequence[Sample]], count: int
) -> dict[str, tuple[Split, ...]]:
    """Each split in the same at most `count` sizes, those that pad all of them least."""
    lengths = [len(x) for samples in splits.values() for x, _ in samples]
    sizes = bucket_sizes(lengths, count)
    return {name: bucketed(samples, sizes) for name, samples in splits.items() if samples}


def padded(meshes: Sequence[Sample], size: int) -> Split:
    """Arrays [n, size, ...] of meshes of at most `size` points."""
    mask = np.arange(size) < np.array([[len(x)] for x, _ in meshes])
    x, y = (np.zeros((*mask.shape, a.shape[1]), np.float32) for a in meshes[0])
    for i, (a, b) in enumerate(meshes):
        x[i, : len(a)], y[i, : len(b)] = a, b
    return Split(x, y, mask)


def take_samples(split: Split, rows: np.ndarray) -> Split:
    """Samples of a split on the host, by their rows."""
    return Split(*(None if a is None else a[rows] for a in split))


def waste(samples: Samples) -> float:
    """Padded points over real ones, less 1."""
    buckets = buckets_of(samples)
    points = sum(b.x.shape[0] * b.x.shape[1] for b in buckets)
    real = sum(b.x.shape[0] * b.x.shape[1] if b.mask is None else b.mask.sum() for b in buckets)
    return float(points / real - 1)


def describe(samples: Samples) -> str:
    """For what a run prints: how many samples of how many points."""
    buckets = buckets_of(samples)
    sizes = ", ".join(f"{len(b.x)} of {b.x.shape[1]}" for b in buckets)
    if len(buckets) == 1 and buckets[0].mask is None:
        return f"{sizes} points"
    return f"{sizes} points, padding adds {waste(samples):.1%}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an epoch takes of each bucket."""

    samples: tuple[int, ...]
    batches: tuple[int, ...]  # samples in a batch, one for each step
    run: int  # steps in a call of the device

    @property
    def steps(self) -> tuple[int, ...]:
        """Batches that each bucket has."""
        return tuple(n // batch for n, batch in zip(self.samples, self.batches, strict=True))

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch: whole calls."""
        return sum(self.steps) // self.run * self.run


def make_plan(
    samples: Samples,
    batch_size: int,
    batch_tokens: int | None = None,
    ranks: int = 1,
    run: int = 1,
) -> Plan:
    """The plan for batches of `batch_size` samples, or of about `batch_tokens` points.

    With `batch_tokens`, buckets of small meshes have more samples in a batch: the largest number
    that stays within it, or down to half of that where fewer samples are left over. A sample of a
    shared batch weighs less in its step, as with any batch size. `ranks` divides every batch. A
    call has `run` steps, or down to half of that where fewer are left over.

    Raises:
        ValueError: a bucket holds fewer samples than `ranks`.
    """
    batches = []
    for split in buckets_of(samples):
        n, points = split.x.shape[:2]
        most = batch_size if batch_tokens is None else batch_tokens // points
        most = min(max(most, ranks), n) // ranks * ranks
        if most == 0:
            raise ValueError(
                f"the {n} training samples of {points} points are fewer than data={ranks} of the "
                "device mesh: use fewer buckets, or a smaller data axis"
            )
        least = most if batch_tokens is None else max(most // 2 // ranks, 1) * ranks
        batches.append(fewest_left(n, range(least, most + 1, ranks)))
    plan = Plan(tuple(len(split.x) for split in buckets_of(samples)), tuple(batches), 1)
    most = min(run, plan.per_epoch)
    run = fewest_left(plan.per_epoch, range(max(most // 2, 1), most + 1))
    return dataclasses.replace(plan, run=run)


def fewest_left(total: int, sizes: Iterable[int]) -> int:
    """The size of groups that leave the fewest of `total` over; the largest of several."""
    return max(sizes, key=lambda size: (total // size * size, size))


def calls(
    plan: Plan, keys: np.ndarray, done: int
) -> Iterator[tuple[Int[np.ndarray, "run"], Int[np.ndarray, "seeds run batch"]]]:
    """The bucket of each step, and rows of its samples, for each call after step `done`.

    To the end of its epoch. Rows are as many as the largest batch has: a smaller one's come first.

    Raises:
        ValueError: `done` is within a call.
    """
    epoch, first = divmod(done, plan.per_epoch)
    if first % plan.run:
        raise ValueError(
            f"step {done} is within a call of {plan.run} steps: batches are other ones than "
            "before; resume on the device mesh that the checkpoint was saved on"
        )
    sequence = bucket_sequence(plan, epoch)
    rows = np.zeros((len(keys), len(sequence), max(plan.batches)), np.int32)
    for bucket, of_bucket in enumerate(jax.device_get(epoch_rows(keys, epoch, plan))):
        rows[:, sequence == bucket, : plan.batches[bucket]] = of_bucket
    for start in range(first, plan.per_epoch, plan.run):
        end = start + plan.run
        yield sequence[start:end], rows[:, start:end]


def bucket_sequence(plan: Plan, epoch: int) -> Int[np.ndarray, "steps"]:
    """The bucket that each step of an epoch takes its batch from."""
    sequence = np.repeat(np.arange(len(plan.steps), dtype=np.int32), plan.steps)
    return np.random.RandomState(epoch).permutation(sequence)  # a generator that never changes


@functools.partial(jax.jit, static_argnums=2)
def epoch_rows(keys, epoch: int, plan: Plan) -> tuple[jax.Array, ...]:
    """For each bucket the samples of its batches, [seeds, steps, batch], from key data [seeds, 2].

    One permutation of all samples, then bucket by bucket in that order.
    """
    bucket = np.repeat(np.arange(len(plan.samples)), plan.samples)
    starts = np.cumsum((0, *plan.samples))

    def of_seed(key):
        key = jax.random.fold_in(jax.random.wrap_key_data(key), epoch)
        order = jax.random.permutation(key, len(bucket))
        order = order[jnp.argsort(jnp.asarray(bucket)[order], stable=True)]
        return tuple(
            (order[start : start + n // size * size] - start).reshape(-1, size)
            for start, n, size in zip(starts, plan.samples, plan.batches, strict=False)
        )

    return jax.vmap(of_seed)(keys)
