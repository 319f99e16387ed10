"""What an experiment writes down: how its rows were made, and the rows, one a line."""

import datetime
import json
import sys
from pathlib import Path

import jax


def write(path: Path, rows: list[dict], *, command: str, seconds: float, **facts) -> None:
    """Writes the record that `experiments.report` reads: command, device, versions, date, facts."""
    torch = sys.modules.get("torch")
    record = {
        "command": command,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "torch": torch.__version__ if torch else None,
        "date": datetime.date.today().isoformat(),
        "seconds": round(seconds),
        **facts,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text(record, rows))


def text(record: dict, rows: list[dict]) -> str:
    """The record as JSON with each row on a line of its own."""
    head = json.dumps({**record, "rows": None}, indent=1).removesuffix("null\n}")
    return head + "[\n  " + ",\n  ".join(map(json.dumps, rows)) + "\n ]\n}\n"


def command(name: str, arguments: list[str] | None) -> str:
    """The command line that ran this, but for where the record lies."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--out" in given:
        at = given.index("--out")
        del given[at : at + 2]
    return " ".join([f"python -m experiments.{name}", *given])
