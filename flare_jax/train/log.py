"""What a run says while it runs: JSON lines in a file, progress with time left on a terminal."""

import json
import math
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class MetricsFile:
    """Appends one JSON object a line to `path`; a resumed run drops the lines after its `step`.

    `seconds` are those of the steps of the lines that are kept.
    """

    def __init__(self, path: Path, step: int = 0):
        lines = path.read_text().splitlines() if path.exists() and step else []
        kept = [line for line in lines if _step(line) <= step]
        self.seconds = sum(json.loads(line).get("seconds", 0) for line in kept)
        path.write_text("".join(line + "\n" for line in kept))
        self.file = path.open("a")

    def write(self, **values) -> None:
        """Writes one line at once, so that a killed run keeps it."""
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # a line that was cut off
        return math.inf


def progress_bar(console: Console | None = None) -> Progress:
    """Epochs done, loss, validation error and time left; silent where there is no terminal."""
    console = console or Console(stderr=True)
    return Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs  {task.fields[status]}"),
        TimeRemainingColumn(compact=True),
        console=console,
        disable=not console.is_terminal,
    )
