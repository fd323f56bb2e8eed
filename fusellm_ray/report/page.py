"""`fusellm-ray report`: a run as one HTML file that needs no network.

metrics.jsonl ─ History ─→ facts, charts, table of teachers ─┐
scores (fusellm-ray evaluate --json) ─→ comparison ──────────┼─→ page
tokenizers, a text of the corpus ─→ passages ────────────────┘
"""

from __future__ import annotations

import html
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

import yaml

from fusellm_ray.observe.records import History
from fusellm_ray.observe.status import duration, mean_of, state_of
from fusellm_ray.report.charts import Series, Unit, line_chart

Scores = Mapping[str, Any]
"""What `fusellm-ray evaluate --json` writes: models and, where it compared them, their differences."""


def render_page(run: str, history: History, *, scores: Scores | None = None, passages: str = "") -> str:
    """The whole page.

    Args:
        run: how its heading calls it.
        passages: HTML of the alignment samples.
    """
    sections = [
        _header(run, history),
        _charts("Losses", _losses(history)),
        _comparison(scores) if scores else "",
        _charts("What teachers add", _knowledge(history)),
        _teacher_table(history),
        _charts("The pipeline", _pipeline(history)),
        _section("Alignment samples", passages) if passages else "",
        _config(history),
    ]
    files = resources.files("fusellm_ray.report")
    style, script = ((files / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'  # or browsers ask for /favicon.ico
        f"<title>{html.escape(run)}</title><style>{style}</style></head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + f"\n<script>{script}</script></body></html>\n"
    )


# ---------------------------------------------------------------------------------------- sections


def _header(run: str, history: History) -> str:
    now = time.time()
    state = state_of(history, now)
    text = html.escape(state.text.splitlines()[0] if state.text else "")
    facts: dict[str, str] = {}
    if history.steps:
        last = history.steps[-1]
        facts["steps"] = f"{last['step']:,} / {last['steps']:,}"
        facts["tokens"] = _short(math.fsum(r["tokens"] for r in history.steps))
        for name, key in (("CLM loss", "loss/clm"), ("bits per byte", "loss/bits_per_byte")):
            if key in last:
                facts[f"{name}, last"] = f"{mean_of(history.steps[-20:], key):.4f}"
        facts["tokens/s, median"] = _short(statistics.median(r["perf/tokens_per_s"] for r in history.steps))
        facts["waiting for teachers"] = f"{mean_of(history.steps, 'time/wait_share'):.1%}"
        facts["time in steps"] = duration(math.fsum(r["time/step_s"] for r in history.steps))
        facts["steps skipped"] = str(last["skipped_steps"])
    if history.num_unreadable:
        facts["unreadable lines of the record"] = str(history.num_unreadable)
    cells = "".join(
        f"<div><dt>{name}</dt><dd>{html.escape(value)}</dd></div>" for name, value in facts.items()
    )
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime(now))
    problem = f'<pre class="problem">{html.escape(state.text)}</pre>' if state.word == "failed" else ""
    return (
        f'<header><h1>{html.escape(run)}</h1><p><span class="state">{text}</span> · report of {written}</p>{problem}'
        f'<dl class="facts">{cells}</dl></header>'
    )


def _losses(history: History) -> Iterable[str]:
    steps = history.steps
    parts = {"loss": "objective", "loss/clm": "CLM", "loss/fusion": "fusion"}
    yield _chart("Loss", "nats per token; the objective weighs its two parts", steps, parts)
    better = "of the target, lower is better"
    yield _chart("Bits per byte, training text", better, steps, {"loss/bits_per_byte": "target"})
    domains = [key for key in _keys(history.evaluations) if key.startswith("bits_per_byte/")]
    yield _chart(
        "Bits per byte, held-out text",
        better,
        history.evaluations,
        {key: key.split("/")[1] for key in domains},
    )
    yield _chart("Gradient norm", "before clipping", steps, {"grad_norm": "norm"})
    yield _chart("Learning rate", "", steps, {"lr": "lr"})


def _knowledge(history: History) -> Iterable[str]:
    steps, teachers = history.steps, _teachers(history)

    def by_teacher(figure: str, suffix: str = "") -> dict[str, str]:
        return {f"teacher/{name}/{figure}{suffix}": name for name in teachers}

    yield _chart("Win share", "of listened positions, by teacher", steps, by_teacher("win_share"), "share")
    for domain in _domains(history):
        note = "of the domain's listened positions"
        yield _chart(f"Win share: {domain}", note, steps, by_teacher("win_share", f"/{domain}"), "share")
    for domain in _domains(history):
        note = "nats per byte ahead of the target; below 0 the target is better"
        yield _chart(f"Advantage: {domain}", note, steps, by_teacher("advantage", f"/{domain}"))
    yield _chart("Coverage", "positions with a distribution", steps, by_teacher("coverage"), "share")
    note = "aligned nats per byte over the teacher's own; 1 is perfect"
    yield _chart("Fidelity", note, steps, by_teacher("fidelity"))
    yield _chart(
        "Residual", "mass outside the top-k and the gold token", steps, by_teacher("residual"), "share"
    )
    if teachers:
        listened = {"fusion/listened_share": "listened to"}
        yield _chart("Positions listened to", "where teachers' distributions count", steps, listened, "share")


