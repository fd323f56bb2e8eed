"""`fusellm-ray status`: how a run stands, from its record alone: any terminal that reaches the storage may ask."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fusellm_ray.observe.progress import step_line
from fusellm_ray.observe.records import History

_RECENT = 20
"""Steps over which speed is measured."""
_STALE_S = 120.0
"""Silence after which a run is called stale, or to wait for a teacher; longer where its steps are."""
_WATCH_S = 2.0


@dataclass(frozen=True, slots=True)
class State:
    """In a word and a sentence."""

    word: str
    """starting, training, waiting, finished, stopped, failed or stale."""
    text: str

    @property
    def is_over(self) -> bool:
        return self.word in ("finished", "stopped", "failed")


def state_of(history: History, now: float) -> State:
    """How the run stands.

    Args:
        now: seconds since the epoch.
    """
    outcome = history.outcome
    if outcome is not None and outcome["event"] == "failed":
        return State("failed", f"failed: {outcome['error']}")
    if outcome is not None:
        step, reason = outcome["step"], outcome["reason"]
        if reason.startswith(("finished", "stopped early")):
            return State(
                "finished", f"{reason} at step {step}" if reason == "finished" else f"step {step}: {reason}"
            )
        return State("stopped", f"stopped at step {step} ({reason}); the same command resumes it")
    seconds = step_seconds(history)
    age = now - history.last.get("time", now)
    patience = max(_STALE_S, _RECENT * seconds)
    if age > patience:
        return State(
            "stale",
            f"stale: no record for {duration(age)}; it was killed, or waits for the cluster or a teacher",
        )
    since_ranks = now - history.last_of_ranks.get("time", now)
    if since_ranks > patience:
        return State(
            "waiting", f"waiting: ranks got no further for {duration(since_ranks)}; {_awaited(history)}"
        )
    if not history.steps:
        return State("starting", "starting: no step yet")
    at = history.steps[-1]
    left = (at["steps"] - at["step"]) * seconds
    return State(
        "training",
        f"training: step {at['step']} of {at['steps']} ({at['step'] / at['steps']:.1%}), "
        f"{seconds:.2g} s a step, about {duration(left)} left",
    )


def _awaited(history: History) -> str:
    """For whom a run waits that its driver still watches."""
    pools: dict[str, Any] = history.teachers[-1]["pools"] if history.teachers else {}
    short = [
        f"teacher {name} ({pool['ready']} of {pool['wanted']} replicas ready)"
        for name, pool in pools.items()
        if pool["ready"] < max(1, pool["wanted"])
    ]
    return ", ".join(short) or "its teachers are ready: see the log of the run"


def step_seconds(history: History) -> float:
    """Median over the latest steps; 0 before the first."""
    recent = [r["time/step_s"] for r in history.steps[-_RECENT:]]
    return statistics.median(recent) if recent else 0.0


def duration(seconds: float) -> str:
    """In the two units that matter: 45 s, 3 min 20 s, 5 h 12 min, 2 d 3 h."""
    seconds = max(0, round(seconds))
    for unit, size, below, per in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= size:
            return f"{seconds // size} {unit} {seconds % size // per} {below}"
    return f"{seconds} s"


def render(run: str, history: History, now: float) -> RenderableType:
    """The whole status."""
    state = state_of(history, now)
    colour = {
        "training": "green",
        "finished": "green",
        "waiting": "yellow",
        "stale": "yellow",
        "failed": "red",
    }.get(state.word, "")
    parts: list[RenderableType] = [Text.assemble((run, "bold"), "  ", (state.text, colour))]
    if history.steps:
        parts.append(Text(step_line(history.steps[-1])))
        teachers = _teachers(history)
        if teachers is not None:
            parts.append(teachers)
    for name, pool in (history.teachers[-1]["pools"] if history.teachers else {}).items():
        parts += [Text(f"teacher {name}: {problem}", style="yellow") for problem in pool["problems"]]
    if history.evaluations:
        latest = history.evaluations[-1]
        scores = "  ".join(
            f"{key.split('/')[1]} {value:.4f}"
            for key, value in latest.items()
            if key.startswith("bits_per_byte/")
        )
        parts.append(Text(f"held-out bits per byte at step {latest['step']}: {scores}"))
    if history.num_unreadable:
        parts.append(
            Text(f"lines of the record that cannot be read: {history.num_unreadable}", style="yellow")
        )
    if not state.is_over and "time" in history.last:
        ages = [f"last record {duration(now - history.last['time'])} ago"]
        ages += [f"last step {duration(now - at['time'])} ago" for at in history.steps[-1:]]
        parts.append(Text(", ".join(ages), style="dim"))
    return Group(*parts)


def show_status(run: str, read: Callable[[], History], *, watch: bool) -> State:
    """Print the status once, or again and again until the run is over."""
    console = Console()
    history = read()
    if not watch:
        console.print(render(run, history, time.time()))
        return state_of(history, time.time())
    with Live(render(run, history, time.time()), console=console, auto_refresh=False) as live:
        while not (state := state_of(history, time.time())).is_over:
            time.sleep(_WATCH_S)
            history = read()
            live.update(render(run, history, time.time()), refresh=True)
    return state


def _teachers(history: History) -> Table | None:
    """A line a teacher: means over the latest steps, and its pool as it stood last."""
    recent = history.steps[-_RECENT:]
    pools: dict[str, Any] = history.teachers[-1]["pools"] if history.teachers else {}
    names = sorted(
        {key.split("/")[1] for r in recent for key in r if key.startswith("teacher/")} | set(pools)
    )
    if not names:
        return None
    table = Table(title=f"teachers, means of the last {len(recent)} steps", title_justify="left")
    for heading in ("teacher", "replicas", "queued tokens", "restarts", "win share", "coverage", "fidelity"):
        table.add_column(heading, justify="left" if heading == "teacher" else "right")
    for name in names:
        pool = pools.get(name, {})
        figures = [mean_of(recent, f"teacher/{name}/{key}") for key in ("win_share", "coverage", "fidelity")]
        table.add_row(
            name,
            f"{pool['ready']}/{pool['wanted']}" if pool else "",
            f"{pool['queued_tokens']:,}" if pool else "",
            str(pool["restarts"]) if pool else "",
            *("" if math.isnan(figure) else f"{figure:.3f}" for figure in figures),
        )
    return table


def mean_of(records: Sequence[dict[str, Any]], key: str) -> float:
    """Over the records that have the figure; NaN where none has."""
    values = [record[key] for record in records if key in record]
    return statistics.fmean(values) if values else math.nan
