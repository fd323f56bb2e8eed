"""What a rank has asked for and not got yet: batches, and their requests at each teacher."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from fusellm_ray.alignment.project import Aligned
from fusellm_ray.corpus.rows import Segment
from fusellm_ray.stream.address import TeacherAddress


@dataclass(slots=True)
class Traffic:
    """What went between this rank and one teacher."""

    answers: int = 0
    positions: int = 0
    answer_bytes: int = 0
    wait_s: float = 0.0
    """Time the rank did nothing but wait for this teacher, perhaps among others."""
    retries: int = 0
    """Requests sent again after a failure or for want of an answer."""
    dropped: int = 0
    """Positions joined without this teacher, because it was lost."""


@dataclass(slots=True)
class Request:
    """One batch at one teacher."""

    batch: int
    message: Any
    """The bytes, or where they are stored."""
    digest: bytes
    """Of the message; by it the same text goes to the same replica of a shared teacher. Empty for others."""
    num_positions: list[int]
    tokens: int
    attempts: dict[Any, int] = field(default_factory=dict)
    """Answers awaited: object reference → replica."""
    asked_at: float = 0.0
    """By the clock, when it was last sent."""
    sent_at: float = 0.0
    """The same, in time spent inside the stream."""
    tried: set[int] = field(default_factory=set)
    wrong_answers: int = 0
    wrong_since: float = 0.0
    """When the first of them came."""
    frame_errors: int = 0


@dataclass(slots=True)
class Batch:
    """A batch between submission and join."""

    number: int
    segments: list[Segment]
    tokens: int
    num_bytes: int
    parts: list[list[Aligned] | None]
    """By teacher; None until it has answered, and for good where it is lost."""
    pending: set[int]
    """Teachers whose answers are still waited for."""


class TeacherQueue:
    """The requests of one teacher."""

    def __init__(self, address: TeacherAddress) -> None:
        self.address = address
        self.traffic = Traffic()
        self.handles: dict[int, Any] = {}
        self.load: dict[int, int] = {}
        self.late: dict[Any, tuple[int, int]] = {}
        """Answers that came too late to be used, once they come: object reference → replica, its load."""
        self.heard_at: dict[int, float] = {}
        """When each replica last answered."""
        self.answer_s = 0.0
        """From request to answer, a running mean of those that were waited for; 0 before the first."""
        self.unsent: deque[Request] = deque()
        self.in_flight: dict[int, Request] = {}
        self.table_ref: Any = None
        self.table_at = 0.0  # by the clock, when the table may be asked for again, if there is need
        self.refresh_at = 0.0  # ... and when it is asked for without need: replicas may have come or gone
        self.reported_wait_s = 0.0
        self.send_at = 0.0  # by the clock, when what failed may be sent again
        self.backoff_s = 0.0
        self.progress_at = 0.0
        self.last_problem = "no answer"
        self.is_lost = False  # and not waited for; its oldest request is all that is in flight

    def __repr__(self) -> str:
        return f"teacher {self.address.name}"
