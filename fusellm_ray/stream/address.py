"""Where a rank finds a teacher; light to import, for pools and drivers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

REFRESH_S = 2.0
"""How often a rank that waits for a teacher reads its table again."""


@dataclass(frozen=True, slots=True)
class HandleTable:
    """The replicas of a teacher that take requests now."""

    handles: Mapping[int, Any]
    """Actor handles by replica number."""


@dataclass(frozen=True, slots=True)
class TeacherAddress:
    """How a rank reaches a teacher. Picklable."""

    name: str
    fingerprint: str
    """Answers that carry another one are refused."""
    top_k: int
    pool: Any
    """Actor handle; `table(teacher, waited_s)` and `report(teacher, replica, reason, is_wrong)` give a
    `HandleTable`."""
    run: str = ""
    """Who asks: a replica that several runs share serves them in turn."""
    is_shared: bool = False
    """Other runs may ask for the same text: it goes to the same replica, which may remember its answer."""
