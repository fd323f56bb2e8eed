"""What ended a run: our own error inside what Ray wrapped around it, or the errors of many ranks as few lines."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from fusellm_ray.errors import FuseLLMError

_MAX_CHARS = 1500
"""Of one error's text; the whole is in Ray's logs."""
_NUMBERS = re.compile(r"\b0x[0-9a-f]+|\b[0-9a-f]{24,}\b|\d+(?:[.:]\d+)*", re.IGNORECASE)
"""Addresses, ids of actors, process ids, ports, ranks: what differs between ranks with the same trouble."""


def find_error(error: BaseException | None) -> FuseLLMError | None:
    """The error of ours inside what Ray wrapped around it."""
    seen: set[int] = set()
    queue = [error]
    while queue:
        current = queue.pop()
        if current is None or id(current) in seen:
            continue
        if isinstance(current, FuseLLMError):
            return current
        seen.add(id(current))
        queue += [current.__cause__, current.__context__, getattr(current, "cause", None)]
        queue += [getattr(current, "_base_exc", None), getattr(current, "controller_failure", None)]
        queue += list(getattr(current, "worker_failures", {}).values())
    return None


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
