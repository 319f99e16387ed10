"""The PyTorch rows: arrays handed over, times and peak memory; loaded only where torch is."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import torch

from experiments.benchmark.measure import seconds
from flare_jax.models import FLAREConfig
from flare_jax.models.convert import from_torch
from flare_jax.models.convert import to_torch as to_torch_names

MODES = ("torch eager", "torch compile")
ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    torch.set_num_threads(1)  # tiny arrays, and cores that JAX's threads are waiting on
torch.set_float32_matmul_precision("high")  # TF32, as JAX's default


def compiled(function: Callable, mode: str) -> Callable:
    """`function` as the mode has it; on a CPU compilation is only traced, to be quick."""
    if mode == "torch eager":
        return function
    torch._dynamo.reset()  # rows must not count towards each other's limit of recompilations
    return torch.compile(function, dynamic=False, backend="inductor" if ON_GPU else "aot_eager")


def to_torch(x: jax.Array) -> torch.Tensor:
    """A copy that torch owns, so that its peak memory counts it."""
    return torch.from_dlpack(jax.block_until_ready(x)).clone()


def to_jax(x: torch.Tensor) -> jax.Array:
    synchronize()
    return jnp.from_dlpack(x.detach().contiguous())


def load(model: torch.nn.Module, params: dict, config: FLAREConfig) -> torch.nn.Module:
    """`model` with the parameters of the JAX model."""
    state = {name: torch.tensor(x) for name, x in to_torch_names(params, config).items()}
    model.load_state_dict(state)
    return model


def to_params(model: torch.nn.Module, gradients: dict, config: FLAREConfig) -> dict:
    """Gradients by PyTorch name as the JAX model names them, zero for those not given."""
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    return from_torch(zeros | gradients, config)


def synchronize(_=None) -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def times(forward: Callable | None, whole: Callable) -> dict:
    """`forward_ms`, `ms` and `peak_bytes` of two calls without arguments."""
    release()
    found = {"ms": 1e3 * seconds(whole, synchronize)}
    found["peak_bytes"] = torch.cuda.max_memory_allocated() if ON_GPU else 0
    if forward is not None:
        found["forward_ms"] = 1e3 * seconds(forward, synchronize)
    return found


def release() -> None:
    """Gives unused memory back to the device, for JAX, and forgets the peak."""
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
