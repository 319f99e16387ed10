"""The benchmark: its PyTorch side computes what FLAREModel does, and its operator part runs."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative

from experiments.benchmark import __main__ as benchmark
from experiments.benchmark import measure
from experiments.benchmark.layer import weights
from flare_jax.models import FLAREConfig, FLAREModel, functional
from flare_jax.models.convert import abstract_params, from_torch, to_torch
from flare_jax.problems.darcy import derivative_loss
from flare_jax.problems.problem import Normalizer, Split
from flare_jax.train.optimizer import OptimizerConfig, make_optimizer
from flare_jax.train.step import init_state, make_train_step, surrogate_loss

CONFIG = FLAREConfig(
    channel_dim=16, num_blocks=1, num_heads=4, num_latents=8, num_layers_k_proj=1, num_layers_ffn=0
)
GRID = (5, 6)


@pytest.fixture(scope="module")
def problem():
    """`(apply, params, batch)` of a small model."""
    from flax import nnx

    apply, _ = functional(FLAREModel(CONFIG, 3, 1, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    x, y = (jnp.asarray(rng.standard_normal((2, 30, width)), jnp.float32) for width in (3, 1))
    return apply, weights(abstract_params(CONFIG, 3, 1)), Split(x, y)


def torch_model(params):
    torch = pytest.importorskip("torch")
    from experiments.torch_flare import Model

    model = Model(CONFIG, 3, 1)
    state = to_torch(params, CONFIG)
    model.load_state_dict({name: torch.tensor(x) for name, x in state.items()})
    return torch, model


def test_torch_flare_equals_the_model(problem):
    apply, params, batch = problem
    torch, model = torch_model(params)
    y = model(torch.tensor(np.asarray(batch.x)))
    assert relative(y.detach().numpy(), apply(params, batch.x)) <= 1e-5
    y.square().sum().backward()
    got = from_torch({name: p.grad for name, p in model.named_parameters()}, CONFIG)
    want = jax.jit(jax.grad(lambda p: jnp.sum(apply(p, batch.x) ** 2)))(params)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative(a, b) <= 1e-4


def test_torch_training_steps_equal_ours(problem):
    apply, params, batch = problem
    torch, model = torch_model(params)
    from experiments.torch_flare import Trainer, darcy_loss

    x, y = (torch.tensor(np.asarray(a)) for a in batch[:2])
    config = OptimizerConfig(weight_decay=1e-2, ema_decay=0.9)
    trainer = Trainer(model, functools.partial(darcy_loss, shape=GRID), 20, config)
    losses = [float(trainer.step(x, y)) for _ in range(4)]

    tx = make_optimizer(config, 20)
    loss = functools.partial(derivative_loss, shape=GRID)
    loss = surrogate_loss(apply, loss, Normalizer(jnp.zeros(1), jnp.ones(1)))
    step = make_train_step(loss, tx, config.ema_decay)
    state = init_state(jax.tree.map(jnp.copy, params), tx)
    for expected in losses:
        state, metrics = step(state, batch)
        assert metrics["loss"] == pytest.approx(expected, rel=1e-4)
    got = from_torch(
        dict(zip(dict(model.named_parameters()), trainer.average, strict=True)), CONFIG
    )
    moved = lambda tree: jax.tree.map(lambda a, b: a - b, tree, params)
    for a, b in zip(*(jax.tree.leaves(moved(t)) for t in (got, state.ema)), strict=True):
        assert relative(a, b) <= 2e-2  # a step follows the sign of gradients that are nearly zero


def test_operator_part(tmp_path, capsys):
    out = tmp_path / "new" / "benchmark.json"
    benchmark.main(["--smoke", "--parts", "operator", "--tokens", "64", "--out", str(out)])
    rows = {row["implementation"]: row for row in json.loads(out.read_text())["rows"]}
    assert max(rows["xla"]["error"].values()) <= 1e-5
    assert rows["xla"]["ms"] > 0 and rows["xla"]["peak_bytes"] > rows["xla"]["least_bytes"] / 11
    if jax.default_backend() != "gpu":
        assert "GPU" in rows["fused"]["skipped"]
    table = capsys.readouterr().out
    assert all(name in table for name in rows)


def test_a_row_out_of_time_is_skipped():
    rows = benchmark.main(["--smoke", "--parts", "operator", "--budget", "0"])
    assert all("ms" not in row and "skipped" in row for row in rows)


@pytest.mark.parametrize("error", [0.1, float("nan")])
def test_a_wrong_result_is_not_timed(error):
    assert "wrong" in measure.verdict({"y": 0.0, "dq": error}, 0.01)["skipped"]