def _pipeline(history: History) -> Iterable[str]:
    steps = history.steps
    yield _chart(
        "Waiting for teachers",
        "share of a step, mean over ranks",
        steps,
        {"time/wait_share": "wait"},
        "share",
    )
    yield _chart(
        "Tokens per second", "target tokens, over all ranks", steps, {"perf/tokens_per_s": "tokens/s"}
    )
    yield _chart(
        "Seconds a step", "mean over ranks", steps, {"time/step_s": "step", "time/wait_s": "of it waiting"}
    )
    pools = history.teachers
    for title, key, note in (
        ("Replicas", "ready", "ready to score"),
        ("Queued tokens", "queued_tokens", "asked for and not answered"),
        ("Restarts", "restarts", "of replicas that were up"),
    ):
        minutes = [(r["time"] - pools[0]["time"]) / 60 for r in pools]
        series = [
            Series(name, minutes, [r["pools"].get(name, {}).get(key, math.nan) for r in pools])
            for name in (sorted({name for r in pools for name in r["pools"]}))
        ]
        yield line_chart(title, f"{note}, over minutes", series, "count", x_name="minute")


def _teacher_table(history: History) -> str:
    """Means over the last tenth of the run: what teachers are worth by now."""
    recent = history.steps[-max(20, len(history.steps) // 10) :]
    rows = []
    for name in _teachers(history):
        figures = ("win_share", "coverage", "fidelity", "residual")
        means = [mean_of(recent, f"teacher/{name}/{figure}") for figure in figures]
        means += [mean_of(recent, f"teacher/{name}/advantage/{domain}") for domain in _domains(history)]
        rows.append((name, [_number(mean) for mean in means]))
    if not rows:
        return ""
    headings = ["win share", "coverage", "fidelity", "residual"]
    headings += [f"advantage, {domain}" for domain in _domains(history)]
    note = f"Means over the last {len(recent)} steps; advantages in nats per byte over the target as it was by then."
    return _section("Teachers by now", _table("teacher", headings, rows), note)


def _comparison(scores: Scores) -> str:
    models = scores["models"]
    domains = list(dict.fromkeys(domain for score in models.values() for domain in score["domains"]))
    values = {
        model: [score["domains"].get(d, {}).get("bits_per_byte", math.nan) for d in domains] + [score["mean"]]
        for model, score in models.items()
    }
    best = [min(v for v in column if not math.isnan(v)) for column in zip(*values.values(), strict=True)]
    rows = [
        (
            model,
            [
                f"<b>{_number(v)}</b>" if v == least else _number(v)
                for v, least in zip(own, best, strict=True)
            ],
        )
        for model, own in values.items()
    ]
    body = _table("model", [*domains, "mean"], rows)
    if scores.get("differences"):
        columns = list(dict.fromkeys(d for intervals in scores["differences"].values() for d in intervals))
        rows = [
            (model, [_interval(intervals.get(column, {})) for column in columns])
            for model, intervals in scores["differences"].items()
        ]
        level = scores.get("bootstrap", {}).get("level")
        sure = f", with {level:.0%} intervals over documents" if level else ""
        against = html.escape(str(scores.get("against")))
        body += f'<p class="note">Difference to {against}{sure}; below 0 is better.</p>{_table("model", columns, rows)}'
    return _section("Models compared", body, "Bits per byte on held-out text; lower is better.")


def _config(history: History) -> str:
    if history.config is None:
        return ""
    text = html.escape(yaml.safe_dump(history.config, sort_keys=False, allow_unicode=True))
    return _section("Configuration", f"<details><summary>every key</summary><pre>{text}</pre></details>")


# ---------------------------------------------------------------------------------------- parts


def _section(title: str, body: str, note: str = "") -> str:
    said = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return f"<section><h2>{html.escape(title)}</h2>{said}{body}</section>"


def _charts(title: str, charts: Iterable[str]) -> str:
    drawn = "\n".join(chart for chart in charts if chart)
    return _section(title, f'<div class="charts">\n{drawn}\n</div>') if drawn else ""


def _chart(
    title: str, note: str, records: Sequence[dict[str, Any]], keys: Mapping[str, str], unit: Unit = "number"
) -> str:
    xs = [r["step"] for r in records]
    series = [Series(name, xs, [r.get(key, math.nan) for r in records]) for key, name in keys.items()]
    return line_chart(title, note, series, unit)


def _table(first: str, headings: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Cells are HTML, names are text."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in (first, *headings))
    lines = [
        f"<tr><td>{html.escape(name)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for name, cells in rows
    ]
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"


def _interval(interval: Mapping[str, float | None]) -> str:
    difference, low, high = (interval.get(name) for name in ("difference", "low", "high"))
    if difference is None:
        return ""
    return f"{difference:+.4f}" + (
        f" [{low:+.4f}, {high:+.4f}]" if low is not None and high is not None else ""
    )


def _keys(records: Sequence[dict[str, Any]]) -> list[str]:
    """In the order in which they first come."""
    return list(dict.fromkeys(key for record in records for key in record))


def _teachers(history: History) -> list[str]:
    return list(dict.fromkeys(k.split("/")[1] for k in _keys(history.steps) if k.startswith("teacher/")))


def _domains(history: History) -> list[str]:
    keys = (key.split("/") for key in _keys(history.steps) if key.startswith("teacher/"))
    return list(dict.fromkeys(key[3] for key in keys if len(key) == 4))


def _short(number: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"
