"""The results page is what the script makes of the records."""

import copy
import re

from experiments import report


def test_the_committed_page_is_the_generated_one():
    page = report.report(report.load(report.FOLDER / "results"), report.published())
    assert (report.FOLDER / "README.md").read_text() == page, "run python -m experiments.report"


def test_the_readme_says_what_the_benchmark_measured():
    readme = (report.FOLDER.parent / "README.md").read_text()
    made = report.with_speed(readme, report.load(report.FOLDER / "results"))
    assert readme == made, "run python -m experiments.report"


def test_links_and_pictures_exist():
    page = (report.FOLDER / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)", page):
        assert target.startswith("http") or (report.FOLDER / target).exists(), target


def test_a_changed_number_changes_the_page():
    records = report.load(report.FOLDER / "results")
    changed = copy.deepcopy(records)
    changed["darcy_16"]["FLARE"]["test_rel_l2"]["mean"] = 0.123
    pages = [report.report(r, report.published()) for r in (records, changed)]
    assert "123 ±" in pages[1] and "123 ±" not in pages[0]


def test_a_training_run_stands_beside_the_published_value():
    run = {
        "problem": "elasticity",
        "rel_l2": {"last": {"mean": 4.1e-3, "std": 2e-4, "seeds": [4.1e-3] * 3}},
        "mean_predictor_rel_l2": 0.3,
        "parameters": 592_641,
        "seconds": 12.0,
        "config": {"model": dict(channel_dim=64, num_blocks=8, num_latents=64, num_heads=None)},
    }
    for record in (run, {"command": "train", "seeds": [0], "result": run}):
        page = report.report({"mine": record}, report.published())
        (line,) = (line for line in page.splitlines() if line.startswith("| elasticity"))
        assert "| 3.38 | 4.1 ± 0.2 | – | 300 | 592,641 | 64, 8, 64, 8 | mine |" in line


def test_an_unknown_record_is_listed():
    page = report.report({"new": {"command": "python -m new"}}, report.published())
    assert "[new](results/new.json): `python -m new`" in page
