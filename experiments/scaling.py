"""Time and peak memory of one mixing layer against the number of points N: the paper's figure.

    python -m experiments.scaling --out experiments/results/scaling.json            an NVIDIA GPU
    python -m experiments.scaling --tokens 1024 4096 16384 --latents 128 --dtype float32     a CPU
    python -m experiments.scaling --smoke                                           tiny, anywhere

A layer maps [1, N, C] to [1, N, C], C = 128 and H = 8 as published, projections included:

    FLARE              residual MLPs K and V (three hidden layers), the operator, a dense layer;
                       with each implementation, and in PyTorch by two SDPA calls ("torch, 2 SDPA")
    softmax attention  dense layers for q, k and v, full attention (cuDNN on a GPU), a dense layer
    physics attention  of Transolver (arXiv 2402.02366): each head gathers points into M slices by
                       softmax weights over M, the slices attend to each other, and are scattered
                       back by the same weights

`ms` is forward with the backward of all parameters and of the input, a median; short calls are
queued, up to 50 of them, before each wait for the device. `peak GB` is what the compiled program
needs, arguments included, or PyTorch's peak. Every
row of the smallest N is compared with the same layer in float32; if one is wrong, its larger ones
are not timed either. A row is skipped when the next smaller N says that a call will take longer
than `--slowest`, or when time or memory run out. Products of float32 arrays follow the defaults:
TF32 on NVIDIA GPUs.
"""

import argparse
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console
from rich.table import Table

from experiments.benchmark import measure
from experiments.benchmark.__main__ import fill_in, release
from experiments.benchmark.layer import TOLERANCE, grouped, weights
from experiments.benchmark.measure import Program, Row, errors, seconds, verdict
from experiments.records import command, write
from flare_jax.models import FLAREConfig, functional
from flare_jax.models.convert import abstract_params
from flare_jax.models.flare import FLAREMixer
from flare_jax.ops.flare import IMPLEMENTATIONS
from flare_jax.plots import plt

CHANNELS, HEADS = 128, 8
TOKENS, LARGE = (1_024, 10_240, 102_400, 1_024_000), 16_384_000  # multiples of 64
LATENTS = (128, 512, 2048)
COMPILE_SHARE = 0.7  # of the budget, at most
MOST_WEIGHTS = 1.6e10  # bytes of physics attention's N H M weights, of which it keeps several


@dataclasses.dataclass(frozen=True)
class Layer:
    """One line of the figure: a layer's function `(params, x) -> y` and its parameters."""

    name: str
    latents: int | None
    apply: Callable | None  # None: FLARE in PyTorch
    params: dict
    exponent: int = 1  # of N in the time
    reference: Callable | None = None  # the same in float32; None: `apply` itself

    @property
    def label(self) -> str:
        return f"{self.name}, M={self.latents}" if self.latents else self.name


def layers(latents, channels: int, heads: int, dtype: str) -> list[Layer]:
    wide, d = {"kernel": shape(channels, channels), "bias": shape(channels)}, channels // heads
    four = weights({name: wide for name in ("q", "k", "v", "out")})
    attend = functools.partial(softmax_attention, heads=heads)
    found = [Layer("softmax attention", None, attend, four, exponent=2)]
    for m in latents:
        config = flare_config(m, channels, heads)
        params, plain = flare_params(config)["blocks"]["0"]["att"], mixer(config, "xla", "float32")
        for name in IMPLEMENTATIONS:
            if name != "reference":
                apply = mixer(config, name, dtype)
                found.append(Layer(f"FLARE, {name}", m, apply, params, reference=plain))
        found.append(Layer("FLARE, torch, 2 SDPA", m, None, params, reference=plain))
        among = {name: {"kernel": shape(d, d)} for name in "qkv"}
        slices = {"kernel": shape(d, m), "bias": shape(m)}
        params = weights({"x": wide, "f": wide, "slices": slices, "out": wide, **among})
        attend = functools.partial(physics_attention, heads=heads)
        found.append(Layer("physics attention", m, attend, params))
    return found


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def flare_config(m: int, channels: int, heads: int) -> FLAREConfig:
    return FLAREConfig(channel_dim=channels, num_blocks=1, num_heads=heads, num_latents=m)


