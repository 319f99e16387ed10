"""PyTorch FLARE weights to parameters and back, bit for bit.

The names correspond one to one:

    blocks.3.att.k_proj.fcs.0.weight [out, in]   blocks/3/att/k_proj/fcs/0/kernel [in, out]
    blocks.3.norm1.weight                        blocks/3/norm1/scale
    blocks.3.att.latent_q [C, M]                 blocks/3/att/latent_q [M, H, D]
    out_proj.0.weight, out_proj.1.fc1.weight     out_proj/norm/scale, out_proj/mlp/fc1/kernel

PyTorch *views* latent_q [C, M] as [H, M, D]; it is not a transpose.
"""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from flax import nnx, traverse_util

from flare_jax.models.flare import FLAREConfig, FLAREModel
from flare_jax.models.functional import Params, functional

PREFIXES = ("_orig_mod.", "module.")  # of compiled and of distributed PyTorch models
NESTED = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
)  # where checkpoints keep weights


def from_torch(weights: Mapping | str | Path, config: FLAREConfig) -> Params:
    """Parameters of `FLAREModel(config, ...)` from a PyTorch state dict.

    Args:
        weights: a mapping of names to arrays or tensors, or the path of a `.pt`/`.pth` file (read
            with `weights_only`, so that it cannot run code; needs torch) or a `.safetensors` file.
        config: the architecture. Input and output widths come from the weights.

    Raises:
        ValueError: lists every entry that is missing, unexpected or of another shape.
        FileNotFoundError: there is no such file.
    """
    state = read(weights) if isinstance(weights, str | Path) else dict(weights)
    state = {strip(name): to_numpy(x) for name, x in state.items()}
    first = state.get("in_proj.fc1.weight", state.get("in_proj.fc.weight"))
    last = state.get("out_proj.1.fc2.weight", state.get("out_proj.1.fc.weight"))
    in_dim, out_dim = (1 if x is None else x.shape[i] for x, i in ((first, -1), (last, 0)))
    template = traverse_util.flatten_dict(abstract_params(config, in_dim, out_dim), sep="/")
    names = torch_names(template, config)

    problems = [f"missing: {n}" for n in names if n not in state]
    problems += [f"unexpected: {n}" for n in state if n not in names]
    params = {}
    for name in names.keys() & state.keys():
        path, index = names[name]
        want = layer_shape(template[path].shape, index)
        shape = torch_shape(path, want)
        if state[name].shape != shape:
            problems.append(f"shape of {name}: expected {shape}, got {state[name].shape}")
            continue
        x = from_torch_layout(path, state[name], want)
        params.setdefault(path, {})[index] = x
    if problems:
        raise ValueError("weights do not fit the model:\n  " + "\n  ".join(sorted(problems)))
    join = lambda xs: np.stack([xs[i] for i in sorted(xs)]) if None not in xs else xs[None]
    params = {path: jax.numpy.asarray(join(xs)) for path, xs in params.items()}
    return traverse_util.unflatten_dict(params, sep="/")


def to_torch(params: Params, config: FLAREConfig) -> dict[str, np.ndarray]:
    """The PyTorch state dict, as NumPy arrays, of a FLARE model's parameters."""
    flat = traverse_util.flatten_dict(params, sep="/")
    state = {}
    for name, (path, index) in torch_names(flat, config).items():
        x = np.asarray(flat[path])
        state[name] = to_torch_layout(path, x if index is None else x[index])
    return state


def save_torch(params: Params, config: FLAREConfig, path: str | Path) -> None:
    """Writes the PyTorch state dict to a `.safetensors` or `.pt`/`.pth` file (needs torch)."""
    state, path = to_torch(params, config), Path(path)
    state = {name: np.array(x, order="C") for name, x in state.items()}
    if path.suffix == ".safetensors":
        from safetensors.numpy import save_file

        save_file(state, path)
    elif path.suffix in (".pt", ".pth"):
        import torch

        torch.save({name: torch.from_numpy(x) for name, x in state.items()}, path)
    else:
        raise ValueError(f"path must end in .safetensors, .pt or .pth, got {path}")


def read(path: str | Path) -> dict:
    """The tensors of a weight file by name, without running anything in it."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no weight file {path}")
    if path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        return load_file(path)
    if path.suffix not in (".pt", ".pth"):
        raise ValueError(f"weights must be a .pt, .pth or .safetensors file, got {path}")
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"reading {path.name} needs torch: pip install torch") from error
    state = torch.load(path, map_location="cpu", weights_only=True)
    for key in NESTED:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    return state


def strip(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.split(".", 1)[1]
    return name


def to_numpy(x) -> np.ndarray:
    x = x.detach().cpu() if hasattr(x, "detach") else x  # a torch tensor
    x = np.asarray(x.float() if str(getattr(x, "dtype", "")) == "torch.bfloat16" else x)
    return x.astype(np.float32) if x.dtype != np.float32 else x


def abstract_params(config: FLAREConfig, in_dim: int, out_dim: int) -> Params:
    """The model's parameters as shapes, without making them."""
    make = lambda: functional(FLAREModel(config, in_dim, out_dim, rngs=nnx.Rngs(0)))[1]
    return jax.eval_shape(make)


def torch_names(flat: Mapping, config: FLAREConfig) -> dict[str, tuple[str, int | None]]:
    """PyTorch name -> (parameter path, layer of a stacked block or None)."""
    names = {}
    for path in flat:
        head, *rest = path.split("/")
        stacked = head == "blocks" and config.scan_blocks
        for index in range(config.num_blocks) if stacked else (None,):
            parts = [head, *([str(index)] if stacked else []), *rest]
            if head == "out_proj":
                parts[1] = {"norm": "0", "mlp": "1"}[parts[1]]
            if parts[-1] in ("kernel", "scale"):
                parts[-1] = "weight"
            names[".".join(parts)] = (path, index)
    return names


def layer_shape(shape: tuple, index: int | None) -> tuple:
    return tuple(shape) if index is None else tuple(shape[1:])


def torch_shape(path: str, shape: tuple) -> tuple:
    if path.endswith("latent_q"):
        m, h, d = shape
        return (h * d, m)
    return shape[::-1] if path.endswith("kernel") else shape


def from_torch_layout(path: str, x: np.ndarray, shape: tuple) -> np.ndarray:
    if path.endswith("latent_q"):
        m, h, d = shape
        return np.ascontiguousarray(x).reshape(h, m, d).swapaxes(0, 1)
    return x.T if path.endswith("kernel") else x


def to_torch_layout(path: str, x: np.ndarray) -> np.ndarray:
    if path.endswith("latent_q"):
        m, h, d = x.shape
        return x.swapaxes(0, 1).reshape(h * d, m)
    return x.T if path.endswith("kernel") else x
