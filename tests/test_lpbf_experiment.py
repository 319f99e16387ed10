import json

import numpy as np
import pytest

from experiments import lpbf, lpbf_sizes, records
from flare_jax.data.buckets import bucketed
from flare_jax.problems.metrics import rel_l2
from flare_jax.problems.problem import Normalizer, Problem


def problem():
    rng = np.random.default_rng(0)
    meshes = [(rng.normal(size=(n, 3)), rng.normal(size=(n, 1))) for n in (300, 700, 600, 900)]
    split = bucketed(meshes, (512, 1024))
    one, three = (Normalizer(np.zeros(n, np.float32), np.ones(n, np.float32)) for n in (1, 3))
    names = ("x", "y", "z"), ("disp_z",)
    return Problem("lpbf", split, None, split, three, one, rel_l2, *names)


def test_samples_of_one_size_are_real_points_of_the_mean_size():
    real = problem()
    (split,) = lpbf_sizes.of_one_size(real).train
    assert split.x.shape == (4, 512, 3) and split.mask.all()  # 625 points, in whole tiles
    points = np.concatenate([s.x[s.mask] for s in real.train])
    np.testing.assert_array_equal(split.x.reshape(-1, 3), points[: 4 * 512])
    config = lpbf.configuration(lpbf.parse(["--out", "x.json"]))
    assert lpbf.points_of(real, config) == len(points)


def test_sizes_are_drawn_by_their_statistics():
    nodes = {"mean": 50, "std": 20, "min": 10, "max": 90}
    sizes = lpbf_sizes.sizes_like(nodes, 2000, np.random.default_rng(0))
    assert (len(sizes), min(sizes), max(sizes)) == (2000, 10, 90)
    assert abs(np.mean(sizes) - 50) < 1 and 16 < np.std(sizes) < 20
    drawn = lpbf_sizes.problem_of(sizes[:9], 4, np.random.default_rng(0))
    assert sum(int(s.mask.sum()) for s in drawn.train) == sum(sizes[:9])


def test_the_mean_predictor_looks_good_in_the_published_metric():
    assert lpbf.legacy_of_the_mean(problem()) < problem().mean_error


def test_the_record_names_no_folder_of_this_machine(tmp_path):
    folders = ["--data", str(tmp_path), "--cache", str(tmp_path)]
    command = lpbf.told(["--out", "x.json", *folders, "--epochs", "5"])
    assert command == "python -m experiments.lpbf --data FOLDER --cache FOLDER --epochs 5"
    config = lpbf.configuration(lpbf.parse(["--out", "x.json", "--epochs", "5"]))
    assert (config.train.epochs, config.train.seeds, config.train.batch_size) == (5, 2, 1)
    one = lpbf.configuration(lpbf.parse(["--out", "x.json", "--seed", "1", "--seeds", "1"])).train
    assert (one.seed, one.seeds) == (1, 1)
    assert (config.model.num_latents, config.optimizer.weight_decay) == (128, 1e-4)


def record_of(seed, error):
    spread = {"last": {"mean": error, "std": 0.0, "seeds": [error]}}
    same = dict.fromkeys(lpbf.SAME, 1)
    times = {"seconds": 5 + seed, "seconds_per_epoch": 1.0 + seed, "training_seconds": 4.0}
    times |= {"cost_of_sizes": {"points_per_second": 6 / times["seconds_per_epoch"]}}
    row = {"epoch": 1.0, "seconds": 4.0, "loss": error, "valid": [error], "valid_ema": [error]}
    result = {"rel_l2": spread, "legacy": spread, "valid_rel_l2": [error], "chosen": "last"}
    made = {"command": f"lpbf --seed {seed}", "seeds": [seed]}
    return same | times | made | {"rows": [row], "result": result}


def test_records_of_other_seeds_make_one():
    record = lpbf.joined([record_of(0, 0.1), record_of(1, 0.3)])
    assert record["seeds"] == [0, 1] and record["seconds"] == 6
    assert record["rows"][0]["valid"] == [0.1, 0.3] and record["rows"][0]["loss"] == 0.2
    assert (record["command"], "`lpbf --seed 1`" in record["note"]) == ("lpbf --seed 0", True)
    assert record["cost_of_sizes"] == {"points_per_second": 3}  # of the slowest
    last = record["result"]["legacy"]["last"]
    np.testing.assert_allclose((last["mean"], last["std"]), (0.2, 0.1))
    assert record["result"]["test_rel_l2"] == last["mean"]
    with pytest.raises(ValueError, match="share a seed"):
        lpbf.joined([record_of(0, 0.1), record_of(0, 0.3)])
    with pytest.raises(ValueError, match="differ in epochs"):
        lpbf.joined([record_of(0, 0.1), record_of(1, 0.3) | {"epochs": 2}])


def test_seconds_of_whole_epochs(tmp_path):
    steps = [(0.5, 1.0), (1.0, 2.0), (1.5, 4.0), (2.0, 8.0), (2.5, 16.0)]
    lines = [{"step": 0, "epoch": epoch, "seconds": s, "loss": 1.0} for epoch, s in steps]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert records.epoch_seconds(tmp_path) == [3.0, 12.0]
