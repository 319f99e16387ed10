"""Training over many devices gives what one device gives, and says what fits."""

import dataclasses
import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from flare_jax import parallel
from flare_jax.cli import main
from flare_jax.data.buckets import calls
from flare_jax.models.flare import FLAREConfig
from flare_jax.models.functional import num_parameters
from flare_jax.predict import load_run
from flare_jax.problems.darcy import DarcyConfig, derivative_loss, grid_inputs
from flare_jax.problems.metrics import rel_l2
from flare_jax.problems.problem import Normalizer, Problem, Split
from flare_jax.train.config import TrainConfig, config_class
from flare_jax.train.loop import build, fit, start
from flare_jax.train.optimizer import OptimizerConfig, make_optimizer
from flare_jax.train.programs import make_program, plan_of
from flare_jax.train.step import surrogate_loss

LAYERS = ("k_proj", "v_proj", "ffn", "in_out_proj")
SHALLOW = {f"num_layers_{name}": 0 for name in LAYERS}
MODEL = FLAREConfig(channel_dim=16, num_blocks=1, num_heads=2, num_latents=8, **SHALLOW)
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


def test_parameters_in_parts_stay_in_parts():
    mesh, problem, config = parallel.make_mesh("data=4", 4, jax.devices()[:4]), toy(), CONFIG
    plan = plan_of(problem, config, 4)
    tx = make_optimizer(config.optimizer, 50, parts=True)
    apply, run = start(problem, config, tx)
    run = parallel.place(run, mesh, parallel.parameter_specs(run, mesh, True))
    make = functools.partial(make_program, problem, config, tx, apply, run, mesh, True)
    program = make((problem.train,), plan.batches)
    samples = (parallel.place_samples(problem.train, mesh),)
    which, rows = next(calls(plan, np.asarray(run.keys), 0))
    text = program.lower(run.state, samples, which, rows).compile().as_text()
    parameters = num_parameters(run.state.params)
    assert "all-gather" in text and f"f32[{parameters}]" not in text


def test_a_run_of_one_device_goes_on_on_eight(single, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(single[0], folder)
    shutil.rmtree(folder / "checkpoints" / "50")  # as if stopped after step 25
    fit(
        toy(), CONFIG, folder, resume=True, mesh=parallel.make_mesh("data=4,tokens=2", 4), fsdp=True
    )
    np.testing.assert_allclose(losses(folder), losses(single[0]), rtol=1e-5)


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


@pytest.mark.parametrize("loss", ["rel_l2", "grid"])
def test_loss_and_gradients_with_fields_summed_or_gathered(loss):
    problem, mesh = toy(loss, masked=loss == "rel_l2"), parallel.make_mesh("data=2,tokens=4", 4)
    apply, params = build(CONFIG, 3, 1)
    batch = Split(*(None if a is None else a[:4] for a in problem.train))

    def run(mesh, fsdp, batch):
        f = surrogate_loss(
            parallel.model_over(apply, mesh),
            parallel.loss_over(problem.loss, mesh, 25),
            problem.y_normalizer,
        )
        return jax.jit(parallel.value_and_grad(mesh, fsdp)(f))(params, batch)

    one = run(None, False, batch)
    for fsdp in (False, True) if loss == "grid" else (False,):
        many = run(mesh, fsdp, parallel.place_samples(batch, mesh))
        for x, y in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-6)
    if loss == "grid":  # the parts are parts
        kernel = many[1]["blocks"]["0"]["att"]["out_proj"]["kernel"]
        assert kernel.sharding.spec == P(None, "data")


