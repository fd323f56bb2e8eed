"""How many replicas a teacher should have: measurements in, decisions with their reason out. Nothing acts here.

A rank asks as far ahead as its credits allow, so a queue alone says little: it is full whenever ranks are not
slower than the teacher. What counts is that ranks wait while replicas are busy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fusellm_ray.config import Replicas

BUSY = 0.8
"""Share of its time that a replica should have something to do."""
WAITING = 0.05
"""Seconds of waiting ranks, all together, in a second: below it, more replicas would speed nothing up."""
QUIET_LOOKS = 12
"""Looks in a row that must find replicas idle before one goes: starting one again takes minutes."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a pool measured since its last look."""

    ready: int
    starting: int
    refused: int
    """Up, but other than the first; each tries again for as long as it is there."""
    busy: float
    """Mean share of the time that the ready replicas' engines had something to do."""
    wait: float
    """Seconds that ranks waited for this teacher, all together, in a second."""
    queued_tokens: int
    tokens_per_s: float
    """Of one replica while it is busy; 0 if unknown."""

    @property
    def replicas(self) -> int:
        """All that hold or want a place."""
        return self.ready + self.starting + self.refused


@dataclass(frozen=True, slots=True)
class Decision:
    """How many replicas there should be, and why."""

    replicas: int
    reason: str


class Scaler:
    """Decides for one teacher, look after look."""

    def __init__(self, bounds: Replicas) -> None:
        self._bounds = bounds
        self._quiet_looks = 0

    def decide(self, load: Load) -> Decision:
        """Add as many as ranks' waiting asks for where replicas are busy, up to half as many again; take one away
        after a long quiet time, one that is not ready first."""
        current = load.replicas
        measured = f"ranks wait {load.wait:.2f} s a second, replicas are busy {load.busy:.0%}"
        needed = max(self._bounds.min, math.ceil(load.ready * load.busy / BUSY - 1e-9))
        is_quiet = load.wait < WAITING and needed < current
        self._quiet_looks = self._quiet_looks + 1 if is_quiet else 0
        if load.wait >= WAITING and load.busy >= BUSY and load.queued_tokens:
            if load.starting:
                return Decision(current, f"{measured}, but {load.starting} replicas are still starting")
            if current >= self._bounds.max:
                return Decision(current, f"{measured}, but replicas.max={self._bounds.max}")
            backlog = f", {load.queued_tokens} tokens are queued"
            if load.tokens_per_s:
                backlog += f" ({load.queued_tokens / (load.ready * load.tokens_per_s):.1f} s)"
            # A rank that waits for a share w of its time needs a teacher 1 / (1 - w) times as fast.
            more = math.ceil(load.ready * load.wait / max(1 - load.wait, 0.5) - 1e-9)
            more = min(max(1, more), max(1, current // 2))
            return Decision(min(self._bounds.max, current + more), measured + backlog)
        if self._quiet_looks >= QUIET_LOOKS:
            self._quiet_looks = 0
            return Decision(current - 1, f"{measured}, for {QUIET_LOOKS} looks; {needed} would do")
        return Decision(current, measured)
