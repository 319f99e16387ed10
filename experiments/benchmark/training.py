"""Training steps: loss, gradients, clipping, AdamW and the running average of the parameters.

Each JAX row is one call of `length` steps of the package's own train step under a `lax.scan`, as
the training loop makes it. Least work: that of the blocks, `layer.least_work`; the first and last
MLP, the loss and the optimizer are left out. Outputs and gradients are those at the first step.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.benchmark.layer import TOLERANCE, grouped, least_work, weights
from experiments.benchmark.measure import Program, Row, errors, seconds, verdict
from flare_jax.models import FLAREConfig, FLAREModel, functional
from flare_jax.models.convert import abstract_params
from flare_jax.ops.flare import IMPLEMENTATIONS
from flare_jax.ops.fused.mlp_plans import SEEDS
from flare_jax.parallel import compiler_options
from flare_jax.problems import darcy
from flare_jax.problems.metrics import rel_l2
from flare_jax.problems.problem import Normalizer, Split
from flare_jax.train.optimizer import OptimizerConfig, make_optimizer
from flare_jax.train.step import init_state, make_train_step, surrogate_loss


@dataclasses.dataclass(frozen=True)
class Case:
    """A training step, and what the float32 model makes of its first."""

    name: str
    model: FLAREConfig
    tokens: int
    in_dim: int
    batch: int = 1
    dtype: str = "bfloat16"
    length: int = 1  # steps in one call
    seeds: int = 1  # runs side by side, by vmap
    grid: tuple[int, int] | None = None  # of Darcy flow, whose loss looks at derivatives

    @property
    def loss(self) -> Callable:
        return functools.partial(darcy.derivative_loss, shape=self.grid) if self.grid else rel_l2

    def apply(self, dtype: str, **change) -> Callable:
        """The model as a pure function of its parameters, which are not made for it."""
        config = dataclasses.replace(self.model, **change)
        make = lambda: FLAREModel(config, self.in_dim, 1, dtype=dtype, rngs=nnx.Rngs(0))
        return functional(nnx.eval_shape(make))[0]

    def params(self) -> dict:
        """Those of all seeds."""
        return self.stack([parameters(plain(self), seed) for seed in range(self.seeds)])

    def stack(self, trees: list):
        """One tree for all seeds, with a leading axis if there is more than one."""
        return jax.tree.map(lambda *x: jnp.stack(x), *trees) if self.seeds > 1 else trees[0]

    def samples(self) -> Split:
        """Those of `length` steps: x [length, B, N, in], y [length, B, N, 1]."""
        kx, ky = jax.random.split(jax.random.key(2))
        shape = (self.length, self.batch, self.tokens)
        return Split(*(jax.random.normal(k, (*shape, d)) for k, d in ((kx, self.in_dim), (ky, 1))))

    def over_seeds(self, f: Callable) -> Callable:
        """`f(per seed, shared)` for all seeds at once."""
        return jax.vmap(f, in_axes=(0, None), axis_name=SEEDS) if self.seeds > 1 else f


@functools.cache
def parameters(case: Case, seed: int) -> dict:
    """Of a `plain` case and a seed."""
    with jax.ensure_compile_time_eval():  # arrays, even where only shapes are asked for
        return weights(abstract_params(case.model, case.in_dim, 1), seed)


def paper_cases(n: int) -> list[Case]:
    """The model at `n` points, and steps of published recipes (arXiv 2508.12594)."""
    small = FLAREConfig(channel_dim=64, num_blocks=8, num_heads=8, num_latents=64)
    preset = darcy.PRESETS["paper"]
    names = ("channel_dim", "num_blocks", "num_heads", "num_latents")
    for_darcy = FLAREConfig(**{name: preset[name] for name in names})
    side = (preset["grid"] - 1) // preset["stride"] + 1  # 85
    plate = Case("elasticity", small, 972, 2, batch=2, dtype="float32", length=50)
    flow = Case("darcy", for_darcy, side**2, 3, batch=preset["batch_size"], grid=(side, side))
    lpbf = Case("lpbf", dataclasses.replace(small, num_latents=128), 50_000, 3, length=10)
    return [
        Case("model", small, n, 3),
        plate,
        dataclasses.replace(plate, dtype="bfloat16"),
        dataclasses.replace(plate, seeds=4),
        dataclasses.replace(flow, dtype="float32", length=20),
        lpbf,
        dataclasses.replace(lpbf, dtype="float32"),
    ]


def rows(cases: list[Case], part: str) -> list[Row]:
    """`model`: every implementation; `step`: the default, and plain XLA once a problem."""
    found, seen = [], set()
    for case in cases:
        m, size = case.model, jnp.dtype(case.dtype).itemsize
        sizes = {"C": m.channel_dim, "M": m.num_latents, "H": m.heads, "N": case.tokens}
        shared = dict(
            part=part,
            labels=sizes | {"B": case.batch, "dtype": case.dtype, "seeds": case.seeds},
            work=least_work(case.tokens * case.batch * case.seeds, m, size),
            reference=reference(plain(case)),
        )
        shared["labels"] |= {"problem": case.name} if part == "step" else {}
        names = [name for name in IMPLEMENTATIONS if name != "reference"]
        if part == "step":
            names = [None] if case.name in seen else [None, "xla"]
            seen.add(case.name)
        for name in names:
            found.append(jax_row(case, name, rank=2 * (name == "xla"), **shared))
        for mode in ("torch eager", "torch compile") if case.seeds == 1 else ():
            measure = functools.partial(measure_torch, case, mode)
            rank = (3 if part == "step" else 1) if mode == "torch compile" else 0
            found.append(Row(name=mode, measure=measure, rank=rank, **shared))
    return found


# --------------------------------------------------------------------------- check ---


def value_and_gradient(case: Case, apply: Callable) -> Callable:
    """`(params, first samples) -> predictions and gradients`."""

    def run(params, samples):
        first = jax.tree.map(lambda a: a[0], samples)

        def loss(params):
            y = apply(params, first.x)
            return jnp.mean(case.loss(y, first.y)), y

        gradient, y = jax.grad(loss, has_aux=True)(params)
        return {"y": y, **grouped(gradient)}

    return case.over_seeds(run)


def plain(case: Case) -> Case:
    """What the reference is computed for: one step of one seed in float32."""
    return dataclasses.replace(case, dtype="float32", length=1, seeds=1)


@functools.cache
def reference(case: Case) -> Program:
    """Of a `plain` case: plain XLA, block by block where a million points would not fit."""
    apply = case.apply("float32", implementation="xla", remat=case.tokens > 100_000)
    arguments = jax.eval_shape(case.params), jax.eval_shape(case.samples)
    return Program(value_and_gradient(case, apply), *arguments, precision="highest")


def expected(case: Case) -> dict:
    """Predictions and gradients of the float32 model, one seed after the other."""
    return case.stack([expected_of(plain(case), seed) for seed in range(case.seeds)])


@functools.cache
def expected_of(case: Case, seed: int) -> dict:
    return reference(case)(parameters(case, seed), case.samples())


# --------------------------------------------------------------------------- steps ---


def make_steps(case: Case, apply: Callable):
    """`(initial state of params, jitted (state, samples) -> (state, metrics))`."""
    config = OptimizerConfig()
    tx = make_optimizer(config, 10_000)
    loss = surrogate_loss(apply, case.loss, Normalizer(jnp.zeros(1), jnp.ones(1)))
    train_step = make_train_step(loss, tx, config.ema_decay)
    steps = case.over_seeds(functools.partial(jax.lax.scan, train_step))
    start = functools.partial(init_state, tx=tx)
    start = jax.vmap(start) if case.seeds > 1 else start
    options = compiler_options(case.seeds * case.batch * case.tokens)
    return start, jax.jit(steps, donate_argnums=0, compiler_options=options)


def jax_row(case: Case, name: str | None, **shared) -> Row:
    apply = case.apply(case.dtype, implementation=name)
    start, steps = make_steps(case, apply)
    params, samples = jax.eval_shape(case.params), jax.eval_shape(case.samples)
    first = jax.eval_shape(dataclasses.replace(case, length=1).samples)
    check = Program(value_and_gradient(case, apply), params, first)
    steps = Program(steps, jax.eval_shape(start, params), samples)

    def measure() -> dict:
        params, samples = case.params(), case.samples()
        found = errors(check(params, jax.tree.map(lambda a: a[:1], samples)), expected(case))
        row = verdict(found, TOLERANCE[case.dtype])
        if "skipped" in row:
            return row
        state = start(jax.tree.map(jnp.copy, params))  # the steps reuse its memory

        def call():
            nonlocal state
            state, metrics = steps(state, samples)
            return metrics["loss"]

        return row | {"ms": 1e3 * seconds(call) / case.length, "peak_bytes": steps.peak_bytes}

    return Row(name=name or "default", measure=measure, programs=(check, steps), **shared)


def measure_torch(case: Case, mode: str) -> dict:
    """One step a call: PyTorch has no scan.

    It rounds to 16 bits after every operation, of which a model has many. If that is more than the
    tolerance, the same program is judged in float32, on fewer points (`float32_error`).
    """
    from experiments.benchmark import torch_side
    from experiments.torch_flare import Trainer

    built = in_torch(case, mode)
    found = torch_errors(case, *built)
    row = verdict(found, TOLERANCE[case.dtype])
    if "skipped" in row and case.dtype != "float32":
        exact = dataclasses.replace(case, dtype="float32", tokens=max(1, case.tokens // 16))
        judged = verdict(torch_errors(exact, *in_torch(exact, mode)), TOLERANCE["float32"])
        row = judged | {"error": found, "float32_error": judged["error"]}
    if "skipped" in row:
        return row
    f, _, loss, x, y = built
    trainer = Trainer(f, loss, num_steps=10_000)
    return row | torch_side.times(None, lambda: trainer.step(x, y))


def in_torch(case: Case, mode: str):
    """The model as the mode runs it, the model itself, the loss, and the first samples."""
    import torch

    from experiments.benchmark import torch_side
    from experiments.torch_flare import Model, darcy_loss
    from experiments.torch_flare import rel_l2 as torch_rel_l2

    x, y = (torch_side.to_torch(a[0]) for a in case.samples()[:2])
    model = Model(case.model, case.in_dim, 1, dtype=getattr(torch, case.dtype))
    model = torch_side.load(model, case.params(), case.model).to(x.device)
    loss = functools.partial(darcy_loss, shape=case.grid) if case.grid else torch_rel_l2
    return torch_side.compiled(model, mode), model, loss, x, y


def torch_errors(case: Case, f, model, loss, x, y) -> dict[str, float]:
    """Those of the prediction and of the gradients at the first step, of what `in_torch` built."""
    from experiments.benchmark import torch_side

    prediction = f(x)
    loss(prediction, y).mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    gradient = torch_side.to_params(model, gradients, case.model)
    return errors({"y": torch_side.to_jax(prediction), **grouped(gradient)}, expected(case))
