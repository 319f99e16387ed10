"""Training on meshes of different sizes: buckets change nothing but the shapes of arrays."""

import dataclasses
import json
import os
import shutil

import jax
import numpy as np
import pytest

from flare_jax import parallel, predict
from flare_jax.data.buckets import bucketed
from flare_jax.models.flare import FLAREConfig
from flare_jax.problems.darcy import DarcyConfig
from flare_jax.problems.metrics import rel_l2
from flare_jax.problems.problem import Normalizer, Problem, buckets_of
from flare_jax.train import programs
from flare_jax.train.config import TrainConfig, config_class
from flare_jax.train.loop import fit
from flare_jax.train.optimizer import OptimizerConfig

LAYERS = {f"num_layers_{name}": 0 for name in ("k_proj", "v_proj", "ffn", "in_out_proj")}
CONFIG = config_class("darcy")(
    DarcyConfig(),
    FLAREConfig(channel_dim=8, num_blocks=1, num_heads=1, num_latents=4, **LAYERS),
    OptimizerConfig(learning_rate=3e-2),
    TrainConfig(epochs=20, batch_size=2, eval_every=10, chunk_steps=4, seeds=2),
)


def toy():
    """20 training meshes of u = x + a on 5, 8 or 13 points, in buckets of 8 and 16."""
    rng = np.random.default_rng(0)
    samples = []
    for n in (5, 8, 13, 5, 13) * 6:
        x = rng.uniform(1, 2, (n, 3)).astype(np.float32)
        samples.append((x, x[:, 2:] + x[:, :1]))
    splits = [
        bucketed(samples[rows], (8, 16)) for rows in (slice(20), slice(20, 25), slice(25, 30))
    ]
    x, y = (np.concatenate([s[i] for s in samples[:20]])[None] for i in (0, 1))
    normalizers = Normalizer.fit(x, raw=(0, 1, 2)), Normalizer.fit(y)
    half = {"half": lambda p, y, mask: rel_l2(p, y, mask) / 2}
    return Problem("darcy", *splits, *normalizers, rel_l2, ("x", "y", "a"), ("u",), metrics=half)


@pytest.fixture(scope="module", autouse=True)
def compiles_fast():
    """Compile time is most of these tests' time, and what XLA makes faster is not their matter."""
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, True)
    yield
    jax.config.update(name, before)


def losses(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, fit(toy(), CONFIG, folder)


def test_a_run_learns_and_says_what_padding_costs(whole):
    first, second = whole[1]["rel_l2"]["last"]["seeds"]
    assert first != second and min(first, second) < 0.6 * whole[1]["mean_predictor_rel_l2"]
    train = toy().train
    real = sum(s.mask.sum() for s in train)
    assert whole[1]["padding"] == pytest.approx(sum(s.mask.size for s in train) / real - 1)
    assert len(train) == 2


def test_errors_are_those_of_the_meshes_without_padding(whole):
    surrogate = predict.load_run(whole[0], "last")
    x, y = [], []
    for split in buckets_of(toy().test):
        for i, mask in enumerate(split.mask):
            x.append(split.x[i : i + 1, mask])
            y.append(split.y[i : i + 1, mask])
    one_by_one = [rel_l2(surrogate(a), b)[0] for a, b in zip(x, y, strict=True)]
    error = whole[1]["rel_l2"]["last"]
    assert min(abs(np.mean(one_by_one) / error["seeds"] - 1)) < 1e-5  # of the better seed
    np.testing.assert_allclose(whole[1]["half"]["last"]["mean"], error["mean"] / 2, rtol=1e-6)


def test_a_resumed_run_gives_the_numbers_of_one_that_never_stopped(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    steps = sorted(map(int, os.listdir(folder / "checkpoints")))
    shutil.rmtree(folder / "checkpoints" / str(steps[-1]))  # as if stopped halfway
    again = fit(toy(), CONFIG, folder, resume=True)
    assert again["rel_l2"] == whole[1]["rel_l2"] and losses(folder) == losses(whole[0])


@pytest.mark.parametrize("kept", ["on the devices", "on the host"])
def test_many_devices_give_the_numbers_of_one(kept, whole, tmp_path, monkeypatch):
    if kept == "on the host":
        monkeypatch.setattr(programs, "DEVICE_BYTES", 0)
    mesh = parallel.make_mesh("data=2,tokens=2", 2)
    result = fit(toy(), CONFIG, tmp_path, mesh=mesh)
    # 40 steps; then, at this learning rate, rounding grows tenfold every few
    np.testing.assert_allclose(losses(tmp_path)[:12], losses(whole[0])[:12], rtol=1e-5)
    assert min(result["rel_l2"]["last"]["seeds"]) < 0.6 * result["mean_predictor_rel_l2"]


def test_samples_on_the_host_give_the_numbers_of_those_on_the_device(tmp_path, monkeypatch):
    train = dataclasses.replace(CONFIG.train, epochs=2, eval_every=2, batch_tokens=16)
    config = dataclasses.replace(CONFIG, train=train)  # two small meshes a step, or one large
    results = [fit(toy(), config, tmp_path / "device")]
    monkeypatch.setattr(programs, "DEVICE_BYTES", 0)
    results.append(fit(toy(), config, tmp_path / "host"))
    np.testing.assert_allclose(losses(tmp_path / "host"), losses(tmp_path / "device"), rtol=1e-5)
    errors = [r["rel_l2"]["last"]["seeds"] for r in results]
    np.testing.assert_allclose(*errors, rtol=1e-4)
