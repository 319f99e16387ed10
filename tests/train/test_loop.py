"""The loop: resuming, seeds side by side, faults, and what a run leaves behind."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from flare_jax import predict
from flare_jax.models.flare import FLAREConfig
from flare_jax.problems.darcy import DarcyConfig, grid_inputs
from flare_jax.problems.metrics import rel_l2
from flare_jax.problems.problem import Normalizer, Problem, Split
from flare_jax.train.checkpoint import CheckpointError
from flare_jax.train.config import TrainConfig, config_class, preset, to_dict
from flare_jax.train.log import MetricsFile
from flare_jax.train.loop import Interrupted, NonFiniteError, fit
from flare_jax.train.optimizer import OptimizerConfig

MODEL = FLAREConfig(channel_dim=8, num_blocks=1, num_heads=1, num_latents=4, num_layers_ffn=0)
CONFIG = config_class("darcy")(
    DarcyConfig(),
    MODEL,
    OptimizerConfig(learning_rate=3e-2),
    TrainConfig(epochs=12, batch_size=4, eval_every=3, chunk_steps=2),
)


def toy(nan_sample=None):
    """16 training samples of u = 1 + a x on a 5 x 5 grid."""
    rng = np.random.default_rng(0)
    x = grid_inputs(rng.uniform(1, 2, (28, 5, 5)))
    y = 1 + x[..., 2:] * x[..., :1]
    splits = [Split(x[s], y[s]) for s in (slice(16), slice(16, 22), slice(22, 28))]
    problem = Problem(
        "darcy",
        *splits,
        Normalizer.fit(x, raw=(0, 1)),
        Normalizer.fit(y),
        rel_l2,
        ("x", "y", "a"),
        ("u",),
        (5, 5),
    )
    if nan_sample is not None:
        problem.train.y[nan_sample] = np.nan
    return problem


def change(config, **values):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **values))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, fit(toy(), CONFIG, folder)


def last_state(folder):
    return predict.load_run(folder, "last").params


def test_a_run_learns_and_leaves_its_record(whole):
    folder, result = whole
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    assert [line["step"] for line in lines if "loss" in line] == list(range(2, 49, 2))
    assert sum("valid" in line for line in lines) == 4
    assert result == json.loads((folder / "result.json").read_text())
    assert result["steps"] == 48 and result["chosen"] == "best"


def test_the_reported_error_is_that_of_the_saved_parameters(whole):
    folder, result = whole
    test = toy().test
    for which in ("best", "last", "ema"):
        surrogate = predict.load_run(folder, which)
        prediction = surrogate(surrogate.x_normalizer.decode(test.x))
        error = float(np.mean(rel_l2(prediction, test.y)))
        np.testing.assert_allclose(error, result["rel_l2"][which]["mean"], rtol=1e-5)


def test_a_resumed_run_gives_the_numbers_of_one_that_never_stopped(whole, tmp_path, monkeypatch):
    folder, result = whole
    write = MetricsFile.write

    def stop_after(self, **values):
        write(self, **values)
        if values["step"] == 20:  # between two validations
            os.kill(os.getpid(), signal.SIGTERM)  # as a scheduler does before it takes a node

    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "write", stop_after)
        with pytest.raises(Interrupted, match="step 20"):
            fit(toy(), CONFIG, tmp_path)
    again = fit(toy(), CONFIG, tmp_path, resume=True)
    assert again["rel_l2"] == result["rel_l2"]
    chex.assert_trees_all_equal(last_state(tmp_path), last_state(folder))
    values = lambda f: [
        (m["step"], m.get("loss"), m.get("valid"))
        for m in map(json.loads, (f / "metrics.jsonl").read_text().splitlines())
    ]
    assert values(tmp_path) == values(folder)
    record = (tmp_path / "result.json").read_text()
    assert fit(toy(), CONFIG, tmp_path, resume=True) == json.loads(record)  # there is nothing to do
    assert (tmp_path / "result.json").read_text() == record


KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
import test_loop
rename, count = os.rename, 0
def die(*args, **kwargs):  # in the middle of the second save: written, not yet renamed
    global count
    count += ".orbax-checkpoint-tmp" in str(args[0]) and "24" in str(args[1])
    if count:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(*args, **kwargs)
os.rename = die
test_loop.fit(test_loop.toy(), test_loop.CONFIG, {folder!r})
"""


