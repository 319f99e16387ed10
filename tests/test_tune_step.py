"""The plans that the tuning of whole steps reads."""

import pytest

from experiments import tune_step
from flare_jax.ops.fused import mlp_plans


def test_plan_as_the_table_has_it():
    text = "32x4w/264p/1sb | 3:32x4w/264p/1sb 2:32x4w/264p/1sb"
    assert tune_step.plan_of(text) == mlp_plans.few(32, 4, segments=(3, 2))
    text = "16x8w/264p/1sb | 5:16x8w/264p/1r5b"
    assert tune_step.plan_of(text) == mlp_plans.few(16, 8, kept=(0, 5))


@pytest.mark.parametrize("text", ["16x8w/264p/1", "5:16x8w/264p/1", "16x8w/264p/1 | 16x8w/264p/1"])
def test_what_is_no_plan(text):
    with pytest.raises(ValueError, match="--plans"):
        tune_step.plan_of(text)
