"""What a training step keeps of each point between its forward and its backward pass.

    python -m experiments.bytes_per_point --out experiments/results/bytes_per_point.json

Bytes a point of everything that the backward pass of the 8-block model's loss reads, parameters
left out, from shapes alone: no device is needed. With `remat` these are little more than the
blocks' inputs, and what one part keeps, a block or the last MLP, comes on top while it is computed
again. Arrays that the compiler computes again or keeps in place are counted, its temporaries are
not: `scaling_devices` measures what is needed on a GPU.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from flare_jax.models import FLAREConfig, FLAREModel, functional
from flare_jax.problems.metrics import rel_l2

POINTS = 8192  # and twice as many: their difference leaves out what does not grow


def kept(f: Callable, params, dims: tuple[int, ...], dtype: str = "float32") -> float:
    """Bytes a point that the gradient of the sum of `f(params, arrays [1, N, dim])` reads."""

    def residuals(params, *arrays):
        return jax.vjp(lambda *a: jnp.sum(f(*a)), params, *arrays)[1]

    def size(points):
        arrays = [jax.ShapeDtypeStruct((1, points, d), dtype) for d in dims]
        leaves = jax.tree.leaves(jax.eval_shape(residuals, params, *arrays))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    return (size(2 * POINTS) - size(POINTS)) / POINTS


def row(channels: int, implementation: str, remat: bool, dtype: str) -> dict:
    os.environ["FLARE_JAX_INTERPRET"] = str(int(implementation == "fused"))
    config = FLAREConfig(channels, num_latents=channels, implementation=implementation, remat=remat)
    model = nnx.eval_shape(lambda: FLAREModel(config, 3, 1, dtype=dtype, rngs=nnx.Rngs(0)))
    apply, params = functional(model)
    part = lambda module: kept(*functional(module), (channels,), dtype)
    labels = {"C": channels, "implementation": implementation, "remat": remat, "dtype": dtype}
    return labels | {
        "kept": kept(lambda p, x, y: rel_l2(apply(p, x), y), params, (3, 1)),
        "block": part(model.blocks[0]),
        "last MLP": part(model.out_proj),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    out = Path("experiments/results/bytes_per_point.json")
    parser.add_argument("--out", type=Path, default=out)
    options = parser.parse_args()
    rows = [
        row(channels, implementation, remat, dtype)
        for channels in (64, 128)
        for dtype in ("bfloat16", "float32")
        for implementation in ("fused", "xla")
        for remat in (False, True)
    ]
    record = {
        "command": "python -m experiments.bytes_per_point",
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "blocks": 8,
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=2) + "\n")
    print("| C = M | dtype | implementation | remat | kept | a block | last MLP |\n|" + 7 * "---|")
    for r in rows:
        names = [r["C"], r["dtype"], r["implementation"], "yes" if r["remat"] else "no"]
        cells = names + [f"{r[name]:,.0f}" for name in ("kept", "block", "last MLP")]
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
