"""Writes experiments/README.md from experiments/results/*.json: no number there is typed.

    python -m experiments.report

The section "How fast" of the project's README.md comes from the same records.

Published values are in published.json, each with its source. A record whose kind is not known here
is listed with its command.
"""

import json
from collections.abc import Callable
from pathlib import Path

from experiments.markdown import DASH, FOLDER, about, number, table
from experiments.report_sections import ALWAYS, SECTIONS

INTRODUCTION = """\
# Results

Made by `python -m experiments.report` from the records in [results/](results); a test holds the two
together. rel-L2 is the mean over test samples of ‖prediction − truth‖ / ‖truth‖ in physical units.
Settings and checkpoints are chosen on validation samples, never on test samples; ± is the standard
deviation over seeds where nothing else is said. A dash: not published, not run, or run and found
wrong or out of memory: of rows that were run the record says which.

Below a table stand, as far as its record says them, the command, hardware, precision, seeds, time
and versions. `--out`, where the record goes, is left out of the commands. `tf32` as the precision
of training is three bfloat16 products for each float32 one (errors of 2⁻¹⁶); TF32 is that of
NVIDIA's tensor cores (2⁻¹¹).
"""
SPEED = "## How fast\n", "\n## Read it\n"  # begin and end of the section of README.md


def main() -> None:
    records, readme = load(FOLDER / "results"), FOLDER.parent / "README.md"
    (FOLDER / "README.md").write_text(report(records, published()))
    readme.write_text(with_speed(readme.read_text(), records))


def with_speed(readme: str, records: dict[str, dict]) -> str:
    """The README with a section of the benchmark's main rows."""
    before, after = readme[: readme.index(SPEED[0])], readme[readme.index(SPEED[1]) :]
    rows = [r for n in ("operator", "operator_many", "model") for r in rows_of(records, n)]
    half = [r for r in rows if r["dtype"] == "bfloat16"]
    passes = compared("bfloat16, forward and backward", pass_of, half)
    steps = compared("training step of the paper's recipe", step_of, rows_of(records, "step"))
    record = records["benchmark_model"]
    text = f"""{SPEED[0]}
On one {record["device"]}, jax {record["jax"]}, torch {record["torch"]}.
PyTorch is the published formulation, two calls of `scaled_dot_product_attention`; a dash: not
timed, because its gradients were wrong or for lack of time; several seeds at once were not tried
in it. float32 is that of the defaults, TF32 in PyTorch. All rows, with commands:
[experiments/README.md](experiments/README.md). How, and what was tried:
[flare_jax/ops/fused/README.md](flare_jax/ops/fused/README.md).

"""
    return before + text + passes + "\n" + steps + after


def rows_of(records: dict[str, dict], kind: str) -> list[dict]:
    return records[f"benchmark_{kind}"]["rows"]


def pass_of(r: dict) -> str:
    what = "training step of the model, 8 blocks" if r["part"] == "model" else r["part"]
    return f"{what}, {r['N']:,} points, C={r['C']} M={r['M']}"


def step_of(r: dict) -> str:
    seeds = f", {r['seeds']} seeds at once" if r["seeds"] > 1 else ""
    return f"{r['problem']}, {r['B']} × {r['N']:,} points, {r['dtype']}{seeds}"


def compared(title: str, case: Callable[[dict], str], rows: list[dict]) -> str:
    """A line for each case: ours, PyTorch, PyTorch compiled."""
    ours, theirs = ("fused", "default"), ("torch eager", "torch compile")
    cases: dict[str, dict] = {}
    for row in rows:
        if row["implementation"].startswith(ours + theirs):
            name = row["implementation"].partition(",")[0]
            cases.setdefault(case(row), {})["ours" if name.startswith(ours) else name] = row
    lines = [[c, *(speed(by.get(n, {})) for n in ("ours", *theirs))] for c, by in cases.items()]
    return table([title, "flare_jax", "PyTorch", "PyTorch, compiled"], lines)


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
