"""The errors of many ranks as few lines: same errors once, rare ones first."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_MAX_CHARS = 1500
"""Of one error's text; the whole is in Ray's logs."""
_NUMBERS = re.compile(r"\b0x[0-9a-f]+|\b[0-9a-f]{24,}\b|\d+(?:[.:]\d+)*", re.IGNORECASE)
"""Addresses, ids of actors, process ids, ports, ranks: what differs between ranks with the same trouble."""


def group_failures(failures: Mapping[int, BaseException]) -> str:
    """One paragraph for each kind of error, with the ranks that had it.

    When one rank fails, the others lose their connections to it. So the fewer ranks had an error, the further up
    it stands: the cause comes before what it caused.
    """
    groups: dict[str, dict[int, str]] = {}
    for rank, error in sorted(failures.items()):
        text = f"{type(error).__name__}: {str(error).strip()}"
        groups.setdefault(_NUMBERS.sub("#", text), {})[rank] = text
    paragraphs = []
    for texts in sorted(groups.values(), key=len):
        text = next(iter(texts.values()))
        if len(text) > _MAX_CHARS:
            text = f"{text[:_MAX_CHARS]} …"
        word = "rank" if len(texts) == 1 else "ranks"
        paragraphs.append(f"{word} {ranges(texts)}: {text}")
    return "\n".join(paragraphs)


def ranges(numbers: Iterable[int]) -> str:
    """Example: ranges([0, 1, 2, 5]) → "0–2, 5"."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in spans)
