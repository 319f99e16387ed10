"""FLARE in JAX: attention over N tokens through M latents, models, and PDE surrogates.

Shape letters used everywhere: B batch, N tokens (mesh points), M latents per head, H heads,
D head width, C = H D channels, S space dimensions, O output fields.
"""

from flare_jax.ops.flare import flare_attention, flare_decode, flare_encode

__version__ = "0.1.0"
__all__ = ["flare_attention", "flare_decode", "flare_encode"]
