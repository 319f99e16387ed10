"""One training step, as a pure jitted function."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from flare_jax.models.functional import Params
from flare_jax.problems.problem import Normalizer


class TrainState(NamedTuple):
    """All that a step changes."""

    step: jax.Array  # steps taken
    params: Params
    ema: Params  # running average of params
    opt_state: optax.OptState


def init_state(params: Params, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step; the average starts at the initial parameters."""
    copy = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, copy, tx.init(params))


def surrogate_loss(apply: Callable, loss: Callable, y_normalizer: Normalizer) -> Callable:
    """`(params, batch) -> scalar`: mean over samples of the loss on decoded fields."""

    def mean_loss(params, batch):
        prediction = y_normalizer.decode(apply(params, batch.x, batch.mask))
        return jnp.mean(loss(prediction, batch.y, batch.mask))

    return mean_loss


def make_train_step(
    loss_fn: Callable,
    tx: optax.GradientTransformation,
    ema_decay: float = 0.999,
    value_and_grad: Callable = jax.value_and_grad,
    parts: bool = False,
) -> Callable:
    """Jits `(state, batch) -> (state, metrics)` for `loss_fn(params, batch) -> scalar`.

    `value_and_grad(loss_fn)` is the step's `(params, batch) -> (loss, gradient)`;
    `parallel.value_and_grad` on many devices, and the training loop's takes a loss for each bucket.
    `parts`: gradients lie in parts over devices, where they stay.

    Metrics: the loss, the gradient norm before clipping, and the learning rate and beta1 (b1) as
    used in this step where they follow a schedule. The state passed in is donated: its buffers are
    reused.
    """

    norm = optax.tree.norm if parts else vector_norm

    def train_step(state: TrainState, batch) -> tuple[TrainState, dict]:
        loss, grads = value_and_grad(loss_fn)(state.params, batch)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = optax.incremental_update(params, state.ema, 1 - ema_decay)
        metrics = {"loss": loss, "grad_norm": norm(grads), **scheduled(opt_state)}
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    return jax.jit(train_step, donate_argnums=0)


def vector_norm(tree: Params) -> jax.Array:
    """Global L2 norm, taken as that of one vector: a single sum instead of one for each leaf."""
    return jnp.linalg.norm(ravel_pytree(tree)[0])


def scheduled(opt_state: optax.OptState) -> dict[str, jax.Array]:
    """The hyperparameters that a schedule set in the last update, by name."""
    is_value = lambda _, x: isinstance(x, jax.Array)  # not the schedule's own state
    found = {k: optax.tree.get(opt_state, k, None, is_value) for k in ("learning_rate", "b1")}
    return {k: x for k, x in found.items() if x is not None}
