"""Tables, numbers and sources as the results page writes them."""

import re
from pathlib import Path

FOLDER = Path(__file__).parent  # of the page, and of results/
DASH = "–"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are aligned right."""
    line = lambda cells: "| " + " | ".join(cells) + " |"
    rule = "|---|" + "---:|" * (len(head) - 1)
    return "\n".join([line(head), rule, *map(line, rows)]) + "\n"


def number(x, form: str = ".3g", factor: float = 1.0) -> str:
    if x is None:
        return DASH
    return f"{factor * x:,.0f}" if abs(factor * x) >= 1000 else format(factor * x, form)


def error(mean: float | None, spread: float | None = None) -> str:
    """rel-L2 in thousandths."""
    text = number(mean, ".3g", 1e3)
    return text if not spread else f"{text} ± {number(spread, '.2g', 1e3)}"


def about(record: dict) -> str:
    """Command, hardware, precision, seeds, time and versions, as far as the record says them."""
    trained = record.get("epochs") != 0  # else neither precision nor seeds were used
    command = re.sub(r" --out \S+", "", record.get("command", ""))  # it differs from run to run
    parts = [f"`{command.strip()}`"] if command else []
    parts += [f"data {record['data']}"] if "data" in record else []
    parts += [f"{record['epochs']} epochs"] if record.get("epochs") else []
    parts += [record["device"]] if "device" in record else []
    precision = record.get("precision") or record.get("dtype")
    parts += [precision] if precision and trained else []
    seeds = record.get("seeds") or ([record["seed"]] if "seed" in record else [])
    if seeds and trained:
        parts.append("seeds " + ", ".join(map(str, seeds)))
    seconds = record.get("seconds") or (record.get("result") or {}).get("seconds")
    parts += [f"{seconds:.0f} s in all"] if seconds else []
    versions = record.get("versions") or {n: record[n] for n in ("jax", "torch") if record.get(n)}
    parts.append(" ".join(f"{name} {v}" for name, v in versions.items()))
    parts.append(record.get("date", ""))
    return "; ".join(part for part in parts if part)


def source(name: str, record: dict) -> str:
    """The line below a table."""
    note = f"; {record['note']}" if "note" in record else ""
    return f"\n[{name}.json](results/{name}.json): {about(record)}{note}\n"


def picture(name: str) -> str:
    return f"\n![{name}](results/{name}.png)\n" if (FOLDER / f"results/{name}.png").exists() else ""
