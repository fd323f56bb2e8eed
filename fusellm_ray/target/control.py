"""The thread between a run's driver and its ranks: the wish to stop, and what each step measured.

    driver --request_stop--> RunControl <--record (rank 0, once a step, answer read a step later)-- ranks
    driver <-----take------- RunControl <--stop_reason (a rank that waits for its batch)----------- ranks

It carries a few hundred bytes a step and holds no data of the stream.
"""

from __future__ import annotations

import collections
from typing import Any

MAX_RECORDS = 100_000
"""Records kept while nobody takes them (a detached driver); the oldest go first and are counted."""


class RunControl:
    """Ray actor, one a run, created by the driver."""

    def __init__(self) -> None:
        self._stop_reason: str | None = None
        self._records: collections.deque[dict[str, Any]] = collections.deque(maxlen=MAX_RECORDS)
        self._num_dropped = 0
        self._controller: tuple[int, float] | None = None

    def __repr__(self) -> str:  # Ray puts it in front of this process's log lines
        return "run control"

    def request_stop(self, reason: str) -> None:
        """Ask the ranks to save a checkpoint after the step under way, and to end."""
        self._stop_reason = self._stop_reason or reason

    def stop_reason(self) -> str | None:
        """Why the ranks should end; None as long as they should not."""
        return self._stop_reason

    def record(self, record: dict[str, Any]) -> str | None:
        """Keep one record; answer with the reason to stop, if there is one."""
        if len(self._records) == MAX_RECORDS:
            self._num_dropped += 1
        self._records.append(record)
        return self._stop_reason

    def take(self) -> tuple[list[dict[str, Any]], int]:
        """Hand over all records since the last call, and how many were dropped before anyone took them."""
        records = list(self._records)
        self._records.clear()
        dropped, self._num_dropped = self._num_dropped, 0
        return records, dropped

    def note_controller(self, pid: int, created: float) -> None:
        """Remember the process of Ray Train's controller, and when it was created: a pid alone may be another's."""
        self._controller = (pid, created)

    def controller(self) -> tuple[int, float] | None:
        """What `note_controller` was told; None before the controller was up."""
        return self._controller
