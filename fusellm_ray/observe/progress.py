"""What a person sees of a run while it goes: bars on a terminal, one line a step anywhere else, JSON on request."""

from __future__ import annotations

import json
import math
import sys
import time
from typing import Any, Literal, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Display:
    """Shows a run; entered when training starts. A subclass overrides what it shows; the rest shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Restore what entering changed."""

    def note(self, text: str) -> None:
        """Say something once."""

    def teachers(self, states: dict[str, str]) -> None:
        """Show how far each teacher's start-up is, by name; called again as it changes."""

    def show(self, record: dict[str, Any]) -> None:
        """Show one record of the run."""


LogFormat = Literal["text", "json"]


def make_display(title: str = "training", log_format: LogFormat = "text") -> Display:
    """Bars where someone watches a terminal, lines in a log; with json an object a line, wherever it goes."""
    if log_format == "json":
        return _JsonLines(title)
    return _Bars(title) if sys.stderr.isatty() else _Lines()


def step_line(record: dict[str, Any]) -> str:
    """One step in one line, figures named as in metrics.jsonl."""
    figures = [
        ("loss", "loss", ".4f"),
        ("clm", "loss/clm", ".4f"),
        ("fusion", "loss/fusion", ".4f"),  # absent without teachers
        ("grad", "grad_norm", ".2f"),
        ("lr", "lr", ".2e"),
        ("tok/s", "perf/tokens_per_s", ".0f"),
        ("wait", "time/wait_share", ".0%"),
    ]
    parts = [f"step {record['step']}/{record['steps']}"]
    parts += [f"{name} {record[key]:{form}}" for name, key, form in figures if key in record]
    wins = {k.split("/")[1]: v for k, v in record.items() if k.endswith("/win_share")}
    if wins:
        parts.append("wins " + " ".join(f"{name} {share:.0%}" for name, share in wins.items()))
    return "  ".join(parts)


def event_line(record: dict[str, Any]) -> str:
    """Anything that is not a step: start, evaluation, sample, checkpoint, end."""
    if record["event"] == "sample":
        return f"sample  step {record['step']}  {record['prompt']!r} → {record['text']!r}"
    details = [
        f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}"
        for name, value in record.items()
        if name != "event"
    ]
    return "  ".join([record["event"], *details])


class _Lines(Display):
    """For logs: every record is one line with the time."""

    def note(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)

    def teachers(self, states: dict[str, str]) -> None:
        self.note("teachers: " + ", ".join(f"{name} {state}" for name, state in states.items()))

    def show(self, record: dict[str, Any]) -> None:
        if record["event"] == "step":
            self.note(step_line(record))
        else:
            self.note(event_line(record))


class _JsonLines(Display):
    """For collectors of logs: every line an object with time, role, run and event."""

    def __init__(self, run: str) -> None:
        self._run = run

    def note(self, text: str) -> None:
        self.show({"event": "note", "text": text})

    def teachers(self, states: dict[str, str]) -> None:
        self.show({"event": "start of teachers", "teachers": states})

    def show(self, record: dict[str, Any]) -> None:
        known = {"time": round(time.time(), 3), "role": "driver", "run": self._run}
        # JSON has no NaN, which a skipped step's loss is.
        line = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in (known | record).items()
        }
        print(json.dumps(line), file=sys.stderr, flush=True)


class _Bars(Display):
    """For people: a bar with the figures of the latest step."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._console = Console(stderr=True)
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> _Bars:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
        )
        self._progress.start()
        self._task = self._progress.add_task(f"{self._title}: ranks start", total=None, figures="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def note(self, text: str) -> None:
        self._console.print(text, markup=False)

    def teachers(self, states: dict[str, str]) -> None:
        said = ", ".join(f"{name} {state}" for name, state in states.items())
        self._console.print(f"teachers: {said}", markup=False)

    def show(self, record: dict[str, Any]) -> None:
        if self._progress is None or self._task is None:
            return
        if record["event"] in ("evaluation", "sample"):
            self._console.print(event_line(record), markup=False)
        if record["event"] != "step":
            return
        figures = "  ".join(step_line(record).split("  ")[1:])
        self._progress.update(
            self._task,
            description=self._title,
            total=record["steps"],
            completed=record["step"],
            figures=figures,
        )
