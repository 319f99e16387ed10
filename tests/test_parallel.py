"""Training over many devices gives what one device gives, and says what fits."""

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from flare_jax import parallel
from flare_jax.cli import main
from flare_jax.models.flare import FLAREConfig
from flare_jax.predict import load_run
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


def processes(commands, devices=2, timeout=300):
    """Exit codes and output of `flare-jax`, run once for each command line at the same time."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    start = [sys.executable, "-m", "flare_jax.cli"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    running = [subprocess.Popen(start + command, env=env, **pipes) for command in commands]
    out = [process.communicate(timeout=timeout)[0] for process in running]
    return [process.returncode for process in running], out


def test_two_processes_train_what_one_does(tmp_path):
    layers = " ".join(f"--num-layers-{name.replace('_', '-')} 0" for name in LAYERS)
    tiny = f"""train darcy --grid 9 --stride 1 --num-train 8 --num-valid 2 --num-test 4 --epochs 2
        --eval-every 2 --channel-dim 8 --num-blocks 1 --num-heads 1 --num-latents 4 {layers}
        --cache {tmp_path / "cache"} --precision float32""".split()
    together, alone = tmp_path / "together", tmp_path / "alone"
    assert main([*tiny, "--mesh", "data=1", "--out", str(alone)]) == 0
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    join = ["--coordinator", address, "--num-processes", "2", "--process-id"]
    options = [*tiny, "--mesh", "data=2,tokens=2", "--fsdp", "--out", str(together)]
    codes, out = processes([[*options, *join, str(i)] for i in range(2)])
    assert codes == [0, 0], out
    assert "4 x cpu (data=2,tokens=2)" in out[0] and "4 x cpu" not in out[1]
    np.testing.assert_allclose(losses(together), losses(alone), rtol=1e-5)
    results = [json.loads((f / "result.json").read_text()) for f in (together, alone)]
    errors = [result["rel_l2"]["last"]["mean"] for result in results]
    np.testing.assert_allclose(*errors, rtol=1e-5)
    assert (together / "figure.png").exists()
    parts, whole = (load_run(f, "last").params for f in (together, alone))  # on one device again
    for x, y in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5)
