"""What an experiment writes down: how its rows were made, and the rows, one a line."""

import datetime
import json
import sys
from pathlib import Path

import jax
import numpy as np


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
    """The command line that ran this, but for where the record and generated data lie."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--out" in given:
        at = given.index("--out")
        del given[at : at + 2]
    if "--cache" in given:
        given[given.index("--cache") + 1] = "FOLDER"
    return " ".join([f"python -m experiments.{name}", *given])


def history(folder: Path) -> dict[str, np.ndarray]:
    """What metrics.jsonl says at every validation: epoch, seconds, loss [n], errors [n, seeds].

    The loss is the mean over seeds and the steps of the call before.
    """
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds, epoch, loss, rows = 0.0, 0.0, np.nan, []
    for line in lines:
        if "loss" in line:
            seconds, epoch, loss = seconds + line["seconds"], line["epoch"], line["loss"]
        else:
            rows.append((epoch, seconds, loss, line["valid"], line["valid_ema"]))
    names = ("epoch", "seconds", "loss", "valid", "valid_ema")
    return {n: np.array(column) for n, column in zip(names, zip(*rows, strict=True), strict=True)}


def epoch_seconds(folder: Path) -> list[float]:
    """Seconds spent in the training steps of each whole epoch in a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found, spent = [], 0.0
    for line in lines:
        if "loss" in line:
            spent += line["seconds"]
            if line["epoch"] == int(line["epoch"]):
                found, spent = [*found, spent], 0.0
    return found
