"""Layers that FLARE is made of, with the initial values and epsilons of the reference."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

ACTIVATIONS = {"gelu": functools.partial(jax.nn.gelu, approximate=True), "silu": jax.nn.silu}


def linear(in_dim: int, out_dim: int, dtype, rngs: nnx.Rngs) -> nnx.Linear:
    """A dense layer: float32 parameters, kernel ~ N(0, 0.02), zero bias, computing in `dtype`."""
    init = nnx.initializers.normal(0.02)
    return nnx.Linear(in_dim, out_dim, kernel_init=init, dtype=dtype, rngs=rngs)


def norm(dim: int, rmsnorm: bool, dtype, rngs: nnx.Rngs) -> nnx.Module:
    """LayerNorm (epsilon 1e-5) or RMSNorm (float32's epsilon) over the last axis, as in PyTorch.

    The variance is the mean squared deviation: the faster E[x^2] - E[x]^2 loses all digits for
    features whose mean is far larger than their spread.
    """
    if rmsnorm:
        epsilon = float(jnp.finfo(jnp.float32).eps)
        return nnx.RMSNorm(dim, epsilon=epsilon, use_fast_variance=False, dtype=dtype, rngs=rngs)
    return nnx.LayerNorm(dim, epsilon=1e-5, use_fast_variance=False, dtype=dtype, rngs=rngs)


class ResidualMLP(nnx.Module):
    """A chain of dense layers with a residual around each: [..., in] -> [..., out].

        x = [x +] act(fc1 x);   x = x + act(fc x) for each of `num_layers`;   [x +] fc2 x

    The bracketed residuals exist where asked for and where widths agree. `num_layers = -1` is one
    dense layer, with a residual if both were asked for.
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dim: int,
        out_dim: int,
        num_layers: int = 2,
        *,
        act: str = "gelu",
        input_residual: bool = False,
        output_residual: bool = False,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.act = act
        if num_layers == -1:
            self.fc = linear(in_dim, out_dim, dtype, rngs)
            self.residual = input_residual and output_residual and in_dim == out_dim
            return
        self.fc1 = linear(in_dim, hidden_dim, dtype, rngs)
        self.fcs = nnx.List(
            [linear(hidden_dim, hidden_dim, dtype, rngs) for _ in range(num_layers)]
        )
        self.fc2 = linear(hidden_dim, out_dim, dtype, rngs)
        self.input_residual = input_residual and in_dim == hidden_dim
        self.output_residual = output_residual and hidden_dim == out_dim

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        if hasattr(self, "fc"):
            return x + self.fc(x) if self.residual else self.fc(x)
        act = ACTIVATIONS[self.act]
        x = x + act(self.fc1(x)) if self.input_residual else act(self.fc1(x))
        for fc in self.fcs:
            x = x + act(fc(x))
        return x + self.fc2(x) if self.output_residual else self.fc2(x)
