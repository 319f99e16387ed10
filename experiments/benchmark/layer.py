"""One block of the model, LayerNorms, the three residual MLPs, mixer and both residuals included.

Least work in arrays of N C elements, if all that belongs to a token is computed again rather than
kept, and in exponentials and hyperbolic tangents (one unit computes both; N H M scores, and 12
gelus a token and channel, 4 in each MLP):

    forward     z: reads x; the rest: reads x, writes x'              3 arrays   2 N H M + 12 N C
    backward    dz: reads x, dx'; the rest: reads x, dx', writes dx   5 arrays   2 N H M + 12 N C
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.benchmark.measure import Program, Row, errors, jax_times, verdict
from flare_jax.models import FLAREConfig, functional
from flare_jax.models.convert import abstract_params
from flare_jax.models.flare import FLAREBlock
from flare_jax.ops.flare import IMPLEMENTATIONS

ARRAYS = 3 + 5
TOLERANCE = {"bfloat16": 5e-2, "float32": 1e-2}  # rounded after each of many layers
SIZES = ((64, 64), (128, 128))  # (C, M)


def least_work(n: int, config: FLAREConfig, itemsize: int) -> dict:
    """Of the forward and backward of all blocks, for `n` tokens."""
    c, scores = config.channel_dim, config.heads * config.num_latents
    exps = 4 * scores + 24 * c
    arrays = ARRAYS * c * itemsize
    return {"bytes": config.num_blocks * n * arrays, "exps": config.num_blocks * n * exps}


def weights(shapes, seed: int = 0):
    """Parameters of these shapes, larger than initial ones: every part shows in the output."""
    rng = np.random.default_rng(seed)
    spread = {"latent_q": 0.5, "kernel": 0.08, "bias": 0.1, "scale": 0.1}

    def draw(path, x):
        values = spread[path[-1].key] * rng.standard_normal(x.shape, np.float32)
        return jnp.asarray(values + (path[-1].key == "scale"))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def grouped(gradient) -> dict:
    """`dq` of the latent queries, which is small, apart from `dw` of all other parameters."""
    groups = {"dq": [], "dw": []}
    for path, x in jax.tree_util.tree_leaves_with_path(gradient):
        groups["dq" if path[-1].key == "latent_q" else "dw"].append(x)
    return groups


def rows(n: int, sizes=SIZES, heads: int = 8, dtype: str = "bfloat16") -> list[Row]:
    found = []
    for c, m in sizes:
        config = FLAREConfig(channel_dim=c, num_blocks=1, num_heads=heads, num_latents=m)
        case = Case(config, n, dtype)
        shared = dict(
            part="layer",
            labels={"C": c, "M": m, "H": heads, "N": n, "B": 1, "dtype": dtype},
            work=least_work(n, config, case.x.dtype.itemsize),
            reference=case.reference,
        )
        for name in [name for name in IMPLEMENTATIONS if name != "reference"]:
            found.append(jax_row(case, name, rank=2 * (name == "xla"), **shared))
        for mode in ("torch eager", "torch compile"):
            measure = functools.partial(measure_torch, case, mode)
            found.append(Row(name=mode, measure=measure, rank=mode == "torch compile", **shared))
    return found


class Case:
    """A block's parameters and input, and what the float32 model makes of them."""

    def __init__(self, config: FLAREConfig, n: int, dtype: str):
        self.config, self.dtype = config, dtype
        self.x = jax.ShapeDtypeStruct((1, n, config.channel_dim), dtype)
        self.model = weights(abstract_params(config, 3, 1))
        self.params = self.model["blocks"]["0"]
        arguments = self.params, self.x.update(dtype="float32"), self.x.update(dtype="float32")
        _, both = self.functions("xla", "float32")
        self.reference = Program(both, *arguments, precision="highest")

    def arrays(self):
        """Parameters, the input and the cotangent of the output."""
        keys = jax.random.split(jax.random.key(1))
        return self.params, *(jax.random.normal(k, self.x.shape, self.dtype) for k in keys)

    def functions(self, implementation: str, dtype: str):
        """Forward, and forward with backward."""
        config = dataclasses.replace(self.config, implementation=implementation)
        block = nnx.eval_shape(lambda: FLAREBlock(config, dtype=dtype, rngs=nnx.Rngs(0)))
        apply, _ = functional(block)

        def both(params, x, dy):
            y, pullback = jax.vjp(apply, params, x)
            dparams, dx = pullback(dy)
            return {"y": y, "dx": dx, **grouped(dparams)}

        return lambda params, x, dy: apply(params, x), both


@functools.lru_cache(maxsize=1)
def expected(case: Case) -> dict:
    params, x, dy = case.arrays()
    return case.reference(params, x.astype("float32"), dy.astype("float32"))


def jax_row(case: Case, name: str, **shared) -> Row:
    forward, both = (
        Program(f, case.params, case.x, case.x) for f in case.functions(name, case.dtype)
    )

    def measure() -> dict:
        arrays = case.arrays()
        row = verdict(errors(both(*arrays), expected(case)), TOLERANCE[case.dtype])
        return row if "skipped" in row else row | jax_times(forward, both, arrays)

    return Row(name=name, measure=measure, programs=(forward, both), **shared)


def measure_torch(case: Case, mode: str) -> dict:
    import torch

    from experiments.benchmark import torch_side
    from experiments.torch_flare import Model

    _, x, dy = case.arrays()
    x, dy = torch_side.to_torch(x).requires_grad_(), torch_side.to_torch(dy)
    model = torch_side.load(Model(case.config, 3, 1), case.model, case.config).to(x.device)
    named = {f"blocks.0.{name}": p for name, p in model.blocks[0].named_parameters()}
    f = torch_side.compiled(model.blocks[0], mode)

    def both():
        y = f(x)
        return y, *torch.autograd.grad(y, (x, *named.values()), dy)

    y, dx, *dw = both()
    dw = torch_side.to_params(model, dict(zip(named, dw, strict=True)), case.config)
    found = {"y": torch_side.to_jax(y), "dx": torch_side.to_jax(dx)}
    found |= grouped(dw["blocks"]["0"])
    row = verdict(errors(found, expected(case)), TOLERANCE[case.dtype])
    del y, dx, dw, found
    return row if "skipped" in row else row | torch_side.times(lambda: f(x), both)
