"""A rank's side of the stream: segments go to every teacher at once, joined answers come back in order.

    batches ─→ credits ─┬→ teacher a, least-loaded replica ─→ frame ─┐
                        └→ teacher b, ...                  ─→ frame ─┴→ join ─→ (batch, parts by teacher)

Everything happens on the caller's thread, inside `join`; while the caller is away, replicas go on with what
is in flight. Scoring is pure, so whatever fails is sent again; the first answer counts, later ones do not.

Under `on_teacher_loss: drop` a teacher that is lost has no part in what is joined. The oldest request that it
owes stays out, sent again like any other; when that is answered, the teacher is back.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from fusellm_ray.alignment.project import Aligned
from fusellm_ray.config import StreamConfig
from fusellm_ray.corpus.rows import Segment
from fusellm_ray.errors import FrameError, FuseLLMError, TeacherLostError
from fusellm_ray.stream.address import REFRESH_S, TeacherAddress
from fusellm_ray.stream.failures import cannot_heal, cause_of, summary_of
from fusellm_ray.stream.frame import answer_bytes, decode_frame, encode_request
from fusellm_ray.stream.requests import Batch, Request, TeacherQueue, Traffic

logger = logging.getLogger(__name__)

_POLL_S = 0.5
"""Longest sleep between looks at deadlines and unsent requests."""
_INLINE_BYTES = 1 << 16
"""Requests up to this size travel inside each call, as Ray lets them; larger ones are stored once for all teachers."""
_BACKOFF_S = (0.2, 5.0)
"""First and longest pause before a failed request is sent again."""
_MAX_WRONG_ANSWERS = 8
"""Errors one request may meet inside replicas, for a quarter of the deadline at least, before its teacher counts as
lost; crashes do not count."""
_FRAME_ADVICE = (
    "two processes answered so; install the same fusellm_ray on every node, and see the teacher's log"
)
_SLOW_S, _SLOW = 2.0, 4.0
"""A replica that has been silent for so many seconds, and for so many times what answers usually take, is a
straggler: its request goes to another one as well."""


class TeacherStream:
    """Scores batches of segments with every teacher, as far ahead as credits allow."""

    def __init__(
        self, teachers: Sequence[TeacherAddress], config: StreamConfig, vocab_size: int, rank: int = 0
    ) -> None:
        """
        Args:
            teachers: in the order in which `join` gives their parts.
            config: credits and the deadline.
            vocab_size: of the target.
            rank: ranks, which are in step with each other, begin at different replicas.
        """
        self._teachers = [TeacherQueue(address) for address in teachers]
        self._config = config
        self._vocab_size = vocab_size
        self._patience_s = config.deadline_s if config.on_teacher_loss == "wait" else config.loss_deadline_s
        self._deadline_name = "deadline_s" if config.on_teacher_loss == "wait" else "loss_deadline_s"
        self._drops = config.on_teacher_loss == "drop"
        self._attempt_s = self._patience_s / 4
        self._rank = rank
        self._away_s = 0.0
        self._is_cancelled = False
        self._window: deque[Batch] = deque()  # what is read and not joined yet
        self._next_number = 0
        self._awaited: dict[Any, tuple[TeacherQueue, Request | None]] = {}
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

    def join(
        self, batches: Iterable[list[Segment]]
    ) -> Iterator[tuple[list[Segment], list[list[Aligned] | None]]]:
        """Yield each batch with, for each teacher, one `Aligned` a segment; in the order of `batches`.

        Batches are read ahead of what is yielded. An object of a batch's frames is best between 1 and 8 MiB.
        Under `on_teacher_loss: drop` a lost teacher's place holds None.

        Raises:
            TeacherLostError: a teacher gave no answer in time, or only failures, and is not to be dropped.
            FuseLLMError: a teacher refused a request for a reason that trying again cannot heal.
        """
        source = iter(batches)
        window = self._window = deque()
        started = self._now()
        for teacher in self._teachers:
            teacher.progress_at = started
        try:
            while True:
                self._fill(source)
                if not window:
                    return
                head = window[0]
                while head.pending:
                    if self._is_cancelled:
                        return
                    self._receive()
                if any(teacher.is_lost for teacher in self._teachers):
                    self._receive(timeout_s=0.0)  # nothing may be left to wait for: look all the same
                window.popleft()
                # Fill up before the caller goes away to train, so that teachers stay busy meanwhile.
                self._fill(source)
                left_at = time.monotonic()
                yield head.segments, head.parts
                self._away_s += time.monotonic() - left_at
        finally:
            self._forget()

    # ------------------------------------------------------------------------------------ sending

    def _now(self) -> float:
        """Seconds spent inside this stream: while the caller is away, no deadline comes nearer."""
        return time.monotonic() - self._away_s

    def _fill(self, source: Iterator[list[Segment]]) -> None:
        """Read and submit batches as far as credits allow."""
        while self._has_credit():
            segments = next(source, None)
            if segments is None:
                break
            self._window.append(self._submit(segments))
            self._send_unsent()
        self._send_unsent()

    def _has_credit(self) -> bool:
        window = self._window
        if not window:
            return True
        # The next batch's size is unknown before it is read; the last one's stands for it.
        tokens, num_bytes = window[-1].tokens, window[-1].num_bytes
        return (
            sum(b.tokens for b in window) + tokens <= self._config.in_flight_tokens
            and sum(b.num_bytes for b in window) + num_bytes <= self._config.in_flight_bytes
        )

    def _submit(self, segments: list[Segment]) -> Batch:
        number = self._next_number
        self._next_number += 1
        num_positions = [s.num_positions for s in segments]
        tokens, positions = sum(len(s.ids) for s in segments), sum(num_positions)
        request = encode_request(segments)
        num_bytes = request.nbytes
        is_shared = any(teacher.address.is_shared for teacher in self._teachers)
        digest = hashlib.blake2b(request.data, digest_size=8).digest() if is_shared else b""
        message = request if num_bytes <= _INLINE_BYTES else ray.put(request)
        for teacher in self._teachers:
            if teacher.is_lost:
                teacher.traffic.dropped += positions
                if teacher.in_flight:
                    continue
            num_bytes += answer_bytes(positions, teacher.address.top_k, self._vocab_size)
            if not teacher.in_flight:
                teacher.progress_at = self._now()
            asked = Request(number, message, digest, num_positions, tokens)
            teacher.in_flight[number] = asked
            teacher.unsent.append(asked)
        pending = {k for k, teacher in enumerate(self._teachers) if not teacher.is_lost}
        return Batch(number, segments, tokens, num_bytes, [None] * len(self._teachers), pending)

    def _send_unsent(self) -> None:
        now = time.monotonic()
        for teacher in self._teachers:
            lacks_replicas = bool(teacher.unsent) and not teacher.handles and now >= teacher.table_at
            if teacher.table_ref is None and (lacks_replicas or now >= teacher.refresh_at):
                self._ask_for_table(teacher)
            while teacher.unsent and teacher.handles and now >= teacher.send_at:
                self._send(teacher, teacher.unsent.popleft())

    def _send(self, teacher: TeacherQueue, request: Request) -> None:
        """To an untried replica if there is any, and to a straggler last: to the one that this text always goes to
        if the teacher is shared, unless that has more than a request more of ours than another; then to the one
        that has the fewest tokens of ours, by turns."""
        replicas = sorted(teacher.handles)
        turn = (self._rank + request.batch) % len(replicas)
        loads = {r: teacher.load.get(r, 0) for r in replicas}
        if teacher.address.is_shared:
            # Highest random weight: replicas that come or go move only their own share of the texts.
            own = max(
                replicas, key=lambda r: hashlib.blake2b(request.digest, key=r.to_bytes(4, "little")).digest()
            )
            if loads[own] <= min(loads.values()) + request.tokens:
                loads[own] = -1
        stragglers = {replica for replica, _ in teacher.late.values()}
        replica = min(
            replicas[turn:] + replicas[:turn],
            key=lambda r: (r in request.tried, r in stragglers, loads[r]),
        )
        ref = teacher.handles[replica].score.remote(request.message, teacher.address.run, request.batch)
        teacher.load[replica] = teacher.load.get(replica, 0) + request.tokens
        request.attempts[ref] = replica
        request.tried.add(replica)
        request.sent_at, request.asked_at = self._now(), time.monotonic()
        self._awaited[ref] = (teacher, request)

    def _ask_for_table(self, teacher: TeacherQueue) -> None:
        waited_s = teacher.traffic.wait_s - teacher.reported_wait_s
        teacher.reported_wait_s = teacher.traffic.wait_s
        teacher.refresh_at = time.monotonic() + REFRESH_S
        teacher.table_ref = teacher.address.pool.table.remote(teacher.address.name, waited_s)
        self._awaited[teacher.table_ref] = (teacher, None)

    # ------------------------------------------------------------------------------------ receiving

    def _receive(self, timeout_s: float = _POLL_S) -> None:
        """Wait until something happens, take what came, and send what can be sent."""
        started = time.monotonic()
        ready: list[Any] = []
        came_now = False
        if awaited := list(self._awaited):
            ready, _ = ray.wait(awaited, num_returns=len(awaited), timeout=0)
            if came_now := not ready:
                ready, _ = ray.wait(awaited, num_returns=1, timeout=timeout_s)
        else:
            time.sleep(min(timeout_s, _BACKOFF_S[0]))
        waited = time.monotonic() - started
        self._wait_s += waited
        for k in self._window[0].pending:
            self._teachers[k].traffic.wait_s += waited
        for ref in ready:
            teacher, request = self._awaited.pop(ref)
            if ref in teacher.late:
                replica, tokens = teacher.late.pop(ref)
                teacher.load[replica] -= tokens
                teacher.heard_at[replica] = self._now()
                continue
            if request is None:
                self._take_table(teacher, ref)
                continue
            answer = self._take_answer(teacher, request, ref, came_now=came_now)
            if answer is None:
                continue
            if teacher.is_lost:
                teacher.is_lost = False
                logger.warning("%s answers again", teacher)
                continue
            batch = self._window[request.batch - self._window[0].number]
            batch.parts[k := self._teachers.index(teacher)] = answer
            batch.pending.remove(k)
        self._check_time()
        self._send_unsent()

    def _take_answer(
        self, teacher: TeacherQueue, request: Request, ref: Any, *, came_now: bool
    ) -> list[Aligned] | None:
        replica = request.attempts.pop(ref)
        teacher.load[replica] -= request.tokens
        try:
            answer = ray.get(ref)
            parts = decode_frame(
                answer,
                teacher=teacher.address.name,
                fingerprint=teacher.address.fingerprint,
                vocab_size=self._vocab_size,
                top_k=teacher.address.top_k,
                num_positions=request.num_positions,
            )
        except (RayError, FuseLLMError) as error:
            self._failed(teacher, request, replica, error)
            return None
        self._ignore(teacher, request)
        del teacher.in_flight[request.batch]
        took_s = time.monotonic() - request.asked_at
        if not teacher.answer_s:
            teacher.answer_s = took_s
        elif came_now:
            teacher.answer_s = 0.9 * teacher.answer_s + 0.1 * took_s
        else:  # it may have lain here while the caller was away
            teacher.answer_s = min(teacher.answer_s, took_s)
        teacher.progress_at = teacher.heard_at[replica] = self._now()
        teacher.backoff_s = 0.0
        teacher.traffic.answers += 1
        teacher.traffic.positions += sum(request.num_positions)
        teacher.traffic.answer_bytes += answer.nbytes
        return parts

    def _failed(self, teacher: TeacherQueue, request: Request, replica: int, error: Exception) -> None:
        """Decide what a failed attempt means: raise, do without the teacher, or send again."""
        cause = cause_of(error)
        teacher.last_problem = f"replica {replica}: {summary_of(cause)}"
        is_wrong = isinstance(cause, FrameError)
        if is_wrong:
            request.frame_errors += 1
            if request.frame_errors > 1:  # of two processes: the first was restarted
                where = f"{teacher}, batch {request.batch}, replica {replica}"
                self._lost(teacher, "sends wrong frames", FrameError(f"{where}: {cause}; {_FRAME_ADVICE}"))
        elif cannot_heal(cause):  # FrameErrors are counted, above
            raise cause
        elif isinstance(error, RayTaskError):
            request.wrong_since = request.wrong_since or self._now()
            request.wrong_answers += 1
            failing_s = self._now() - request.wrong_since
            if request.wrong_answers >= _MAX_WRONG_ANSWERS and failing_s >= self._attempt_s:
                what = f"failed {request.wrong_answers} times in {failing_s:.0f} s at batch {request.batch}"
                self._lost(teacher, what, error)
        if is_wrong or isinstance(error, RayActorError):
            # That process is gone: the pool looks at it and says who is left. The next of this number is another.
            teacher.handles.pop(replica, None)
            request.tried.discard(replica)
            self._report(teacher, replica, is_wrong=is_wrong)
        teacher.traffic.retries += 1
        if not request.attempts and request.batch in teacher.in_flight:  # else another attempt is still out
            teacher.unsent.appendleft(request)
            self._back_off(teacher, is_alone=request.tried.issuperset(teacher.handles))

    def _take_table(self, teacher: TeacherQueue, ref: Any) -> None:
        if ref != teacher.table_ref:
            return  # an older one
        teacher.table_ref = None
        try:
            table = ray.get(ref)
        except (RayError, FuseLLMError) as error:
            cause = cause_of(error)
            teacher.last_problem = f"its pool: {summary_of(cause)}"
            teacher.table_at = time.monotonic() + (REFRESH_S if teacher.is_lost else _BACKOFF_S[0])
            if cannot_heal(cause):
                self._lost(teacher, "no replica can work", cause)
            return
        teacher.handles = dict(table.handles)
        teacher.table_at = time.monotonic() + _BACKOFF_S[0]

    def _back_off(self, teacher: TeacherQueue, is_alone: bool) -> None:
        if is_alone:
            teacher.backoff_s = min(max(2 * teacher.backoff_s, _BACKOFF_S[0]), _BACKOFF_S[1])
            teacher.send_at = time.monotonic() + teacher.backoff_s

    def _check_time(self) -> None:
        """Send stragglers to another replica, and give up on a teacher past its deadline."""
        now = self._now()
        for teacher in self._teachers:
            if not teacher.in_flight:
                continue
            silent_s = now - teacher.progress_at
            if silent_s >= self._patience_s and not teacher.is_lost:
                what = f"no answer to batch {min(teacher.in_flight)} for {silent_s:.1f} s"
                self._lost(teacher, f"{what} (stream.{self._deadline_name})", None)
            slow_s = max(_SLOW_S, _SLOW * teacher.answer_s) if teacher.answer_s else self._attempt_s
            for request in teacher.in_flight.values():
                if not request.attempts:
                    continue
                latest = max(teacher.heard_at.get(r, 0.0) for r in request.attempts.values())
                silent_s = now - max(request.sent_at, latest)
                if silent_s >= min(slow_s, self._attempt_s):
                    self._hedge(teacher, request, silent_s)

    def _hedge(self, teacher: TeacherQueue, request: Request, silent_s: float) -> None:
        """Ask one more replica, an untried one; the attempts that are out stay welcome."""
        untried = set(teacher.handles) - request.tried
        late = next(iter(request.attempts.values()))
        teacher.last_problem = f"replica {late}: no answer within {silent_s:.1f} s"
        request.sent_at = self._now()
        self._report(teacher, late)
        if untried:
            teacher.traffic.retries += 1
            self._send(teacher, request)

    def _report(self, teacher: TeacherQueue, replica: int, *, is_wrong: bool = False) -> None:
        """Tell the pool of `last_problem`, unless it is being asked for its table anyway; the answer is that."""
        if teacher.table_ref is None or is_wrong:
            ref = teacher.address.pool.report.remote(
                teacher.address.name, replica, teacher.last_problem, is_wrong
            )
            teacher.table_ref = ref
            self._awaited[ref] = (teacher, None)

    def _ignore(self, teacher: TeacherQueue, request: Request) -> None:
        """Attempts that are still out are not listened to any more; until they end, their replicas are loaded."""
        for late, replica in request.attempts.items():
            teacher.late[late] = (replica, request.tokens)

    def _lost(self, teacher: TeacherQueue, what: str, cause: Exception | None) -> None:
        """Go on without the teacher, or end with `cause` where it is an error of ours that says all."""
        if teacher.is_lost:
            return
        if self._drops:
            logger.error("%s is lost, going on without it: %s; %s", teacher, what, teacher.last_problem)
            self._drop(teacher)
            return
        if cause is not None and cannot_heal(cause):
            raise cause
        state = f"{len(teacher.handles)} replicas are up" if teacher.handles else "no replica is up"
        raise TeacherLostError(
            f"{teacher}: {what}; {state}; last problem: {teacher.last_problem}. Look at the teacher's log; "
            f"give it more replicas, or raise stream.{self._deadline_name} if it is only slow"
        ) from cause

    def _drop(self, teacher: TeacherQueue) -> None:
        """Wait for none of its answers; only its oldest request stays out, to see when it is back."""
        teacher.is_lost = True
        index = self._teachers.index(teacher)
        for batch in self._window:
            if index in batch.pending:
                batch.pending.remove(index)
                teacher.traffic.dropped += sum(s.num_positions for s in batch.segments)
        probe = min(teacher.in_flight, default=None)
        for number in [number for number in teacher.in_flight if number != probe]:
            self._ignore(teacher, teacher.in_flight.pop(number))
        teacher.unsent = deque(request for request in teacher.unsent if request.batch == probe)

    def _forget(self) -> None:
        """Drop everything in flight; answers that still come are ignored."""
        self._awaited.clear()
        for teacher in self._teachers:
            teacher.unsent.clear()
            teacher.in_flight.clear()
            teacher.load.clear()
            teacher.late.clear()
            teacher.table_ref = None
