"""Line charts as inline SVG: no script needed to read them, colours from the page's style sheet, light and dark.

    series → means of at most MAX_POINTS buckets → one <figure> with legend, axes, lines

`page.js` reads the figure's data attribute to show the values under the pointer.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

MAX_POINTS = 300
"""A line; more cannot be told apart on a screen."""
NUM_COLOURS = 8
_WIDTH, _HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 16, 8, 22

Unit = Literal["number", "share", "count"]


@dataclass(frozen=True, slots=True)
class Series:
    """One line: ascending xs, finite or NaN ys."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]


def line_chart(
    title: str, note: str, series: Sequence[Series], unit: Unit = "number", x_name: str = "step"
) -> str:
    """A figure; nothing where no series has a number.

    Args:
        note: what is shown, in a line.
        unit: share: an axis in per cent; count: whole numbers.

    Values far above nearly all others (a first step that compiles, say) are cut at the upper edge.
    """
    drawn = [thinned(s) for s in series]
    drawn = [s for s in drawn if s.xs]
    if not drawn:
        return ""
    x_low, x_high = min(s.xs[0] for s in drawn), max(s.xs[-1] for s in drawn)
    y_ticks = ticks(min(min(s.ys) for s in drawn), _highest(drawn), least=1.0 if unit == "count" else 0.0)
    y_low, y_high = y_ticks[0], y_ticks[-1]
    y_digits, digits = _digits_of_step(y_ticks[1] - y_ticks[0], unit), _digits((y_high - y_low) / 100, unit)
    x_ticks = ticks(x_low, x_high)

    def across(x: float) -> float:
        share = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def down(y: float) -> float:
        return _TOP + max(0.0, (y_high - y) / (y_high - y_low)) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title, quote=True)}">'
    ]
    for y in y_ticks:
        at = f"{down(y):.1f}"
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="y" x="{_LEFT - 5}" y="{at}">{label(y, unit, y_digits)}</text>')
    x_digits = _digits_of_step(x_ticks[1] - x_ticks[0], "number")
    for x in (x for x in x_ticks if x_low <= x <= x_high):
        shown = label(x, "number", x_digits)
        parts.append(f'<text class="x" x="{across(x):.1f}" y="{_HEIGHT - 6}">{shown}</text>')
    for index, s in enumerate(drawn):
        points = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in zip(s.xs, s.ys, strict=True))
        if len(s.xs) == 1:
            at = f'cx="{across(s.xs[0]):.1f}" cy="{down(s.ys[0]):.1f}"'
            parts.append(f'<circle class="{_colour(index)}" {at} r="3"/>')
        else:
            parts.append(f'<polyline class="{_colour(index)}" points="{points}"/>')
    parts.append(f'<line class="cursor" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" hidden/></svg>')
    legend = "".join(
        f'<li class="{_colour(index)}"><i></i>{html.escape(s.name)} '
        f"<b>{label(s.ys[-1], unit, digits)}</b></li>"
        for index, s in enumerate(drawn)
    )
    data = {
        "x": [x_low, x_high],
        "plot": [_LEFT, _WIDTH - _RIGHT, _WIDTH],
        "unit": unit,
        "xName": x_name,
        "digits": digits,
        "series": [{"x": list(s.xs), "y": [float(f"{y:.6g}") for y in s.ys]} for s in drawn],
    }
    return (
        f'<figure class="chart" data-chart="{html.escape(json.dumps(data), quote=True)}">'
        f"<figcaption><h3>{html.escape(title)}</h3><p>{html.escape(note)}</p></figcaption>"
        f'{"".join(parts)}<ul class="legend">{legend}</ul><output></output></figure>'
    )


def thinned(series: Series) -> Series:
    """Without what is no number, and each bucket of neighbouring points as its mean."""
    points = [(x, y) for x, y in zip(series.xs, series.ys, strict=True) if math.isfinite(y)]
    size = math.ceil(len(points) / MAX_POINTS) or 1
    buckets = [points[i : i + size] for i in range(0, len(points), size)]
    return Series(
        series.name,
        [bucket[-1][0] for bucket in buckets],
        [math.fsum(y for _, y in bucket) / len(bucket) for bucket in buckets],
    )


def ticks(low: float, high: float, about: int = 4, least: float = 0.0) -> list[float]:
    """Round numbers, at least `least` apart, of which the first is at most `low` and the last at least `high`."""
    if high - low < 1e-9 * max(abs(high), abs(low), 1e-9):
        pad = abs(high) / 10
        low, high = (low - pad, high + pad) if pad else (0.0, 1.0)
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = max(least, power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def label(value: float, unit: Unit, digits: int) -> str:
    """A number with `digits` decimals; shorter where it is very large or very small."""
    if unit == "share":
        return f"{100 * value:.{digits}f} %"
    for size, suffix in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= size:
            return f"{value / (1e3 if size == 1e4 else size):.4g}{suffix}"
    if 0 < abs(value) < 1e-3 and (digits > 4 or abs(value) < 0.5 * 10.0**-digits):
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.{digits}f}"


def _highest(series: Sequence[Series]) -> float:
    values = sorted(y for s in series for y in s.ys)
    usual = values[int(0.98 * (len(values) - 1))]
    return 1.5 * usual if usual > 0 and values[-1] > 3 * usual else values[-1]


def _digits(resolution: float, unit: Unit) -> int:
    """Decimals that tell apart what differs by `resolution`."""
    if unit == "count":
        return 0
    if unit == "share":
        resolution *= 100
    return max(0, min(4, math.ceil(-math.log10(resolution) - 1e-9)))


def _digits_of_step(step: float, unit: Unit) -> int:
    """Decimals that ticks so far apart have."""
    if unit == "share":
        step *= 100
    return next((d for d in range(6) if abs(step * 10**d - round(step * 10**d)) < 1e-6), 6)


def _colour(index: int) -> str:
    dashed = " dashed" if index >= NUM_COLOURS else ""
    return f"c{index % NUM_COLOURS}{dashed}"
