"""Many models on the same held-out text: tables of bits per byte for a terminal, as Markdown, and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fusellm_ray.evaluate.bootstrap import LEVEL, MEAN, Interval
from fusellm_ray.perplexity import DomainScore

Scores = Mapping[str, Mapping[str, DomainScore]]
"""Model → domain → score."""

Differences = Mapping[str, Mapping[str, Interval]]
"""Model → domain or `MEAN` → how much it differs from the one that all are compared with."""


@dataclass(frozen=True, slots=True)
class Grid:
    """A table of ready strings; the first column names the rows."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    bold: frozenset[tuple[int, int]] = frozenset()
    """(row, column) of what stands out."""

    def print(self) -> None:
        table = Table(title=escape(self.title), title_justify="left")
        for number, column in enumerate(self.columns):
            table.add_column(escape(column), justify="right" if number else "left")
        for i, row in enumerate(self.rows):
            cells = [escape(cell) for cell in row]
            table.add_row(*(f"[bold]{c}[/bold]" if (i, j) in self.bold else c for j, c in enumerate(cells)))
        Console().print(table)

    def markdown(self) -> str:
        lines = [f"{self.title}\n", _line(self.columns), _line(["---", *["---:"] * (len(self.columns) - 1)])]
        for i, row in enumerate(self.rows):
            lines.append(_line([f"**{c}**" if (i, j) in self.bold else c for j, c in enumerate(row)]))
        return "\n".join(lines) + "\n"


def score_grid(scores: Scores, title: str) -> Grid:
    """A row a model, a column a domain, the best of each column in bold, and the mean over domains."""
    domains = list(next(iter(scores.values())))
    values = [
        [*(by_domain[d].bits_per_byte for d in domains), mean_bits_per_byte(by_domain)]
        for by_domain in scores.values()
    ]
    best = frozenset(
        (i, j + 1)
        for j, column in enumerate(zip(*values, strict=True))
        for i, value in enumerate(column)
        if value == min(column)
    )
    rows = [[model, *(f"{v:.4f}" for v in row)] for model, row in zip(scores, values, strict=True)]
    return Grid(title, ["model", *domains, MEAN], rows, best)


def difference_grid(differences: Differences, against: str) -> Grid:
    """A row a model, a column a domain: difference and interval; in bold what the interval decides."""
    rows, bold = [], set()
    for i, (model, by_domain) in enumerate(differences.items()):
        rows.append([model, *(show_interval(interval) for interval in by_domain.values())])
        bold |= {(i, j) for j, interval in enumerate(by_domain.values(), 1) if interval.is_decided}
    title = f"difference from {against}: bits per byte, {LEVEL:.0%} paired bootstrap interval over documents"
    return Grid(title, ["model", *next(iter(differences.values()))], rows, frozenset(bold))


def show_interval(interval: Interval) -> str:
    if math.isnan(interval.low):
        return f"{interval.difference:+.4f}"
    return f"{interval.difference:+.4f} ({interval.low:+.4f} to {interval.high:+.4f})"


def print_scores(scores: Scores, title: str) -> None:
    score_grid(scores, title).print()


def mean_bits_per_byte(scores: Mapping[str, DomainScore]) -> float:
    """Mean over domains, each with the same weight whatever its size."""
    return math.fsum(score.bits_per_byte for score in scores.values()) / len(scores)


def as_json(scores: Scores) -> dict[str, Any]:
    """Model → {mean, domains: {domain: {bits_per_byte, bytes, tokens, documents}}}."""
    return {
        model: {
            "mean": mean_bits_per_byte(by_domain),
            "domains": {
                domain: {"bits_per_byte": score.bits_per_byte}
                | {name: getattr(score, name) for name in ("bytes", "tokens", "documents")}
                for domain, score in by_domain.items()
            },
        }
        for model, by_domain in scores.items()
    }


def interval_json(interval: Interval) -> dict[str, float | None]:
    """{difference, low, high}; null where there is no interval."""
    return {name: None if math.isnan(value) else value for name, value in asdict(interval).items()}


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
