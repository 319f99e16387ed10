"""The FLARE surrogate: point features in, field values out (arXiv 2508.12594, section 3).

    x = in_proj(x);  for each block: x = x + mixer(norm x), x = x + mlp(norm x);  out_proj(norm x)

Argument names and defaults are those of the authors' code.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from flare_jax.models.layers import ACTIVATIONS, ResidualMLP, linear, norm, residual_mlps
from flare_jax.ops.flare import (
    IMPLEMENTATIONS,
    LATENTS,
    describe,
    flare_attention,
    flare_decode,
    pick,
)
from flare_jax.ops.sharded import flare_attention_shard


@dataclasses.dataclass(frozen=True)
class FLAREConfig:
    """Architecture of a FLARE model; raises ValueError for values that make none."""

    channel_dim: int = 64  # channels C = heads x head width
    num_blocks: int = 8  # mixer + MLP blocks
    num_heads: int | None = None  # heads H; None: head width 8
    num_latents: int = 64  # latent queries per head, M
    attn_scale: float = 1.0  # factor on the scores; FLARE uses 1, not 1/sqrt(head width)
    num_layers_k_proj: int = 3  # hidden layers of the key MLP; -1: one dense layer
    num_layers_v_proj: int = 3  # hidden layers of the value MLP; -1: one dense layer
    k_proj_mlp_ratio: float = 1.0  # hidden width of the key MLP over channels
    v_proj_mlp_ratio: float = 1.0  # hidden width of the value MLP over channels
    num_layers_ffn: int = 3  # hidden layers of the MLP after the mixer; -1: one dense layer
    ffn_mlp_ratio: float = 1.0  # hidden width of that MLP over channels
    num_layers_in_out_proj: int = 2  # hidden layers of the first and last MLP
    out_proj_norm: bool = True  # normalise before the last MLP
    rmsnorm: bool = False  # RMSNorm instead of LayerNorm
    qk_norm: bool = False  # normalise latent queries and keys over the head width
    act: str = "gelu"  # activation: gelu (tanh form) or silu
    remat: bool = False  # keep only blocks' inputs for the backward pass: less memory, more time
    scan_blocks: bool = False  # scan over stacked blocks: one to compile, many small copies to run
    implementation: str | None = None  # of operator and MLPs; None: the best that applies

    def __post_init__(self):
        layers = ("k_proj", "v_proj", "ffn", "in_out_proj")
        least = dict.fromkeys(("channel_dim", "num_blocks", "num_latents"), 1)
        least |= {f"num_layers_{name}": -1 for name in layers}
        for name, bound in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < bound:
                raise ValueError(f"{name} must be a whole number, at least {bound}, got {value!r}")
        if self.heads < 1 or self.channel_dim % self.heads:
            default = " (the default: one head for 8 channels)" if self.num_heads is None else ""
            raise ValueError(
                f"num_heads must divide channel_dim {self.channel_dim}, got {self.heads}{default}"
            )
        for name in ("k_proj_mlp_ratio", "v_proj_mlp_ratio", "ffn_mlp_ratio"):
            ratio = getattr(self, name)
            if not 1 <= self.channel_dim * ratio < float("inf"):
                raise ValueError(
                    f"{name} must leave a hidden channel of {self.channel_dim}, got {ratio}"
                )
        if not 0 < self.attn_scale < float("inf"):
            raise ValueError(f"attn_scale must be positive, got {self.attn_scale}")
        if self.act not in ACTIVATIONS:
            raise ValueError(f"act must be of {list(ACTIVATIONS)}, got {self.act!r}")
        if self.implementation not in (None, *IMPLEMENTATIONS):
            raise ValueError(
                f"implementation must be of {list(IMPLEMENTATIONS)}, got {self.implementation!r}"
            )

    @property
    def heads(self) -> int:
        """H, with the default filled in."""
        return self.channel_dim // 8 if self.num_heads is None else self.num_heads


class FLAREMixer(nnx.Module):
    """Mixes tokens through learned latent queries: out_proj(flare_attention(q, K(x), V(x))).

    With a `norm`, of norm(x) instead of x.
    """

    def __init__(self, config: FLAREConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        c, self.config = config.channel_dim, config
        shape = (config.num_latents, config.heads, c // config.heads)  # [M, H, D]
        self.latent_q = nnx.Param(0.1 * rngs.params.normal(shape))
        self.k_proj = residual_mlp(config, "k_proj", dtype, rngs)
        self.v_proj = residual_mlp(config, "v_proj", dtype, rngs)
        if config.qk_norm:
            self.q_norm = norm(shape[-1], config.rmsnorm, dtype, rngs)
            self.k_norm = norm(shape[-1], config.rmsnorm, dtype, rngs)
        self.out_proj = linear(c, c, dtype, rngs)

    def __call__(
        self,
        x: Float[Array, "B N C"],
        mask: Bool[Array, "B N"] | None = None,
        norm: nnx.Module | None = None,
        axis_name: str | None = None,
    ) -> Float[Array, "B N C"]:
        [mixed] = self.mix(x, mask, norm, axis_name)
        return self.out_proj(mixed)

    def mix(self, x, mask, norm, axis_name=None, pass_on=False) -> tuple[jax.Array, ...]:
        """What `out_proj` projects; with `pass_on` also x, for what else is done with it."""
        q, k, v, *rest = self.project(x, (self.k_proj, self.v_proj), norm, pass_on)
        attention = flare_attention
        if axis_name is not None:
            attention = functools.partial(flare_attention_shard, axis_name=axis_name)
        return attention(q, k, v, mask=mask, **self.options).reshape(x.shape), *rest

    def encode(self, x, mask, norm) -> tuple[Float[Array, "B M H D"], Float[Array, "B M H"]]:
        """What all tokens need to know of these: z, and the log-sum-exp to merge it by."""
        q, k, v = self.project(x, (self.k_proj, self.v_proj), norm)
        ops = pick(self.config.implementation, q, k, v, mask)
        return ops.encode(q, k, v, mask, self.config.attn_scale)  # in float32, to be merged

    def decode(self, x, z, mask, norm) -> Float[Array, "B N C"]:
        """What `out_proj` projects at these tokens, given z of all tokens."""
        q, k = self.project(x, (self.k_proj,), norm)
        return flare_decode(q, k, z, mask=mask, **self.options).reshape(x.shape)

    def project(self, x, projections, norm, pass_on=False) -> tuple[jax.Array, ...]:
        """Latent queries [M, H, D], the `projections` of x [B, N, H, D], with `pass_on` also x."""
        q = self.latent_q[...].astype(x.dtype)
        k, *rest = residual_mlps(x, projections, norm=norm, pass_on=pass_on)
        v, rest = rest[: len(projections) - 1], rest[len(projections) - 1 :]
        k, *v = (y.reshape(*y.shape[:2], *q.shape[1:]) for y in (k, *v))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, *v, *rest

    @property
    def options(self) -> dict:
        """Of the operator."""
        return {"scale": self.config.attn_scale, "implementation": self.config.implementation}


class FLAREBlock(nnx.Module):
    """x + mixer(norm x), then x + mlp(norm x)."""

    def __init__(self, config: FLAREConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.norm1 = norm(config.channel_dim, config.rmsnorm, dtype, rngs)
        self.att = FLAREMixer(config, dtype=dtype, rngs=rngs)
        self.norm2 = norm(config.channel_dim, config.rmsnorm, dtype, rngs)
        self.mlp = residual_mlp(config, "ffn", dtype, rngs)

    def __call__(
        self,
        x: Float[Array, "B N C"],
        mask: Bool[Array, "B N"] | None = None,
        axis_name: str | None = None,
    ) -> Float[Array, "B N C"]:
        return self.feed_forward(*self.att.mix(x, mask, self.norm1, axis_name, pass_on=True))

    def encode(self, x, mask) -> tuple[Float[Array, "B M H D"], Float[Array, "B M H"]]:
        """First of two passes over parts of the tokens: see `FLAREMixer.encode`."""
        return self.att.encode(x, mask, self.norm1)

    def decode(self, x, z, mask) -> Float[Array, "B N C"]:
        """Second pass: the block's output at these tokens, given z of all tokens."""
        return self.feed_forward(self.att.decode(x, z, mask, self.norm1), x)

    def feed_forward(self, mixed: Float[Array, "B N C"], x: Float[Array, "B N C"]) -> jax.Array:
        """x + mlp(norm x) of x + out_proj(mixed)."""
        add = mixed, self.att.out_proj
        return residual_mlps(x, [self.mlp], norm=self.norm2, skip=True, add=add)[0]


