"""A packed state is the state, in other arrays."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flare_jax.models import FLAREConfig, FLAREModel, functional
from flare_jax.problems.metrics import rel_l2
from flare_jax.problems.problem import Normalizer, Split
from flare_jax.train.optimizer import OptimizerConfig, make_optimizer
from flare_jax.train.packed import Packing
from flare_jax.train.step import init_state, make_train_step, surrogate_loss


def test_packed_steps_are_the_steps():
    """Moments, averages, weight decay of weights only, clipping: as on the tree of parameters."""
    config = FLAREConfig(channel_dim=8, num_blocks=1, num_heads=2, num_latents=4)
    apply, params = functional(FLAREModel(config, 2, 1, rngs=nnx.Rngs(0)))
    tx = make_optimizer(OptimizerConfig(weight_decay=0.3, clip_norm=0.5), 10)
    loss = surrogate_loss(apply, rel_l2, Normalizer(jnp.zeros(1), jnp.ones(1)))
    state, packing = init_state(params, tx), Packing(params)
    packed = packing.packed(state)
    assert len(jax.tree.leaves(packed)) < 20 < len(jax.tree.leaves(state))
    chex.assert_trees_all_equal(packing.unpacked(packed), state)

    x = np.random.default_rng(0).random((3, 2, 12, 2), np.float32)
    samples = Split(x, np.sin(6 * x[..., :1]))
    step = make_train_step(loss, tx, 0.9)
    want, metrics = jax.jit(functools.partial(jax.lax.scan, step))(state, samples)
    step = make_train_step(packing.loss(loss), tx, 0.9)
    got, packed_metrics = jax.jit(functools.partial(jax.lax.scan, step))(packed, samples)
    chex.assert_trees_all_close(packing.unpacked(got), want, rtol=2e-5, atol=1e-6)
    chex.assert_trees_all_close(packed_metrics, metrics, rtol=2e-5)
