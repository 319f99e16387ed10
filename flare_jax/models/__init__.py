"""Flax NNX modules that hold the parameters; the mathematics is in `flare_jax.ops`."""

from flare_jax.models.flare import FLAREBlock, FLAREConfig, FLAREMixer, FLAREModel
from flare_jax.models.functional import functional
from flare_jax.models.layers import ResidualMLP

__all__ = ["FLAREBlock", "FLAREConfig", "FLAREMixer", "FLAREModel", "ResidualMLP", "functional"]
