"""FLARE in plain PyTorch, the side to compare with: its equations with two SDPA calls a block.

    x = in_proj(x);  for each block: x = x + att(norm1 x), x = x + mlp(norm2 x);  out_proj(norm x)
    att(x) = out(sdpa(k, q, sdpa(q, k, v))) with k = K(x), v = V(x) and learned q, scale 1

Modules and parameters carry the names of `flare_jax.models.convert`, so `to_torch(params, config)`
loads as a state dict. Parameters are float32; everything is computed in the dtype of the input,
which for bfloat16 is less work than autocast (whose norms and residuals are float32).
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear, pad, scaled_dot_product_attention

from flare_jax.models.flare import FLAREConfig
from flare_jax.train.optimizer import (
    BETA1_HIGH,
    BETA1_LOW,
    BETA2,
    END_DIVISOR,
    EPSILON,
    START_DIVISOR,
    OptimizerConfig,
)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class ResidualMLP(nn.Module):
    """x = [x +] gelu(fc1 x), then x = x + gelu(fc x) for each hidden layer, then [x +] fc2 x."""

    def __init__(self, in_dim, hidden_dim, out_dim, num_layers, residual_in, residual_out):
        super().__init__()
        self.fc1 = Linear(in_dim, hidden_dim)
        self.fcs = nn.ModuleList(Linear(hidden_dim, hidden_dim) for _ in range(num_layers))
        self.fc2 = Linear(hidden_dim, out_dim)
        self.residual_in = residual_in and in_dim == hidden_dim
        self.residual_out = residual_out and hidden_dim == out_dim

    def forward(self, x: Tensor) -> Tensor:
        h = gelu(self.fc1(x), approximate="tanh")
        x = x + h if self.residual_in else h
        for fc in self.fcs:
            x = x + gelu(fc(x), approximate="tanh")
        return x + self.fc2(x) if self.residual_out else self.fc2(x)


class Mixer(nn.Module):
    def __init__(self, config: FLAREConfig):
        super().__init__()
        c, self.heads, self.scale = config.channel_dim, config.heads, config.attn_scale
        self.latent_q = nn.Parameter(torch.empty(c, config.num_latents))
        self.k_proj = channel_mlp(config, config.num_layers_k_proj, config.k_proj_mlp_ratio)
        self.v_proj = channel_mlp(config, config.num_layers_v_proj, config.v_proj_mlp_ratio)
        self.out_proj = Linear(c, c)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q = self.latent_q.to(x.dtype).view(self.heads, -1, c // self.heads)  # [H, M, D]
        q = q.expand(b, *q.shape)
        k, v = (f(x).view(b, n, self.heads, -1).transpose(1, 2) for f in (self.k_proj, self.v_proj))
        z = scaled_dot_product_attention(q, k, v, scale=self.scale)
        y = scaled_dot_product_attention(k, q, z, scale=self.scale)
        return self.out_proj(y.transpose(1, 2).reshape(b, n, c))


class Block(nn.Module):
    def __init__(self, config: FLAREConfig):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(config.channel_dim), LayerNorm(config.channel_dim)
        self.att = Mixer(config)
        self.mlp = channel_mlp(config, config.num_layers_ffn, config.ffn_mlp_ratio)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.att(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    """`FLAREModel(config, in_dim, out_dim, dtype=dtype)`; uninitialised, load a state dict."""

    def __init__(self, config: FLAREConfig, in_dim: int, out_dim: int, dtype=torch.float32):
        super().__init__()
        if config.rmsnorm or config.qk_norm or config.act != "gelu" or not config.out_proj_norm:
            raise ValueError("only LayerNorm, gelu, out_proj_norm and no qk_norm are written here")
        c, layers, self.dtype = config.channel_dim, config.num_layers_in_out_proj, dtype
        self.in_proj = ResidualMLP(in_dim, c, c, layers, False, True)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        last = ResidualMLP(c, c, out_dim, layers, True, False)
        self.out_proj = nn.Sequential(LayerNorm(c), last)

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_proj(x.to(self.dtype))
        for block in self.blocks:
            x = block(x)
        return self.out_proj(x).float()


def channel_mlp(config: FLAREConfig, num_layers: int, ratio: float) -> ResidualMLP:
    c = config.channel_dim
    return ResidualMLP(c, int(c * ratio), c, num_layers, True, True)


# ----------------------------------------------------------------------- training ---


def rel_l2(prediction: Tensor, target: Tensor) -> Tensor:
    """Relative L2 error of each sample, [B]."""
    return torch.linalg.vector_norm(prediction - target, dim=(1, 2)) / torch.linalg.vector_norm(
        target, dim=(1, 2)
    )


def darcy_loss(prediction: Tensor, target: Tensor, shape: tuple[int, int]) -> Tensor:
    """rel_l2 of u, plus a tenth of that of its central differences, with zeros outside."""
    loss = rel_l2(prediction, target)
    u, v = (x.view(len(x), *shape) for x in (prediction, target))
    by_rows = [pad(x, (0, 0, 1, 1)) for x in (u, v)]
    by_columns = [pad(x, (1, 1)) for x in (u, v)]
    loss = loss + 0.1 * rel_l2(*(x[:, 2:] - x[:, :-2] for x in by_rows))
    return loss + 0.1 * rel_l2(*(x[:, :, 2:] - x[:, :, :-2] for x in by_columns))


@dataclasses.dataclass
class Trainer:
    """The recipe of `train.optimizer` and `train.step`: AdamW, one cycle, clipping, average."""

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]  # (prediction, target) -> [B]
    num_steps: int
    config: OptimizerConfig = OptimizerConfig()

    def __post_init__(self):
        self.parameters, c = list(self.model.parameters()), self.config
        self.average = [p.detach().clone() for p in self.parameters]
        groups = [[], []]  # not decayed, decayed: weights of dense layers and latent queries
        for p in self.parameters:
            groups[p.ndim == 2].append(p)
        self.optimizer = torch.optim.AdamW(
            [{"params": groups[0], "weight_decay": 0.0}, {"params": groups[1]}],
            lr=c.learning_rate,
            betas=(BETA1_HIGH, BETA2),
            eps=EPSILON,
            weight_decay=c.weight_decay,
            fused=self.parameters[0].is_cuda,
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            max_lr=c.learning_rate,
            total_steps=self.num_steps,
            pct_start=c.warmup_fraction,
            div_factor=START_DIVISOR,
            final_div_factor=END_DIVISOR,
            base_momentum=BETA1_LOW,
            max_momentum=BETA1_HIGH,
        )

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One training step; returns the loss without waiting for it."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.model(x), y).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        torch._foreach_lerp_(
            self.average, [p.detach() for p in self.parameters], 1 - self.config.ema_decay
        )
        return loss.detach()
