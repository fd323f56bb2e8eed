"""A rank's side of the stream: segments go to every teacher at once, joined answers come back in order.

    batches ─→ credits ─┬→ teacher a, least-loaded replica ─→ frame ─┐
                        └→ teacher b, ...                  ─→ frame ─┴→ join ─→ (batch, parts by teacher)

Everything happens on the caller's thread, inside `join`; while the caller is away, replicas go on with what
is in flight. Scoring is pure, so whatever fails is sent again; the first answer counts, later ones do not.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from fusellm_ray.alignment.project import Aligned
from fusellm_ray.config import StreamConfig
from fusellm_ray.corpus.rows import Segment
from fusellm_ray.errors import FrameError, FuseLLMError, TeacherLostError
from fusellm_ray.stream.address import REFRESH_S, TeacherAddress
from fusellm_ray.stream.failures import cause_of, summary_of
from fusellm_ray.stream.frame import answer_bytes, decode_frame, encode_request

_POLL_S = 0.5
"""Longest sleep between looks at deadlines and unsent requests."""
_BACKOFF_S = (0.2, 5.0)
"""First and longest pause before a failed request is sent again."""
_MAX_WRONG_ANSWERS = 8
"""Errors one request may meet inside replicas before its teacher counts as lost; crashes do not count."""


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


@dataclass(slots=True)
class _Request:
    """One batch at one teacher."""

    batch: int
    message: Any
    num_positions: list[int]
    tokens: int
    attempts: dict[Any, int] = field(default_factory=dict)
    """Answers awaited: object reference → replica."""
    sent_at: float = 0.0
    tried: set[int] = field(default_factory=set)
    wrong_answers: int = 0
    frame_errors: int = 0


@dataclass(slots=True)
class _Batch:
    """A batch between submission and join."""

    number: int
    segments: list[Segment]
    tokens: int
    num_bytes: int
    parts: list[list[Aligned] | None]


class _Teacher:
    """The requests of one teacher."""

    def __init__(self, address: TeacherAddress) -> None:
        self.address = address
        self.traffic = Traffic()
        self.handles: dict[int, Any] = {}
        self.load: dict[int, int] = {}
        self.unsent: deque[_Request] = deque()
        self.in_flight: dict[int, _Request] = {}
        self.table_ref: Any = None
        self.table_at = 0.0  # when the table may be asked for again, if there is need
        self.refresh_at = 0.0  # when it is asked for without need: replicas may have come or gone
        self.reported_wait_s = 0.0
        self.send_at = 0.0
        self.backoff_s = 0.0
        self.progress_at = 0.0
        self.last_problem = "no answer"

    def __repr__(self) -> str:
        return f"teacher {self.address.name}"


class TeacherStream:
    """Scores batches of segments with every teacher, as far ahead as credits allow."""

    def __init__(self, teachers: Sequence[TeacherAddress], config: StreamConfig, vocab_size: int) -> None:
        """
        Args:
            teachers: in the order in which `join` gives their parts.
            config: credits and the deadline.
            vocab_size: of the target.
        """
        self._teachers = [_Teacher(address) for address in teachers]
        self._config = config
        self._vocab_size = vocab_size
        self._attempt_s = config.deadline_s / 4
        self._turn = os.getpid()  # ranks begin at different replicas
        self._away_s = 0.0
        self._is_cancelled = False
        self._next_number = 0
        self._awaited: dict[Any, tuple[_Teacher, _Request | None]] = {}
        self._wait_s = 0.0

    @property
    def wait_s(self) -> float:
        """Time spent doing nothing but waiting for teachers."""
        return self._wait_s

    def cancel(self) -> None:
        """From another thread: let `join` end instead of waiting for what is in flight."""
        self._is_cancelled = True

    def stats(self) -> dict[str, Traffic]:
        """Traffic by teacher, since the stream was made."""
        return {t.address.name: t.traffic for t in self._teachers}

    def join(self, batches: Iterable[list[Segment]]) -> Iterator[tuple[list[Segment], list[list[Aligned]]]]:
        """Yield each batch with, for each teacher, one `Aligned` a segment; in the order of `batches`.

        Batches are read ahead of what is yielded. An object of a batch's frames is best between 1 and 8 MiB.

        Raises:
            TeacherLostError: a teacher gave no answer for `deadline_s`, or only failures.
            FuseLLMError: a teacher refused a request for a reason that trying again cannot heal.
        """
        source = iter(batches)
        window: deque[_Batch] = deque()
        started = self._now()
        for teacher in self._teachers:
            teacher.progress_at = started
        try:
            while True:
                self._fill(window, source)
                if not window:
                    return
                head = window[0]
                while any(parts is None for parts in head.parts):
                    if self._is_cancelled:
                        return
                    self._receive(window)
                window.popleft()
                # Fill up before the caller goes away to train, so that teachers stay busy meanwhile.
                self._fill(window, source)
                left_at = time.monotonic()
                yield head.segments, [parts for parts in head.parts if parts is not None]
                self._away_s += time.monotonic() - left_at
        finally:
            self._forget()

    # ------------------------------------------------------------------------------------ sending

    def _now(self) -> float:
        """Seconds spent inside this stream: while the caller is away, no deadline comes nearer."""
        return time.monotonic() - self._away_s

    def _fill(self, window: deque[_Batch], source: Iterator[list[Segment]]) -> None:
        """Read and submit batches as far as credits allow."""
        while self._has_credit(window):
            segments = next(source, None)
            if segments is None:
                break
            window.append(self._submit(segments))
            self._send_unsent()
        self._send_unsent()

    def _has_credit(self, window: Sequence[_Batch]) -> bool:
        if not window:
            return True
        # The next batch's size is unknown before it is read; the last one's stands for it.
        tokens, num_bytes = window[-1].tokens, window[-1].num_bytes
        return (
            sum(b.tokens for b in window) + tokens <= self._config.in_flight_tokens
            and sum(b.num_bytes for b in window) + num_bytes <= self._config.in_flight_bytes
        )

    def _submit(self, segments: list[Segment]) -> _Batch:
        number = self._next_number
        self._next_number += 1
        num_positions = [s.num_positions for s in segments]
        tokens, positions = sum(len(s.ids) for s in segments), sum(num_positions)
        request = encode_request(segments)
        num_bytes = request.nbytes
        message = ray.put(request) if self._teachers else None
        for teacher in self._teachers:
            num_bytes += answer_bytes(positions, teacher.address.top_k, self._vocab_size)
            if not teacher.in_flight:
                teacher.progress_at = self._now()
            asked = _Request(number, message, num_positions, tokens)
            teacher.in_flight[number] = asked
            teacher.unsent.append(asked)
        return _Batch(number, segments, tokens, num_bytes, [None] * len(self._teachers))

    def _send_unsent(self) -> None:
        now = self._now()
        for teacher in self._teachers:
            lacks_replicas = bool(teacher.unsent) and not teacher.handles and now >= teacher.table_at
            if teacher.table_ref is None and (lacks_replicas or now >= teacher.refresh_at):
                self._ask_for_table(teacher)
            while teacher.unsent and teacher.handles and now >= teacher.send_at:
                self._send(teacher, teacher.unsent.popleft())

    def _send(self, teacher: _Teacher, request: _Request) -> None:
        """To the replica with the fewest of our tokens, an untried one if there is any."""
        self._turn += 1
        replicas = sorted(teacher.handles)
        turn = self._turn % len(replicas)
        replica = min(
            replicas[turn:] + replicas[:turn], key=lambda r: (r in request.tried, teacher.load.get(r, 0))
        )
        ref = teacher.handles[replica].score.remote(request.message)
        teacher.load[replica] = teacher.load.get(replica, 0) + request.tokens
        request.attempts[ref] = replica
        request.tried.add(replica)
        request.sent_at = self._now()
        self._awaited[ref] = (teacher, request)

    def _ask_for_table(self, teacher: _Teacher) -> None:
        waited_s = teacher.traffic.wait_s - teacher.reported_wait_s
        teacher.reported_wait_s = teacher.traffic.wait_s
        teacher.refresh_at = self._now() + REFRESH_S
        teacher.table_ref = teacher.address.pool.table.remote(waited_s)
        self._awaited[teacher.table_ref] = (teacher, None)

    # ------------------------------------------------------------------------------------ receiving

    def _receive(self, window: Sequence[_Batch]) -> None:
        """Wait until something happens, take what came, and send what can be sent."""
        started = time.monotonic()
        ready: list[Any] = []
        if self._awaited:
            awaited = list(self._awaited)
            ready, _ = ray.wait(awaited, num_returns=1, timeout=_POLL_S)
            if ready:
                ready, _ = ray.wait(awaited, num_returns=len(awaited), timeout=0)
        else:
            time.sleep(_BACKOFF_S[0])
        waited = time.monotonic() - started
        self._wait_s += waited
        for teacher, parts in zip(self._teachers, window[0].parts, strict=True):
            if parts is None:
                teacher.traffic.wait_s += waited
        for ref in ready:
            if ref not in self._awaited:
                continue  # the second answer to a request whose first came in the same moment
            teacher, request = self._awaited.pop(ref)
            if request is None:
                self._take_table(teacher, ref)
                continue
            answer = self._take_answer(teacher, request, ref)
            if answer is not None:
                batch = window[request.batch - window[0].number]
                batch.parts[self._teachers.index(teacher)] = answer
        self._check_time()
        self._send_unsent()

    def _take_answer(self, teacher: _Teacher, request: _Request, ref: Any) -> list[Aligned] | None:
        replica = request.attempts.pop(ref)
        teacher.load[replica] -= request.tokens
        try:
            answer = ray.get(ref)
            parts = decode_frame(
                answer,
                teacher=teacher.address.name,
                fingerprint=teacher.address.fingerprint,
                vocab_size=self._vocab_size,
                num_positions=request.num_positions,
            )
        except (RayError, FuseLLMError) as error:
            self._failed(teacher, request, replica, error)
            return None
        for late, other in request.attempts.items():  # whoever answers second is not listened to
            del self._awaited[late]
            teacher.load[other] -= request.tokens
        del teacher.in_flight[request.batch]
        teacher.progress_at = self._now()
        teacher.backoff_s = 0.0
        teacher.traffic.answers += 1
        teacher.traffic.positions += sum(request.num_positions)
        teacher.traffic.answer_bytes += answer.nbytes
        return parts

    def _failed(self, teacher: _Teacher, request: _Request, replica: int, error: Exception) -> None:
        """Decide what a failed attempt means: raise, or send again."""
        cause = cause_of(error)
        teacher.last_problem = f"replica {replica}: {summary_of(cause)}"
        if isinstance(cause, FrameError):
            request.frame_errors += 1
            if request.frame_errors > 1:
                raise FrameError(f"{teacher}, batch {request.batch}, replica {replica}: {cause}") from error
        elif _cannot_heal(cause):
            raise cause
        elif isinstance(error, RayTaskError):
            request.wrong_answers += 1
            if request.wrong_answers >= _MAX_WRONG_ANSWERS:
                self._lost(teacher, f"failed {request.wrong_answers} times at batch {request.batch}", error)
        if isinstance(error, RayActorError):
            # That replica is gone for now: the pool looks at it and says who is left.
            teacher.handles.pop(replica, None)
            if teacher.table_ref is None:
                teacher.table_ref = teacher.address.pool.report.remote(replica, summary_of(cause))
                self._awaited[teacher.table_ref] = (teacher, None)
        teacher.traffic.retries += 1
        if not request.attempts:  # else another attempt is still out
            teacher.unsent.appendleft(request)
            self._back_off(teacher, is_alone=request.tried.issuperset(teacher.handles))

    def _take_table(self, teacher: _Teacher, ref: Any) -> None:
        teacher.table_ref = None
        try:
            table = ray.get(ref)
        except (RayError, FuseLLMError) as error:
            cause = cause_of(error)
            if _cannot_heal(cause):
                raise cause from error
            teacher.last_problem = f"its pool: {summary_of(cause)}"
            teacher.table_at = self._now() + _BACKOFF_S[0]
            return
        teacher.handles = dict(table.handles)
        teacher.table_at = self._now() + _BACKOFF_S[0]

    def _back_off(self, teacher: _Teacher, is_alone: bool) -> None:
        if is_alone:
            teacher.backoff_s = min(max(2 * teacher.backoff_s, _BACKOFF_S[0]), _BACKOFF_S[1])
            teacher.send_at = self._now() + teacher.backoff_s

    def _check_time(self) -> None:
        """Send stragglers to another replica, and give up on a teacher past its deadline."""
        now = self._now()
        for teacher in self._teachers:
            if not teacher.in_flight:
                continue
            silent_s = now - teacher.progress_at
            if silent_s >= self._config.deadline_s:
                oldest = min(teacher.in_flight)
                self._lost(
                    teacher, f"no answer to batch {oldest} for {silent_s:.1f} s (stream.deadline_s)", None
                )
            for request in teacher.in_flight.values():
                quiet_s = now - max(request.sent_at, teacher.progress_at)
                if request.attempts and quiet_s >= self._attempt_s:
                    self._hedge(teacher, request)

    def _hedge(self, teacher: _Teacher, request: _Request) -> None:
        """Ask one more replica, an untried one; the attempts that are out stay welcome."""
        untried = set(teacher.handles) - request.tried
        late = next(iter(request.attempts.values()))
        teacher.last_problem = f"replica {late}: no answer within {self._attempt_s:.1f} s"
        request.sent_at = self._now()
        if teacher.table_ref is None:
            teacher.table_ref = teacher.address.pool.report.remote(late, teacher.last_problem)
            self._awaited[teacher.table_ref] = (teacher, None)
        if untried:
            teacher.traffic.retries += 1
            self._send(teacher, request)

    def _lost(self, teacher: _Teacher, what: str, cause: Exception | None) -> NoReturn:
        state = f"{len(teacher.handles)} replicas are up" if teacher.handles else "no replica is up"
        raise TeacherLostError(
            f"{teacher}: {what}; {state}; last problem: {teacher.last_problem}. Look at the "
            "teacher's log; give it more replicas, or raise stream.deadline_s if it is only slow"
        ) from cause

    def _forget(self) -> None:
        """Drop everything in flight; answers that still come are ignored."""
        self._awaited.clear()
        for teacher in self._teachers:
            teacher.unsent.clear()
            teacher.in_flight.clear()
            teacher.load.clear()
            teacher.table_ref = None


def _cannot_heal(error: Exception) -> bool:
    """Input that another replica would refuse as well; FrameErrors are counted apart."""
    return isinstance(error, FuseLLMError) and isinstance(error, ValueError)
