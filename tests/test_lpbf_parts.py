import dataclasses
import json

import numpy as np
import pytest

from experiments import lpbf_parts
from flare_jax.solvers import lpbf
from flare_jax.solvers.parts import SIZES

CUBE = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]])
PLACES = np.concatenate([CUBE, CUBE + [[0, 0, 1]], CUBE + [[0, 0, 2]]]).astype(float)
ELEMS = np.array([np.arange(8), np.arange(4, 12)])  # one cube on another


def test_the_surface_encloses_the_volume():
    quads = lpbf_parts.surface(ELEMS)
    assert len(quads) == 10
    a, b, c, d = np.moveaxis(PLACES[quads], 1, 0)
    outwards = np.cross(c - a, d - b) / 2
    volume = np.sum(outwards * (a + b + c + d) / 4) / 3
    np.testing.assert_allclose(volume, 2.0)


def test_statistics_are_beside_the_published_ones():
    rows = lpbf_parts.statistics([[10, 50, 0.1, 700.0], [30, 170, 0.3, 900.0]])
    assert [row["quantity"] for row in rows] == list(lpbf_parts.PUBLISHED)
    assert rows[0]["ours"] == {"mean": 20, "std": 10, "min": 10, "median": 20, "max": 30}
    assert rows[2]["published"]["median"] == 0.271 and np.isclose(rows[2]["ours"]["mean"], 0.2)


def test_the_pace_of_the_last_half_leaves_out_the_first():
    pace = lpbf_parts.pace([10.0, 20.0, 21.0, 22.0])
    assert pace == {"parts_per_second": 4 / 22, "parts_per_second_last_half": 1.0}
    assert lpbf_parts.pace([4.0])["parts_per_second_last_half"] == 0.25
    assert lpbf_parts.pace([]) == {}


def test_a_record_and_a_picture_are_written(tmp_path, monkeypatch, capsys):
    """A command that its limit cut off goes on with what is missing; then all is read."""
    monkeypatch.setitem(SIZES, "small", SIZES["small"]._replace(widths=(3.0, 3.0)))
    options = lpbf_parts.Options(tmp_path, train=2, test=1, size="small", cache=tmp_path / "cache")
    lpbf_parts.seen(dataclasses.replace(options, limit_seconds=0.0))
    lpbf_parts.main(options, ["--out", str(tmp_path), "--train", "2", "--test", "1"])
    record = json.loads((tmp_path / "lpbf_parts_small.json").read_text())
    assert record["command"] == "python -m experiments.lpbf_parts --train 2 --test 1"
    assert (record["parts"], record["asked"], record["made"]) == (3, 3, 2)
    assert record["solver_version"] == lpbf.VERSION["small"]
    assert record["rows"][0]["ours"]["min"] >= 8
    assert (tmp_path / "lpbf_parts_small.png").stat().st_size > 10_000
    assert "3 of 3 parts, 2 of them made now, in" in capsys.readouterr().out
    whole, half = (
        lpbf_parts.seen(dataclasses.replace(options, share=share)) for share in ((0, 1), (1, 2))
    )
    assert lpbf_parts.statistics(whole.rows) == record["rows"] and whole.seconds == []
    assert dict(whole.rejected) == record["rejected"]
    assert half.rows == whole.rows[1:2]


def test_a_share_without_parts_is_refused(tmp_path):
    options = lpbf_parts.Options(tmp_path, train=1, test=1, share=(2, 3), cache=tmp_path)
    with pytest.raises(ValueError, match=r"share \(2, 3\) of 1 and 1 parts is empty"):
        lpbf_parts.main(options)
