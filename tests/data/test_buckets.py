import itertools

import jax
import numpy as np
import pytest

from flare_jax.data.buckets import (
    Plan,
    bucket_sequence,
    bucket_sizes,
    bucketed,
    calls,
    describe,
    make_plan,
    waste,
)
from flare_jax.problems.problem import Split

SIZES = (3, 9, 4, 17, 8, 30, 5)
KEYS = np.stack([jax.random.key_data(jax.random.key(seed)) for seed in (0, 1)])
PLAN = Plan((7, 4, 5), (2, 3, 1), 2)


def meshes(sizes=SIZES):
    rng = np.random.default_rng(0)
    return [(rng.normal(size=(n, 3)), rng.normal(size=(n, 1))) for n in sizes]


def padding(sizes, buckets):
    return sum(min(b for b in buckets if b >= n) - n for n in sizes)


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_bucket_sizes_pad_least(count):
    sizes = np.random.default_rng(count).integers(1, 60, 12).tolist()
    found = bucket_sizes(sizes, count, multiple=4)
    rounded = sorted({-(-n // 4) * 4 for n in sizes})
    most = min(count, len(rounded))
    others = [c for k in range(most) for c in itertools.combinations(rounded, k + 1)]
    best = min(padding(sizes, c) for c in others if c[-1] == rounded[-1])
    assert padding(sizes, found) == best and len(found) <= count
    assert bucket_sizes([7, 3, 7], 2) == (3, 7)  # as many buckets as sizes: no padding
    assert all(size % 4 == 0 for size in found) and list(found) == sorted(set(found))


def test_bucket_sizes_refuse_nothing_to_pad():
    for sizes, count in (([], 2), ([3, 0], 2), ([3], 0)):
        with pytest.raises(ValueError, match="at least"):
            bucket_sizes(sizes, count)


def test_padding_keeps_every_real_point_in_order():
    found = bucketed(meshes(), (8, 16, 32))
    assert [s.x.shape for s in found] == [(4, 8, 3), (1, 16, 3), (2, 32, 3)]
    small = [mesh for mesh in meshes() if len(mesh[0]) <= 8]
    for i, (x, y) in enumerate(small):
        np.testing.assert_array_equal(found[0].x[i][found[0].mask[i]], x.astype(np.float32))
        np.testing.assert_array_equal(found[0].y[i][found[0].mask[i]], y.astype(np.float32))
    assert not found[0].x[~found[0].mask].any()
    assert waste(found) == pytest.approx((4 * 8 + 16 + 2 * 32) / sum(SIZES) - 1)
    assert describe(found) == "4 of 8, 1 of 16, 2 of 32 points, padding adds 47.4%"
    assert waste(Split(*(np.zeros((2, 5, 1)),) * 2)) == 0


def epoch(keys, number, plan=PLAN, after=0):
    """(bucket, samples of each seed) of each step."""
    return [
        (int(bucket), rows[:, i, : plan.batches[bucket]].tolist())
        for which, rows in calls(plan, keys, number * plan.per_epoch + after)
        for i, bucket in enumerate(which)
    ]


def test_an_epoch_uses_each_sample_at_most_once():
    steps = epoch(KEYS, 3)
    assert PLAN.steps == (3, 1, 5) and len(steps) == PLAN.per_epoch == 8  # of 9: calls of two
    for seed in (0, 1):
        used = [(b, i) for b, rows in steps for i in rows[seed]]
        assert len(set(used)) == len(used)
        assert all(0 <= i < PLAN.samples[b] for b, i in used)
    taken = [sum(b == bucket for b, _ in steps) for bucket in range(3)]
    assert sorted(full - n for full, n in zip(PLAN.steps, taken, strict=True)) == [0, 0, 1]
    whole = epoch(KEYS, 3, Plan(PLAN.samples, PLAN.batches, 3))
    assert whole[:8] == steps and [b for b, _ in whole].count(2) == 5


def test_the_order_follows_from_seed_and_epoch_alone():
    both, alone = epoch(KEYS, 2), epoch(KEYS[1:], 2)
    assert [(b, rows[1:]) for b, rows in both] == alone  # seeds trained together or apart
    assert both[0][1][0] != both[0][1][1] and both != epoch(KEYS, 1)
    assert epoch(KEYS, 2, after=4) == both[4:]  # a run resumed in an epoch
    with pytest.raises(ValueError, match="step 19 is within a call of 2 steps"):
        next(calls(PLAN, KEYS, 2 * PLAN.per_epoch + 3))
    assert not np.array_equal(bucket_sequence(PLAN, 0), bucket_sequence(PLAN, 1))


def test_small_meshes_share_a_batch():
    split = lambda n, points: Split(np.zeros((n, points, 1)), np.zeros((n, points, 1)))
    buckets = split(20, 8), split(9, 32), split(3, 100)
    assert make_plan(buckets, 2).batches == (2, 2, 2)
    assert make_plan(buckets, 1, batch_tokens=64).batches == (5, 1, 1)  # 5 rather than 8: 20 / 5
    assert make_plan(buckets, 1, batch_tokens=64, ranks=2).batches == (4, 2, 2)
    with pytest.raises(ValueError, match="the 3 training samples of 100 points are fewer than"):
        make_plan(buckets, 4, ranks=4)


def test_calls_leave_few_batches_over():
    split = lambda n: Split(np.zeros((n, 8, 1)), np.zeros((n, 8, 1)))
    assert make_plan((split(20), split(9), split(3)), 1, run=10).run == 8  # 32 = 4 x 8
    assert make_plan(split(9), 2, run=8).run == 4  # an epoch in one call
    assert make_plan(split(23), 1, run=8).run == 7  # 5, 6 and 8 leave more over, 4 as many as 7
