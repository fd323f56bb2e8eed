"""The record of a run as JSON lines: what each step measured, in the order it happened.

A run that resumed repeats the steps after its last checkpoint; of two lines for one step the later counts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

METRICS_FILE = "metrics.jsonl"


class RecordLog:
    """Appends records to metrics.jsonl in the run's folder.

    Args:
        folder: the run's folder. For an object store (a URI) the lines go to ./NAME.metrics.jsonl beside the
            driver, because object stores cannot append.
    """

    def __init__(self, folder: str) -> None:
        name = folder.rstrip("/").rsplit("/", 1)[-1]
        self.path = Path(f"{name}.{METRICS_FILE}") if "://" in folder else Path(folder) / METRICS_FILE
        self._file: TextIO | None = None

    def __enter__(self) -> RecordLog:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, record: dict[str, Any]) -> None:
        """Append one line, readable by others at once."""
        assert self._file is not None, "used as a context manager"
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
