"""The commands, as a user types them."""

import json
import re

import numpy as np
import pytest

from flare_jax.cli import made_if_used, main, new_run, newest_run
from flare_jax.problems import darcy

TINY = """--grid 9 --stride 1 --num-train 8 --num-valid 2 --num-test 4 --epochs 2 --eval-every 1
    --channel-dim 8 --num-blocks 1 --num-heads 1 --num-latents 4 --num-layers-ffn 0
    --num-layers-k-proj 0 --num-layers-v-proj 0 --num-layers-in-out-proj 0 --mesh data=1"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def inside(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setenv("FLARE_JAX_CACHE", str(home / "cache"))


@pytest.fixture(scope="module")
def run(home):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("FLARE_JAX_CACHE", str(home / "cache"))
        assert main(["train", "darcy", *TINY.split()]) == 0
    return home / "runs" / "darcy-small"


def test_train_leaves_a_complete_run(run):
    for name in ("config.json", "metrics.jsonl", "result.json", "figure.png", "checkpoints"):
        assert (run / name).exists(), name
    assert (run / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert 0 < json.loads((run / "result.json").read_text())["test_rel_l2"] < 2


def test_evaluate_prints_the_error_of_the_result(run, capsys):
    assert main(["evaluate", str(run)]) == 0
    error = json.loads((run / "result.json").read_text())["test_rel_l2"]
    found = re.search(r"test rel-L2 \(best\): ([\d.]+)", capsys.readouterr().out)
    assert float(found[1]) == pytest.approx(error, abs=1.1e-5)  # printed to five places


def test_evaluate_takes_the_samples_of_a_named_cache(run, home, capsys):
    before = set((home / "cache").iterdir())
    (home / "cache").rename(home / "elsewhere")
    try:
        assert main(["evaluate", str(run), "--cache", "elsewhere"]) == 0
        assert not (home / "cache").exists()
    finally:
        (home / "elsewhere").rename(home / "cache")
    assert set((home / "cache").iterdir()) == before  # nothing was generated
    assert "of 4 samples" in capsys.readouterr().out


def test_predict_writes_fields_and_a_picture(run, home):
    rng = np.random.default_rng(0)
    np.savez(home / "new.npz", coefficient=rng.choice([3.0, 12.0], (2, 9, 9)))
    assert main(["predict", str(run), "new.npz", "--out", "fields.npz"]) == 0
    u = np.load(home / "fields.npz")["u"]
    assert u.shape == (2, 9, 9) and np.isfinite(u).all()
    assert (home / "fields.png").exists()


def test_spectrum_writes_eigenvalues_and_a_picture(run, capsys):
    assert main(["spectrum", str(run), "--samples", "2"]) == 0
    found = json.loads((run / "spectrum.json").read_text())
    values = np.array(found["eigenvalues [block, sample, head, M]"])
    assert values.shape == (1, 2, 1, 4)
    np.testing.assert_allclose(values[..., 0], 1, atol=1e-12)
    row = found["summary"][0]
    assert row["eigenvalues_above"]["0.01"] == np.median((values > 0.01).sum(-1))
    assert f"{row['effective_rank']:.2f}" in capsys.readouterr().out
    assert (run / "spectrum.png").read_bytes().startswith(b"\x89PNG")


def test_resuming_a_finished_run_reports_it_again(run):
    before = (run / "result.json").read_text()
    assert main(["train", "darcy", "--resume", "--out", str(run), "--mesh", "data=1"]) == 0
    assert (run / "result.json").read_text() == before


def test_a_run_is_resumed_as_what_it_is(run, capsys, monkeypatch):
    monkeypatch.setattr(darcy, "load", None)  # told before there are samples
    assert main(["train", "mesh", "--resume", "--out", str(run)]) == 1
    assert "is a run of darcy, not of mesh" in capsys.readouterr().err
    assert main(["train", "darcy", "--resume", "--out", str(run), "--epochs", "9"]) == 1
    assert "train.epochs: 2 -> 9" in capsys.readouterr().err
    assert main(["train", "darcy", "--out", str(run)]) == 1
    assert "already holds a run" in capsys.readouterr().err


def test_the_newest_run_to_resume_is_one_that_saved_something(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [new_run("darcy", "small") for _ in range(3)]
    assert [f.name for f in folders] == ["darcy-small", "darcy-small-2", "darcy-small-3"]
    with pytest.raises(ValueError, match="no run runs/darcy-small to resume"):
        newest_run("darcy", "small")
    (folders[1] / "checkpoints" / "12").mkdir(parents=True)
    assert newest_run("darcy", "small") == folders[1]
    with pytest.raises(RuntimeError), made_if_used(folders[2]):
        raise RuntimeError
    assert not folders[2].exists()


@pytest.mark.parametrize("command", ["train", "generate"])
def test_help_before_a_problem_lists_them(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0 and "elasticity" in capsys.readouterr().out


def test_a_second_run_gets_a_folder_of_its_own(run, home, capsys):
    assert main(["train", "darcy", *TINY.split(), "--precision", "bfloat16", "--seeds", "2"]) == 0
    result = json.loads((home / "runs" / "darcy-small-2" / "result.json").read_text())
    assert len(result["rel_l2"]["last"]["seeds"]) == 2
    assert main(["evaluate", "runs/darcy-small-2"]) == 0
    found = re.search(r"rel-L2 \(best, seed ([01]) alone of 2\)", capsys.readouterr().out)
    best = int(np.argmin(result["valid_rel_l2"]))
    assert int(found[1]) == best


def test_generate_and_info_run(capsys):
    assert main(["generate", "darcy", *TINY.split()[:10]]) == 0
    assert "8 train, 2 valid, 4 test samples of 81 points" in capsys.readouterr().out
    assert main(["info"]) == 0
    assert "cudnn needs" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    ("command", "status", "message"),
    [
        ("train stokes", 2, "invalid choice: 'stokes'"),
        ("train darcy --preset huge", 2, "invalid choice: 'huge'"),
        ("train darcy --epoch 3", 2, "Unrecognized options: --epoch"),
        ("train darcy --epochs three", 2, "--epochs"),
        ("train darcy --epochs 0", 2, "epochs must be at least 1"),
        ("train darcy --num-heads 5", 2, "num_heads must divide channel_dim"),
        ("train darcy --implementation magic", 2, "implementation must be of"),
        ("train darcy --data nowhere", 1, "data folder nowhere"),
        ("train darcy --mesh data=3", 1, "data=3 must divide the batch of 2: with 8 devices"),
        ("train darcy --mesh points=2", 1, "mesh must look like data=2,tokens=4"),
        ("train darcy --process-id 1 --coordinator host:1", 1, "given together or not at all"),
        ("train darcy --num-processes 2", 1, "given together or not at all"),
        ("train darcy --resume --out nowhere", 1, "nowhere holds no run"),
        ("train", 2, "problem"),
        ("evaluate nowhere", 1, "nowhere holds no run"),
        ("spectrum nowhere", 1, "nowhere holds no run"),
        ("predict nowhere x.npz", 1, "nowhere holds no run"),
        ("fly", 2, "invalid choice: 'fly'"),
    ],
)
def test_bad_commands_fail_at_once_and_say_why(command, status, message, capsys):
    try:
        code = main(command.split())
    except SystemExit as error:
        code = error.code
    assert code == status
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "out, message",
    [
        ("p.txt", "predictions of darcy are written as .npz, got p.txt"),
        ("none/p.npz", "there is no folder none to write p.npz into"),
    ],
)
def test_predict_refuses_what_it_cannot_write(run, out, message, capsys):
    assert main(["predict", str(run), "none.npz", "--out", out]) == 1
    assert message in capsys.readouterr().err


def test_predict_names_a_missing_file(run, capsys):
    assert main(["predict", str(run), "none.npz"]) == 1
    assert "none.npz" in capsys.readouterr().err
