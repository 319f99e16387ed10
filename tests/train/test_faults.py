"""Whatever stops a run, the last good checkpoint is there and the run ends as if undisturbed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_loop import CONFIG, last_state, toy, whole  # noqa: F401  (whole is a fixture)

from flare_jax import predict
from flare_jax.train.checkpoint import CheckpointError, Checkpoints
from flare_jax.train.loop import Interrupted, fit

TESTS = Path(__file__).parents[1]

# One process imports everything and forks a run for each kill, before it touches a device.
KILLER = """
import os, pathlib, random, signal, sys, time, warnings
warnings.simplefilter("ignore")  # jax warns of any fork
folder, kills = pathlib.Path(sys.argv[1]), int(sys.argv[2])
import test_loop
from flare_jax.train.checkpoint import steps_in
moment = random.Random(kills)

def lines():
    file = folder / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0

killed = 0
while killed < kills:
    before, pid = lines(), os.fork()
    if not pid:
        resume = bool(steps_in(folder / "checkpoints"))
        test_loop.fit(test_loop.toy(), test_loop.CONFIG, folder, resume=resume)
        os._exit(0)
    limit = time.time() + 60
    while lines() in (0, before) and time.time() < limit:  # until it has taken steps
        time.sleep(0.002)
    time.sleep(moment.uniform(0, 0.4))
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    killed += 1
    print(killed, steps_in(folder / "checkpoints"), lines(), flush=True)
"""

FULL = """
import pathlib, resource, sys
import jax, test_loop
jax.config.update("jax_enable_compilation_cache", False)  # it would keep what was cut off
from flare_jax.train.checkpoint import CheckpointError
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))  # no file grows beyond 8 kB
try:
    test_loop.fit(test_loop.toy(), test_loop.CONFIG, pathlib.Path(sys.argv[1]), resume=True)
except CheckpointError as error:
    print(error)
"""


def python(code, *arguments):
    """Runs code in a process of its own, which finds the tests and shares compiled programs."""
    paths = [TESTS.parent, TESTS, TESTS / "train"]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, env=env, timeout=600, text=True)


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_like_one_undisturbed(whole, tmp_path, kills):  # noqa: F811
    done = python(KILLER, tmp_path, kills)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == kills, done.stderr[-2000:]
    saved = any(p.name.isdecimal() for p in (tmp_path / "checkpoints").iterdir())
    result = fit(toy(), CONFIG, tmp_path, resume=saved)
    assert result["rel_l2"] == whole[1]["rel_l2"]
    chex.assert_trees_all_equal(last_state(tmp_path), last_state(whole[0]))


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A run that a signal stopped after its second checkpoint, of step 24."""
    save = Checkpoints.save

    def stop_after(self, step, *args):
        save(self, step, *args)
        if step == 24:
            os.kill(os.getpid(), 15)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", stop_after)
        with pytest.raises(Interrupted, match="step 24"):
            fit(toy(), CONFIG, tmp_path)
    return tmp_path


@pytest.mark.parametrize("damage", ["cut", "missing", "overwritten"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(stopped, whole, damage):  # noqa: F811
    checkpoints = stopped / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["12", "24"]
    for file in (checkpoints / "24" / "state").rglob("*"):
        if file.is_file():
            data = file.read_bytes()
            if damage == "missing":
                file.unlink()
            elif damage == "cut":
                file.write_bytes(data[: len(data) // 2])
            else:
                file.write_bytes(bytes(len(data)))
    message = r"checkpoints/24 is damaged: .*; move it away to go on from step 12"
    for read in (
        lambda: fit(toy(), CONFIG, stopped, resume=True),
        lambda: predict.load_run(stopped),
    ):
        with pytest.raises(CheckpointError, match=rf"(?s){message}"):
            read()
    shutil.move(checkpoints / "24", stopped / "damaged")
    assert predict.load_run(stopped).params
    if damage == "cut":
        assert fit(toy(), CONFIG, stopped, resume=True)["rel_l2"] == whole[1]["rel_l2"]


def test_a_disk_that_is_full_leaves_the_last_checkpoint(stopped, whole):  # noqa: F811
    done = python(FULL, stopped)
    assert re.fullmatch(r"(?s)could not .* step 36 into .*; step 24 is intact\n", done.stdout), (
        done.stdout + done.stderr
    )
    assert predict.load_run(stopped).params
    assert fit(toy(), CONFIG, stopped, resume=True)["rel_l2"] == whole[1]["rel_l2"]


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write into .*file/run: Not a directory"):
        fit(toy(), CONFIG, tmp_path / "file" / "run")


def test_a_checkpoint_holds_what_was_handed_over(tmp_path):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    start = {str(i): np.full(1000, i, np.float32) for i in range(100)}
    state = jax.tree.map(jnp.asarray, start)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        for _ in range(100):  # in the same buffers, while it is written
            state = step(state)
        assert checkpoints.begun == 1
        checkpoints.wait()
        assert checkpoints.latest == 1
        chex.assert_trees_all_equal(checkpoints.restore(state, {}), start)