@pytest.mark.parametrize("remat", [False, True])
def test_the_step_moves_no_points_but_predictions(remat):
    model = dataclasses.replace(MODEL, remat=remat)  # z is kept, not gathered again
    apply, params = build(dataclasses.replace(CONFIG, model=model), 3, 1)
    mesh, points = parallel.make_mesh("data=1,tokens=8", 1), 8 * 1024
    x = jax.ShapeDtypeStruct((1, points, 3), np.float32)
    y = jax.ShapeDtypeStruct((1, points, 1), np.float32)
    normalizer = Normalizer(np.zeros(1, np.float32), np.ones(1, np.float32))

    def moved(loss):
        over = parallel.loss_over(loss, mesh, points)
        f = surrogate_loss(parallel.model_over(apply, mesh), over, normalizer)
        step = jax.jit(parallel.value_and_grad(mesh)(f))
        text = step.lower(params, Split(x, y)).compile().as_text()
        found = re.findall(r"= \w+\[([\d,]*)\]\S* all-(?:gather|to-all)(?:-start)?\(", text)
        return [np.prod([int(size) for size in shape.split(",") if size]) for shape in found]

    blocks, partial_sums = MODEL.num_blocks, 8 * MODEL.num_latents * (MODEL.channel_dim + 2)
    assert moved(rel_l2) == [partial_sums] * blocks
    if remat:
        return
    grid = functools.partial(derivative_loss, shape=(64, 128))
    assert sorted(moved(grid)) == [partial_sums] * blocks + [points] * 2


def test_xla_knows_the_options_of_steps_on_gpus():
    gpu = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100")
    mesh = lambda n: types.SimpleNamespace(devices=np.array([gpu] * n, dtype=object), size=n)
    few, many = 1000, 10**6
    assert parallel.compiler_options(many, mesh(1)) == {}
    for points, count, options in (
        (few, 1, parallel.FEW_POINTS),
        (few, 2, parallel.MANY_GPUS),
        (many, 2, parallel.MANY_GPUS),
    ):
        assert parallel.compiler_options(points, mesh(count)) == options
        assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2
    for mesh in (None, parallel.make_mesh("tokens=8", 1)):  # other compilers need not
        assert parallel.compiler_options(few, mesh) == {}


def test_default_meshes_use_every_device():
    found = {batch: parallel.make_mesh(None, batch) for batch in (1, 2, 6, 8, 16)}
    sizes = {batch: tuple(mesh.shape.values()) for batch, mesh in found.items()}
    assert sizes == {1: (1, 8), 2: (2, 4), 6: (2, 4), 8: (8, 1), 16: (8, 1)}
    assert parallel.make_mesh(None, 4, jax.devices()[:1]) is None
    assert parallel.make_mesh("data=1", 4) is None
    assert parallel.parse_mesh("tokens=4, data=2") == (2, 4)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ("data=3", "data=3 must divide the batch of 4: with 8 devices data=1,tokens=8 or data=2"),
        ("data=4,tokens=4", "needs 16 devices, there are 8: .* or data=4,tokens=2 would fit"),
        ("data=2,data=2", "mesh must look like data=2,tokens=4, got 'data=2,data=2'"),
        ("data=0", "mesh must look like"),
        ("points=3", "mesh must look like"),
    ],
)
def test_meshes_that_do_not_fit_say_what_would(sizes, message):
    with pytest.raises(ValueError, match=message):
        parallel.make_mesh(sizes, 4)


def test_a_mesh_must_divide_the_batch_of_a_run(tmp_path):
    with pytest.raises(ValueError, match="data=8 of the mesh must divide the batch of 4"):
        fit(toy(), CONFIG, tmp_path, mesh=parallel.make_mesh("data=8", 8))


def test_parts_follow_parameter_paths():
    _, params = build(CONFIG, 3, 1)
    mesh = parallel.make_mesh("data=4,tokens=2", 4)
    specs = parallel.parameter_specs({"state": {"mu": params}}, mesh, True)["state"]["mu"]
    att = specs["blocks"]["0"]["att"]
    assert att["latent_q"] == P("data") and att["k_proj"]["fc1"]["kernel"] == P(None, "data")
    assert att["out_proj"]["bias"] == P()
    assert specs["out_proj"]["mlp"]["fc2"]["kernel"] == P()  # one output field
    whole = parallel.parameter_specs(params, mesh, False)
    assert set(jax.tree.leaves(whole, is_leaf=lambda x: isinstance(x, P))) == {P()}


def test_processes_are_named_together_or_not_at_all():
    with pytest.raises(ValueError, match="given together or not at all, got host:1, None, 0"):
        parallel.connect("host:1", process_id=0)
    with pytest.raises(ConnectionError, match="outside SLURM, .* give --coordinator HOST:PORT"):
        parallel.connect()  # nothing here says where the others are