def test_a_run_killed_in_the_middle_of_a_save_resumes(whole, tmp_path):
    root = Path(__file__).parents[2]
    path = [str(root), str(root / "tests"), str(Path(__file__).parent)]
    code = KILLED.format(path=path, folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    left = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert left[0] == "12" and any("tmp" in name for name in left), left
    result = fit(toy(), CONFIG, tmp_path, resume=True)
    assert result["rel_l2"] == whole[1]["rel_l2"]


def test_seeds_trained_together_equal_seeds_trained_apart(whole, tmp_path):
    result = fit(toy(), change(CONFIG, seeds=2), tmp_path / "both")
    second = fit(toy(), change(CONFIG, seed=1), tmp_path / "second")
    apart = [whole[1]["rel_l2"]["last"]["mean"], second["rel_l2"]["last"]["mean"]]
    np.testing.assert_allclose(result["rel_l2"]["last"]["seeds"], apart, rtol=1e-3)
    np.testing.assert_allclose(result["rel_l2"]["last"]["mean"], np.mean(apart), rtol=1e-3)
    assert apart[0] != apart[1]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(NonFiniteError, match=r"step \d+, seed 0: loss nan.*learning rate") as error:
        fit(toy(nan_sample=3), CONFIG, tmp_path)
    assert "last good checkpoint: " in str(error.value)


def test_a_checkpoint_of_another_configuration_is_refused(whole):
    other = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, num_latents=5))
    with pytest.raises(CheckpointError, match=r"model.num_latents: 4 -> 5"):
        fit(toy(), other, whole[0], resume=True)


def test_a_full_disk_names_the_last_good_checkpoint(tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    save = ocp.CheckpointManager.save

    def full(self, step, *args, **kwargs):
        if step > 12:
            raise OSError(28, "No space left on device")
        return save(self, step, *args, **kwargs)

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    with pytest.raises(CheckpointError, match=r"step 24 .*No space left.*step 12 is intact"):
        fit(toy(), CONFIG, tmp_path)
    monkeypatch.setattr(ocp.CheckpointManager, "save", save)
    assert predict.load_run(tmp_path).params  # still usable


def test_bad_requests_fail_before_any_work(whole, tmp_path):
    with pytest.raises(ValueError, match="batch_size must be at most the 16 samples"):
        fit(toy(), change(CONFIG, batch_size=17), tmp_path)
    with pytest.raises(ValueError, match="already holds a run"):
        fit(toy(), CONFIG, whole[0])
    with pytest.raises(CheckpointError, match="no checkpoint to resume"):
        fit(toy(), CONFIG, tmp_path / "new", resume=True)
    with pytest.raises(FileNotFoundError, match="holds no run"):
        predict.load_run(tmp_path / "nothing")
    with pytest.raises(ValueError, match="epochs must be at least 1"):
        TrainConfig(epochs=0)


def test_without_validation_the_last_parameters_are_reported(tmp_path):
    result = fit(dataclasses.replace(toy(), valid=None), CONFIG, tmp_path)
    assert result["chosen"] == "last" and "best" not in result["rel_l2"]
    surrogate = predict.load_run(tmp_path)
    assert surrogate.params and predict.parameters_of(surrogate) == "last"


def test_predictions_check_their_input(whole):
    surrogate = predict.load_run(whole[0])
    assert all(isinstance(p, jax.Array) for p in jax.tree.leaves(surrogate.params))
    with pytest.raises(ValueError, match=r"x must be \[n, N, 3\]"):
        surrogate(np.zeros((1, 5, 2)))
    with pytest.raises(ValueError, match="not finite"):
        surrogate(np.full((1, 5, 3), np.nan))


@pytest.mark.parametrize("name", ["small", "paper"])
def test_presets_survive_json(name):
    from flare_jax.train.config import from_dict

    config = preset("darcy", name)
    assert from_dict(type(config), to_dict(config)) == config