def flare_params(config: FLAREConfig) -> dict:
    """Of a model with one such block."""
    return weights(abstract_params(config, 3, 1))


def mixer(config: FLAREConfig, implementation: str, dtype: str) -> Callable:
    """FLAREMixer as a pure function."""
    config = dataclasses.replace(config, implementation=implementation)
    return functional(nnx.eval_shape(lambda: FLAREMixer(config, dtype=dtype, rngs=nnx.Rngs(0))))[0]


def dense(p: dict, x: jax.Array) -> jax.Array:
    """x W + b in the dtype of x; no bias where there is none."""
    y = x @ p["kernel"].astype(x.dtype)
    return y + jnp.expand_dims(p["bias"].astype(x.dtype), range(x.ndim - 1)) if "bias" in p else y


def softmax_attention(p: dict, x: jax.Array, heads: int) -> jax.Array:
    """softmax(q k^T / sqrt D) v over all points, head by head."""
    q, k, v = (dense(p[n], x).reshape(*x.shape[:2], heads, -1) for n in "qkv")
    fused = jax.default_backend() == "gpu" and x.dtype != jnp.float32
    y = jax.nn.dot_product_attention(q, k, v, implementation="cudnn" if fused else "xla")
    return dense(p["out"], y.reshape(x.shape))


def physics_attention(p: dict, x: jax.Array, heads: int) -> jax.Array:
    """Slices s = w^T f / sum w with w = softmax(slices(x)), attention among them, y = w s'.

    Transolver's initial temperature 1/2 divides the logits of w.
    """
    split = lambda y: y.reshape(*y.shape[:2], heads, -1)  # [B, N, H, D]
    logits = dense(p["slices"], split(dense(p["x"], x))) / 0.5
    w = jax.nn.softmax(logits.astype(jnp.float32), axis=-1).astype(x.dtype)  # [B, N, H, M]
    total = w.sum(1, dtype=jnp.float32)[..., None]  # [B, H, M, 1]
    s = jnp.einsum(
        "bnhm,bnhd->bhmd", w, split(dense(p["f"], x)), preferred_element_type=jnp.float32
    )
    s = (s / (total + 1e-5)).astype(x.dtype).swapaxes(1, 2)  # [B, M, H, D]
    s = jax.nn.dot_product_attention(*(dense(p[n], s) for n in "qkv"))
    return dense(p["out"], jnp.einsum("bnhm,bmhd->bnhd", w, s).reshape(x.shape))


# --------------------------------------------------------------------------- rows ---


def both(apply: Callable) -> Callable:
    """Forward and backward: y and the gradients of the parameters and of x."""

    def f(params, x, dy):
        y, pullback = jax.vjp(apply, params, x)
        dparams, dx = pullback(dy)
        return {"y": y, "dx": dx, **gradients(dparams)}

    return f


def gradients(dparams: dict) -> dict:
    """Those of latent queries, where there are any, apart from all others."""
    return {name: leaves for name, leaves in grouped(dparams).items() if leaves}


def inputs(layer: Layer, n: int, channels: int, dtype: str) -> tuple:
    """Parameters, x and the cotangent of y."""
    keys = jax.random.split(jax.random.key(0))
    return layer.params, *(jax.random.normal(key, (1, n, channels), dtype) for key in keys)


def rows_of(
    layer: Layer, tokens, channels: int, heads: int, dtype: str, slowest: float, references: dict
):
    """The rows of one line of the figure, by N; they share what the rows before them found.

    `references` holds the float32 programs, by function: layers of one truth share one.
    """
    labels = {"C": channels, "H": heads, "M": layer.latents, "B": 1, "dtype": dtype}
    found, last = [], {}
    for n in tokens:
        make = functools.partial(inputs, layer, n, channels, dtype)
        arrays = jax.eval_shape(make)
        size = n * heads * (layer.latents or 0) * jnp.dtype(dtype).itemsize
        if layer.name.startswith("physics") and size > MOST_WEIGHTS:
            reason = f"its weights need {size / 1e9:.0f} GB"
            row = Row(
                "layer", labels | {"N": n}, layer.name, lambda r=reason: {"skipped": r}, rank=n
            )
            found.append(row)
            continue
        program = layer.apply and Program(both(layer.apply), *arrays)
        reference = None
        if n == tokens[0]:
            truth = layer.reference or layer.apply
            wide = jax.tree.map(lambda a: a.update(dtype="float32"), arrays)
            program32 = Program(both(truth), *wide, precision="highest")
            reference = references.setdefault(truth, program32)
        measure = functools.partial(measure_row, layer, n, make, program, reference, slowest, last)
        programs = () if program is None else (program,)
        row = Row("layer", labels | {"N": n}, layer.name, measure, programs, reference, rank=n)
        found.append(row)
    return found


