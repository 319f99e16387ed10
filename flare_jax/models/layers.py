"""Layers that FLARE is made of, with the initial values and epsilons of the reference."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from flare_jax.ops.fused import mlp as kernels

ACTIVATIONS = {"gelu": functools.partial(jax.nn.gelu, approximate=True), "silu": jax.nn.silu}


def linear(in_dim: int, out_dim: int, dtype, rngs: nnx.Rngs, **options) -> nnx.Linear:
    """A dense layer: float32 parameters, kernel ~ N(0, 0.02), zero bias, computing in `dtype`."""
    init = nnx.initializers.normal(0.02)
    return nnx.Linear(in_dim, out_dim, kernel_init=init, dtype=dtype, rngs=rngs, **options)


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
    dense layer, with a residual if both were asked for. The layers with a residual are one GPU
    kernel each way where it applies and `implementation` is None or "fused".

    In 16 bits coordinates of different points become the same, and fields become steps: with
    `exact_in` the first layer is one of float32, with `exact_out` the last one's sums are returned
    in float32, whatever `dtype`. For a few columns that costs next to nothing.
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
        exact_in: bool = False,
        exact_out: bool = False,
        implementation: str | None = None,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.act, self.implementation = act, implementation
        half = jnp.dtype(dtype).itemsize == 2
        self.dtype, self.exact_in, self.exact_out = dtype, exact_in and half, exact_out and half
        first, precision = (jnp.float32, "highest") if self.exact_in else (dtype, None)
        last = dict(preferred_element_type=jnp.float32 if self.exact_out else None)
        if num_layers == -1:
            self.fc = linear(in_dim, out_dim, first, rngs, precision=precision, **last)
            self.residual = input_residual and output_residual and in_dim == out_dim
            return
        self.fc1 = linear(in_dim, hidden_dim, first, rngs, precision=precision)
        self.fcs = nnx.List(
            [linear(hidden_dim, hidden_dim, dtype, rngs) for _ in range(num_layers)]
        )
        self.fc2 = linear(hidden_dim, out_dim, dtype, rngs, **last)
        self.input_residual = input_residual and in_dim == hidden_dim
        self.output_residual = output_residual and hidden_dim == out_dim

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        if hasattr(self, "fc"):
            y = self.fc(x) if self.exact_out else self.fc(x).astype(self.dtype)
            return x + y if self.residual else y
        act = ACTIVATIONS[self.act]
        if not self.input_residual:
            first = lambda x: act(self.fc1(x)).astype(self.dtype)
            # computed again for the backward pass: kept, it would be the largest array of all
            x = jax.checkpoint(first)(x) if self.exact_in else first(x)
        chain = self.chain()
        if self.implementation in (None, "fused") and fits(x, [chain], self.act):
            x = kernels.residual_mlp(x, chain, act=self.act, linear_last=self.output_residual)
            return x if self.output_residual else self.fc2(x)
        for fc in (*([self.fc1] if self.input_residual else []), *self.fcs):
            x = x + act(fc(x))
        return x + self.fc2(x) if self.output_residual else self.fc2(x)

    def chain(self) -> list[tuple[jax.Array, jax.Array]]:
        """(kernel, bias) of each layer that has a residual."""
        if hasattr(self, "fc"):
            return []
        layers = [self.fc1] if self.input_residual else []
        layers += [*self.fcs, *([self.fc2] if self.output_residual else [])]
        return [(fc.kernel[...], fc.bias[...]) for fc in layers]

    @property
    def all_residual(self) -> bool:
        """Whether `chain` is all there is."""
        return not hasattr(self, "fc") and self.input_residual and self.output_residual


def residual_mlps(
    x: Float[Array, "B N C"],
    mlps: Sequence[ResidualMLP],
    *,
    norm: nnx.Module | None = None,
    skip: bool = False,
    add: tuple[Float[Array, "B N C"], nnx.Linear] | None = None,
    pass_on: bool = False,
) -> tuple[Float[Array, "B N C"], ...]:
    """mlp(norm x) for each of `mlps`, plus x with `skip`; with `add` = (y, dense), of x + dense(y).

    One GPU kernel each way where it applies and the MLPs' implementation is None or "fused": the
    chain of layers then stays on the chip, and only x and y are kept for the backward pass. With
    `pass_on` x is returned last: with many points, what else is done with it costs no pass over its
    gradient.
    """
    sets, act = [mlp.chain() for mlp in mlps], mlps[0].act
    fused = all(mlp.all_residual and mlp.implementation in (None, "fused") for mlp in mlps)
    if fused and fits(x, sets, act):
        if norm is None or isinstance(norm, nnx.LayerNorm):
            return kernels.residual_mlps(
                x,
                sets,
                act=act,
                norm=None if norm is None else (norm.scale[...], norm.bias[...]),
                skip=skip,
                pass_on=pass_on,
                projection=add and (add[0], add[1].kernel[...], add[1].bias[...]),
            )
        x = _added(x, add)
        out = kernels.residual_mlps(norm(x), sets, act=act)
    else:
        x = _added(x, add)
        y = x if norm is None else norm(x)
        out = [mlp(y) for mlp in mlps]
    return *(x + o if skip else o for o in out), *([x] if pass_on else [])


def _added(x, add):
    return x if add is None else x + add[1](add[0])


def fits(x, sets, act: str) -> bool:
    """Whether the kernels take these layers here."""
    if not sets[0] or len({len(layers) for layers in sets}) > 1:
        return False
    try:
        for layers in sets:
            kernels.supports(x, layers, act)
    except NotImplementedError:
        return False
    return True
