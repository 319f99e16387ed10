import dataclasses
import json

import numpy as np
import pytest

from experiments import elasticity, elasticity_ablations

LINES = [
    {"step": 2, "epoch": 1.0, "seconds": 3.0, "loss": 0.5},
    {"step": 2, "valid": [0.02, 0.03], "valid_ema": [0.9, 0.8]},
    {"step": 4, "epoch": 2.0, "seconds": 1.0, "loss": 0.2},
    {"step": 6, "epoch": 3.0, "seconds": 1.0, "loss": 0.1},
    {"step": 6, "valid": [0.004, 0.005], "valid_ema": [0.011, 0.008]},
]


@pytest.fixture
def curves(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in LINES))
    return elasticity.history(tmp_path)


def test_history_has_the_training_time_of_every_validation(curves):
    assert curves["epoch"].tolist() == [1, 3] and curves["seconds"].tolist() == [3, 5]
    assert curves["valid"].shape == (2, 2) and curves["loss"].tolist() == [0.5, 0.1]


def test_an_error_is_reached_when_the_mean_over_seeds_is(curves):
    times = elasticity.reached(curves)
    assert times["valid"] == {"0.01": 5.0, "0.005": 5.0, "0.0034": None}
    assert times["valid_ema"] == {"0.01": 5.0, "0.005": None, "0.0034": None}


def test_every_ablation_is_a_model_of_its_own(tmp_path):
    options = elasticity.Options(tmp_path)
    cases = elasticity_ablations.cases(("blocks", "heads", "depth"))
    folders = [
        elasticity_ablations.folder(elasticity.configuration(options, **c.changes)) for c in cases
    ]
    assert len(cases) == 24 and len(set(folders)) == 22  # the paper's own model is in all three
    shares = [elasticity.shared_out(folders, (k, 6)) for k in range(6)]
    assert sorted(sum(shares, [])) == sorted(set(folders))  # no model trained twice
    paper = elasticity_ablations.folder(elasticity.configuration(options))
    assert folders.count(paper) == 3


def test_the_record_names_the_command(tmp_path):
    options = elasticity.Options(tmp_path, seeds=4, precision="float32", smoke=True)
    config = elasticity.configuration(options)
    command = elasticity.about(options, config)["command"]
    assert command.endswith("--out FOLDER --precision float32 --seeds 4 --smoke")
    assert np.isclose(config.optimizer.learning_rate, 1e-3)
    assert dataclasses.asdict(config.problem)["num_train"] == 16