def measure_row(layer: Layer, n: int, make, program, reference, slowest: float, last: dict) -> dict:
    """`ms` and `peak_bytes`, or why not; `last` is what the rows before found and gets this one."""
    if "skipped" in last:
        return {"skipped": last["skipped"]}
    guess = last.get("ms", 0) / 1e3 * (n / last.get("N", n)) ** layer.exponent
    if guess > slowest:
        return {"skipped": f"about {guess:.1f} s a call"}
    try:
        row = checked_and_timed(layer, make(), program, reference)
    except Exception as error:
        if "memory" in str(error).lower() or "RESOURCE_EXHAUSTED" in str(error):
            last["skipped"] = f"out of memory at N={n:,}"
        raise
    if "skipped" in row:
        last["skipped"] = f"wrong at N={n:,}"
    last.update({k: row[k] for k in ("ms",) if k in row}, N=n)
    return row


def checked_and_timed(layer: Layer, arrays, program, reference) -> dict:
    row = {}
    call, wait, peak, named = jax_calls(program, arrays) if program else torch_calls(layer, arrays)
    if reference is not None:
        want = reference(*jax.tree.map(lambda a: a.astype("float32"), arrays))
        row = verdict(errors(named(call()), want), TOLERANCE[arrays[1].dtype.name])
        del want
    if "skipped" in row:
        return row
    return row | {"ms": 1e3 * seconds(call, wait), "peak_bytes": peak()}


def jax_calls(program: Program, arrays):
    """The call to time, how to wait for it, its peak memory, and its result by name."""
    same = lambda result: result
    return lambda: program(*arrays), jax.block_until_ready, lambda: program.peak_bytes, same


def torch_calls(layer: Layer, arrays):
    """The same for the layer in PyTorch."""
    import torch

    from experiments.benchmark import torch_side
    from experiments.torch_flare import Model

    _, x, dy = arrays
    _, heads, d = layer.params["latent_q"].shape
    config = flare_config(layer.latents, heads * d, heads)
    x, dy = torch_side.to_torch(x).requires_grad_(), torch_side.to_torch(dy)
    model = torch_side.load(Model(config, 3, 1), flare_params(config), config).to(x.device)
    module = model.blocks[0].att
    names = [f"blocks.0.att.{name}" for name, _ in module.named_parameters()]
    torch_side.release()

    def call():
        y = module(x)
        return y, *torch.autograd.grad(y, (x, *module.parameters()), dy)

    def named(result):
        y, dx, *dw = result
        dw = torch_side.to_params(model, dict(zip(names, dw, strict=True)), config)
        dw = gradients(dw["blocks"]["0"]["att"])
        return {"y": torch_side.to_jax(y), "dx": torch_side.to_jax(dx), **dw}

    peak = lambda: torch.cuda.max_memory_allocated() if torch_side.ON_GPU else None
    return call, torch_side.synchronize, peak, named


# ------------------------------------------------------------------------ results ---


def show(rows: list[dict]) -> None:
    tokens = sorted({row["N"] for row in rows})
    table = Table(title="ms (peak GB), forward and backward", show_lines=False)
    for name in ("layer", *(f"N={n:,}" for n in tokens)):
        table.add_column(name, justify="left" if name == "layer" else "right")
    for name in dict.fromkeys(label(row) for row in rows):
        cells = {row["N"]: cell(row) for row in rows if label(row) == name}
        table.add_row(name, *(cells.get(n, "") for n in tokens))
    Console(width=160).print(table)


