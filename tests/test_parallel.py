"""Training over many devices gives what one device gives, and says what fits."""

import functools
import json

import numpy as np
import pytest

from flare_jax import parallel
from flare_jax.models.flare import FLAREConfig
from flare_jax.problems.darcy import DarcyConfig, derivative_loss, grid_inputs
from flare_jax.problems.metrics import rel_l2
from flare_jax.problems.problem import Normalizer, Problem, Split
from flare_jax.train.config import TrainConfig, config_class
from flare_jax.train.loop import fit
from flare_jax.train.optimizer import OptimizerConfig

LAYERS = ("k_proj", "v_proj", "ffn", "in_out_proj")
SHALLOW = {f"num_layers_{name}": 0 for name in LAYERS}
MODEL = FLAREConfig(channel_dim=16, num_blocks=2, num_heads=2, num_latents=8, **SHALLOW)
CONFIG = config_class("darcy")(
    DarcyConfig(),
    MODEL,
    OptimizerConfig(learning_rate=1e-2),
    TrainConfig(epochs=10, batch_size=4, eval_every=5, chunk_steps=5),
)  # 50 steps


def toy(loss="rel_l2", masked=True):
    """20 training samples of u = 1 + a x on a 5 x 5 grid: no axis of a mesh divides 25 points."""
    rng = np.random.default_rng(0)
    x = grid_inputs(rng.uniform(1, 2, (32, 5, 5)))
    y = 1 + x[..., 2:] * x[..., :1]
    mask = np.arange(25) < rng.integers(3, 26, (32, 1)) if masked else None
    cut = lambda s: Split(x[s], y[s], None if mask is None else mask[s])
    splits = [cut(s) for s in (slice(20), slice(20, 26), slice(26, 32))]
    normalizers = Normalizer.fit(x, raw=(0, 1)), Normalizer.fit(y)
    losses = {"rel_l2": rel_l2, "grid": functools.partial(derivative_loss, shape=(5, 5))}
    names = ("x", "y", "a"), ("u",)
    return Problem("darcy", *splits, *normalizers, losses[loss], *names, (5, 5))


def losses(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    return folder, fit(toy(), CONFIG, folder)


@pytest.mark.parametrize("sizes, fsdp", [("data=2,tokens=4", False), ("data=4,tokens=2", True)])
def test_fifty_steps_on_eight_devices_are_those_of_one(single, sizes, fsdp, tmp_path):
    mesh = parallel.make_mesh(sizes, 4)
    result = fit(toy(), CONFIG, tmp_path, mesh=mesh, fsdp=fsdp)
    np.testing.assert_allclose(losses(tmp_path), losses(single[0]), rtol=1e-5)
    for name, errors in result["rel_l2"].items():
        np.testing.assert_allclose(errors["mean"], single[1]["rel_l2"][name]["mean"], rtol=1e-4)
    assert result["mesh"] == dict(mesh.shape)
