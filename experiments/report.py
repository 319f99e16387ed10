"""Writes experiments/README.md from experiments/results/*.json: no number there is typed.

    python -m experiments.report

The section "How fast" of the project's README.md comes from the same records.

Published values are in published.json, each with its source. A record whose kind is not known here
is listed with its command.
"""

import json
from pathlib import Path

from experiments.markdown import DASH, FOLDER, about, number, table
from experiments.report_sections import ALWAYS, SECTIONS

INTRODUCTION = """\
# Results

Made by `python -m experiments.report` from the records in [results/](results); a test holds the two
together. rel-L2 is the mean over test samples of ‖prediction − truth‖ / ‖truth‖ in physical units.
Settings and checkpoints are chosen on validation samples, never on test samples; ± is the standard
deviation over seeds where nothing else is said. A dash: not published, or not run.
"""
SPEED = "## How fast\n", "\n## Read it\n"  # begin and end of the section of README.md


def main() -> None:
    records, readme = load(FOLDER / "results"), FOLDER.parent / "README.md"
    (FOLDER / "README.md").write_text(report(records, published()))
    readme.write_text(with_speed(readme.read_text(), records))


def with_speed(readme: str, records: dict[str, dict]) -> str:
    """The README with a section of the benchmark's main rows."""
    before, after = readme[: readme.index(SPEED[0])], readme[readme.index(SPEED[1]) :]
    names = "fused", "torch eager", "torch compile"
    found: dict = {}  # of a case, its rows by implementation
    for kind in ("operator", "operator_many", "model"):
        for r in records[f"benchmark_{kind}"]["rows"]:
            if r["dtype"] == "bfloat16" and r["implementation"].startswith(names):
                what = "training step of the model, 8 blocks" if kind == "model" else "operator"
                case = f"{what}, {r['N']:,} points, C={r['C']} M={r['M']}"
                found.setdefault(case, {})[r["implementation"].partition(",")[0]] = r
    rows = [[case, *(speed(row.get(name, {})) for name in names)] for case, row in found.items()]
    record = records["benchmark_model"]
    head = ["bfloat16, forward and backward", "flare_jax", "PyTorch", "PyTorch, compiled"]
    text = f"""{SPEED[0]}
On one {record["device"]}, jax {record["jax"]}, torch {record["torch"]}.
PyTorch is the published formulation, two calls of `scaled_dot_product_attention`; a dash: its
gradients were wrong, so it was not timed. All rows, with commands:
[experiments/README.md](experiments/README.md). How, and what was tried:
[flare_jax/ops/fused/README.md](flare_jax/ops/fused/README.md).

"""
    return before + text + table(head, rows) + after


def speed(row: dict) -> str:
    """Time and memory of a row, if it was timed."""
    return (
        f"{number(row['ms'])} ms, {number(row['peak_bytes'], '.3g', 1e-9)} GB"
        if "ms" in row
        else DASH
    )


def load(folder: Path) -> dict[str, dict]:
    """{name: record} of all result files."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def published() -> dict:
    return json.loads((FOLDER / "published.json").read_text())


def report(records: dict[str, dict], published: dict) -> str:
    """The page: one section for each published table or figure, then our own, then the rest."""
    left, sections = dict(records), [INTRODUCTION]
    for title, belongs, write in SECTIONS:
        mine = {name: record for name, record in records.items() if belongs(name, record)}
        left = {name: record for name, record in left.items() if name not in mine}
        if mine or title in ALWAYS:
            sections.append(f"## {title}\n\n{write(mine, published)}")
    if left:
        lines = [
            f"- [{name}](results/{name}.json): {about(record)}" for name, record in left.items()
        ]
        sections.append("## Further records\n\n" + "\n".join(lines) + "\n")
    return "\n".join(sections)


if __name__ == "__main__":
    main()