def label(row: dict) -> str:
    return f"{row['implementation']}, M={row['M']}" if row["M"] else row["implementation"]


def cell(row: dict) -> str:
    if "ms" not in row:
        return row["skipped"][:22]
    memory = f" ({row['peak_bytes'] / 1e9:.2f})" if row["peak_bytes"] else ""
    return f"{row['ms']:.2f}{memory}"


def figure(path: Path, rows: list[dict]) -> None:
    """Time and memory against N; colour says which layer, dashes how many latents."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.2), layout="constrained")
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    dashes = dict(zip(sorted({row["M"] or 0 for row in rows}), ("-", "-", "--", ":"), strict=False))
    for key, axis, title, factor in (
        ("ms", axes[0], "time, ms", 1),
        ("peak_bytes", axes[1], "peak memory, GB", 1e-9),
    ):
        for name in dict.fromkeys(label(row) for row in rows):
            line = [row for row in rows if label(row) == name and row.get(key)]
            if line:
                x, y = [row["N"] for row in line], [row[key] * factor for row in line]
                colour = f"C{names.index(line[0]['implementation'])}"
                axis.loglog(x, y, dashes[line[0]["M"] or 0], marker=".", color=colour, label=name)
        axis.set(xlabel="points N", title=f"{title}, forward and backward")
        axis.grid(alpha=0.3)
    handles, labels_ = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels_, loc="outside right upper", fontsize="x-small", handlelength=5)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments=None) -> list[dict]:
    parser = argparse.ArgumentParser(prog="python -m experiments.scaling")
    parser.add_argument("--tokens", type=int, nargs="+", help="N of each column")
    parser.add_argument("--latents", type=int, nargs="+", help="M of each line")
    parser.add_argument("--dtype", choices=TOLERANCE, default="bfloat16")
    parser.add_argument("--budget", type=float, default=230, help="seconds; then rows are skipped")
    parser.add_argument("--slowest", type=float, default=1.5, help="seconds of the longest call")
    parser.add_argument("--smoke", action="store_true", help="a tiny configuration")
    parser.add_argument("--out", type=Path, help="JSON to write; the figure goes beside it")
    args = parser.parse_args(arguments)
    began = time.perf_counter()
    measure.TIMING_SECONDS = 0.05 if args.smoke else 0.3
    channels, heads = (16, 2) if args.smoke else (CHANNELS, HEADS)
    tokens = args.tokens or ((256, 512) if args.smoke else (*TOKENS, LARGE))
    latents = args.latents or ((8,) if args.smoke else LATENTS)
    lines = layers(latents, channels, heads, args.dtype)
    shared = channels, heads, args.dtype, args.slowest, {}
    rows = [r for x in lines for r in rows_of(x, only(x, tokens, latents), *shared)]
    order = sorted(rows, key=lambda row: row.rank)
    measure.compile_all(order, min(16, os.cpu_count() or 1), COMPILE_SHARE * args.budget)
    results = {}
    for row in order:
        late = time.perf_counter() - began > args.budget
        results[id(row)] = {"skipped": "no time left"} if late else fill_in(row)
        release()
        record = {**row.labels, "implementation": row.name, **results[id(row)]}
        print(f"N={record['N']:,} {label(record)}: {cell(record)}", file=sys.stderr, flush=True)
    found = [{**row.labels, "implementation": row.name, **results[id(row)]} for row in rows]
    show(found)
    spent = time.perf_counter() - began
    print(f"{spent:.0f} s")
    if args.out:
        tf32 = ", products TF32 on NVIDIA GPUs" if args.dtype == "float32" else ""
        how = dict(command=command("scaling", arguments), seconds=spent)
        write(args.out, found, **how, precision=args.dtype + tf32)
        figure(args.out.with_suffix(".png"), found)
    return found


def only(layer: Layer, tokens, latents) -> list[int]:
    """16 million points are for FLARE in JAX with the fewest latents."""
    fits = layer.name.startswith("FLARE") and layer.apply and layer.latents == min(latents)
    return sorted(n for n in tokens if n < LARGE or fits)


if __name__ == "__main__":
    main()