class OutputProjection(nnx.Module):
    """An optional norm and the MLP from channels to output fields."""

    def __init__(self, config: FLAREConfig, out_dim: int, *, dtype, rngs: nnx.Rngs):
        c, layers = config.channel_dim, config.num_layers_in_out_proj
        if config.out_proj_norm:
            self.norm = norm(c, config.rmsnorm, dtype, rngs)
        options = dict(act=config.act, implementation=config.implementation, dtype=dtype, rngs=rngs)
        self.mlp = ResidualMLP(
            c, c, out_dim, layers, input_residual=True, exact_out=True, **options
        )

    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N O"]:
        return self.mlp(self.norm(x) if hasattr(self, "norm") else x)


class FLAREModel(nnx.Module):
    """A surrogate on point sets: features [B, N, in] -> fields [B, N, O], any N, any order.

    Args:
        config: the architecture.
        in_dim, out_dim: input features and output fields per point.
        dtype: computes in this dtype (float32, bfloat16, float16); parameters, the first layer,
            which takes the features, and the output are float32.
        rngs: Flax's source of keys for the initial parameters.
    """

    def __init__(
        self, config: FLAREConfig, in_dim: int, out_dim: int, *, dtype=jnp.float32, rngs: nnx.Rngs
    ):
        self.config, self.in_dim, self.dtype = config, in_dim, dtype
        c, layers = config.channel_dim, config.num_layers_in_out_proj
        options = dict(act=config.act, implementation=config.implementation, dtype=dtype, rngs=rngs)
        options |= dict(output_residual=True, exact_in=True)
        self.in_proj = ResidualMLP(in_dim, c, c, layers, **options)
        block = lambda rngs: FLAREBlock(config, dtype=dtype, rngs=rngs)
        if config.scan_blocks:
            self.blocks = nnx.vmap(block)(rngs.split(config.num_blocks))
        else:
            self.blocks = nnx.List([block(rngs) for _ in range(config.num_blocks)])
        self.out_proj = OutputProjection(config, out_dim, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B N I"],
        mask: Bool[Array, "B N"] | None = None,
        axis_name: str | None = None,
    ) -> Float[Array, "B N O"]:
        """Field values at every point; those of masked points mean nothing.

        Inside `jax.shard_map` with the points of each sample spread over the mesh axis `axis_name`,
        x and mask are those of this device: everything but the mixing is computed apart.
        """
        if x.ndim != 3 or x.shape[-1] != self.in_dim or 0 in x.shape:
            raise ValueError(
                f"x must be [B, N, {self.in_dim}] and not empty, got shape {tuple(x.shape)}"
            )
        if mask is not None and getattr(mask, "shape", None) != x.shape[:2]:
            raise ValueError(f"mask must be a bool array {x.shape[:2]}, got {describe(mask)}")
        if mask is not None:  # whatever padding holds must not reach real points as a NaN
            x = jnp.where(mask[:, :, None], x, 0)
        keep = jax.checkpoint_policies.save_only_these_names(LATENTS)
        call = functools.partial(jax.checkpoint, policy=keep) if self.config.remat else lambda f: f
        block = call(lambda block, x: block(x, mask, axis_name))
        x = call(lambda f, x: f(x))(self.in_proj, x)
        if self.config.scan_blocks:
            x, _ = jax.lax.scan(lambda x, b: (block(b, x), None), x, self.blocks)
        else:
            for b in self.blocks:
                x = block(b, x)
        return call(lambda f, x: f(x))(self.out_proj, x).astype(jnp.float32)


def residual_mlp(config: FLAREConfig, name: str, dtype, rngs: nnx.Rngs) -> ResidualMLP:
    """One of a block's residual MLPs, C -> C: `name` is k_proj, v_proj or ffn."""
    c = config.channel_dim
    hidden = int(c * getattr(config, f"{name}_mlp_ratio"))
    layers = getattr(config, f"num_layers_{name}")
    return ResidualMLP(
        c, hidden, c, layers, input_residual=True, output_residual=True, act=config.act,
        implementation=config.implementation, dtype=dtype, rngs=rngs,
    )  # fmt: skip
