"""The recipe of the FLARE paper: AdamW, one-cycle learning rate and beta1, clipping.

lr:     peak/1e4 -> peak over the first 10 % of the steps, then -> peak/1e8, both by cosine
beta1:  0.95 -> 0.85 -> 0.95, in step with it
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from flare_jax.models.functional import Params

START_DIVISOR, END_DIVISOR = 1e4, 1e4  # peak / start, start / end of the learning rate
BETA1_HIGH, BETA1_LOW = 0.95, 0.85  # momentum when the learning rate is low, and at its peak
BETA2, EPSILON = 0.999, 1e-8
DECAYED = ("kernel", "latent_q")  # weights and latent queries; not biases, not norm scales


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW under a one-cycle schedule; raises ValueError for values out of range."""

    learning_rate: float = 1e-3  # peak learning rate
    weight_decay: float = 1e-5  # on weights and latent queries, not on biases and norms
    clip_norm: float = 1.0  # largest global gradient norm
    warmup_fraction: float = 0.1  # share of the steps before the peak
    ema_decay: float = 0.999  # of the running average of the parameters

    def __post_init__(self):
        for name in ("learning_rate", "clip_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")
        for name in ("warmup_fraction", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")


def one_cycle(start: float, peak: float, end: float, num_steps: int, fraction: float):
    """Schedule `step -> value`: start to peak over `fraction` of the steps, then to end, by cosine.

    The peak is at step fraction * num_steps - 1 and the end at num_steps - 1, as in PyTorch.
    """
    top, last = fraction * num_steps - 1, num_steps - 1

    def value(step):
        up = step / max(top, 1e-9)
        down = (step - top) / max(last - top, 1e-9)
        anneal = lambda a, b, t: b + (a - b) / 2 * (1 + jnp.cos(jnp.pi * jnp.clip(t, 0, 1)))
        return jnp.where(step <= top, anneal(start, peak, up), anneal(peak, end, down))

    return value


def make_optimizer(
    config: OptimizerConfig, num_steps: int, parts: bool = False
) -> optax.GradientTransformation:
    """Clipping, then AdamW whose learning rate and beta1 follow the one-cycle schedule.

    `parts`: parameters lie in parts over devices, where they stay.
    """
    peak, fraction = config.learning_rate, config.warmup_fraction
    low = peak / START_DIVISOR
    adamw = optax.inject_hyperparams(optax.adamw, static_args=("mask",))(
        learning_rate=one_cycle(low, peak, low / END_DIVISOR, num_steps, fraction),
        b1=one_cycle(BETA1_HIGH, BETA1_LOW, BETA1_HIGH, num_steps, fraction),
        b2=BETA2,
        eps=EPSILON,
        weight_decay=config.weight_decay,
        mask=decayed,
    )
    clip = optax.clip_by_global_norm(config.clip_norm)
    # as one vector: a norm leaf by leaf is a kernel for each of hundreds of leaves
    return optax.chain(clip if parts else optax.flatten(clip), adamw)


def decayed(params: Params) -> dict:
    """True for the leaves that weight decay applies to."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)
