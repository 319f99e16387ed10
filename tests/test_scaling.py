"""What the measurements on many devices make of their rows."""

import pytest

from experiments import project_devices, scaling_devices

ROW = {"part": "devices", "C": 64, "M": 128}
TIMES = {(1, 1): 10.0, (2, 1): 20.0, (4, 1): 40.0, (1, 2): 6.0, (2, 2): 10.5, (4, 2): 20.0}
ROWS = [
    ROW | {"N": n, "devices": d, "ms": ms, "bytes": 100 * n / d} for (n, d), ms in TIMES.items()
]


def test_efficiencies_compare_one_device_with_all():
    found = {(e["kind"], e["N on one"]): e for e in scaling_devices.efficiencies(ROWS)}
    assert found["strong", 1]["time"] == pytest.approx(10 / (2 * 6))
    assert found["strong", 4]["time"] == found["strong", 4]["memory"] == 1.0
    assert found["weak", 1]["time"] == pytest.approx(10 / 10.5)
    assert found["weak", 2]["time"] == pytest.approx(1.0) and len(found) == 5
    assert "weak" in scaling_devices.table(
        [r | {"remat": True, "scan": True, "bytes_per_point": 100} for r in ROWS], [*found.values()]
    )


def test_projections_are_lines_through_the_rows_of_one_device():
    found = project_devices.lines({"rows": ROWS})
    assert len(found) == len(project_devices.CASES)
    for r in found:
        share = r["N"] / r["devices"]
        assert r["ms"] - r["ms_messages"] == pytest.approx(10 * share, rel=1e-6)
        assert r["GB"] == pytest.approx(100 * share / 1e9, rel=1e-6)


def test_one_two_and_four_million_points_on_one_and_two_devices():
    rows = scaling_devices.rows(2, smoke=False)
    sizes = {(r.model.channel_dim, r.points, r.devices) for r in rows if r.part == "devices"}
    million = 1_000_000
    assert {(c, n * million, d) for c in (64, 128) for n in (1, 2, 4) for d in (1, 2)} <= sizes
    assert (64, 8 * million, 2) in sizes
    assert (64, million // 2, 1) in sizes and (64, million // 2, 2) not in sizes
