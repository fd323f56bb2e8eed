"""The replicas of one teacher: started in parallel, watched, replaced, and announced to ranks as a table.

    driver ── service ─────→ TeacherPool (one a teacher, in the actor of `supervisor`)
                                 ├─ tends ─→ TeacherReplica 0, 1, ...
    ranks  ── table, report ─────┘            ↑
       └───── score ──────────────────────────┘

A pool adds and removes actors; Ray restarts their processes, and its autoscaler brings the nodes. A replica
is in the table while it is loaded, answers heartbeats, and is what the first one was: by its identity, and by what it
says of a fixed passage.
"""

from __future__ import annotations

import asyncio
import collections
import itertools
import logging
import math
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayError

from fusellm_ray.config import AlignmentConfig, ModelConfig, TeacherConfig, TransformersEngine
from fusellm_ray.errors import AlignmentError, ClusterError, EngineError, FuseLLMError
from fusellm_ray.observe.metrics import PoolMetrics
from fusellm_ray.stream.address import REFRESH_S, HandleTable
from fusellm_ray.stream.failures import cannot_heal, cause_of, summary_of
from fusellm_ray.teachers.identity import answer_settings, differences
from fusellm_ray.teachers.replica import TeacherReplica
from fusellm_ray.teachers.report import Description, Heartbeat, PoolStatus, ReplicaStats
from fusellm_ray.teachers.scaling import Decision, Load, Scaler

logger = logging.getLogger(__name__)

_BEAT_S = 2.0
"""Between two looks at a replica."""
_DRAIN_S = 2 * REFRESH_S
"""How long a replica that is to go answers ranks that have not read the table since."""
_MAX_FAILED_STARTS = 3
"""In a row, by a teacher of which no replica has ever been up."""
_LONGEST_PAUSE_S = 15.0
"""Before a replica that did not start is tried again; the first pause is of a second, each next one twice as long."""
_LOOK_S = 1.0
"""How long a rank that reports a replica waits for the look at it: a dead one is known at once, a frozen one late."""
_REFUSED_S = 60.0
"""Between two starts of a replica that was not like the first: somebody may have restored the folder."""
_AGREEMENT_NATS = {"float32": 0.01}
"""How far replicas may differ on the self-test's passage, in the mean over its tokens; logprobs are float16 here ..."""
_ROUGH_AGREEMENT_NATS = 0.1
"""... and in any other dtype, or quantised, kernels of different devices round differently."""
_MAX_REQUESTS = 100_000
"""That a replica may hold: past Ray's own limit, 1 000, a heartbeat would wait behind them."""
_MAX_FAILURES = 4
"""Requests in a row that a replica may fail; a new process may heal what its engine does not know of itself."""
STOP_TIMEOUT_S = 30.0
"""Given to an engine to free its memory before its process is killed."""


@dataclass(slots=True)
class _Member:
    """One replica and what is known of it."""

    number: int
    handle: Any
    state: Literal["starting", "ready", "draining", "refused"] = "starting"
    incarnation: str = ""
    has_had_place: bool = False
    failed_starts: int = 0
    """In a row."""
    beat: Heartbeat | None = None
    """Its latest."""
    beat_at: float = 0.0
    tokens_per_s: float = 0.0
    """Positions answered for between its latest two."""
    counted: Heartbeat | None = None
    """Up to which its work went into a decision ..."""
    counted_at: float = 0.0
    """... and when it came."""
    problem: str = ""
    tending: asyncio.Task[None] | None = None
    look: asyncio.Task[None] | None = None

    @property
    def is_failing(self) -> bool:
        return self.failed_starts >= _MAX_FAILED_STARTS

    def note(self, beat: Heartbeat) -> None:
        now = time.monotonic()
        if self.beat is not None and self.beat.incarnation == beat.incarnation:
            self.tokens_per_s = (beat.positions - self.beat.positions) / (now - self.beat_at)
        self.beat, self.beat_at = beat, now


class TeacherPool:
    """Part of `supervisor.PoolSupervisor`; made where an event loop runs."""

    def __init__(
        self,
        teacher: TeacherConfig,
        target: ModelConfig,
        alignment: AlignmentConfig,
        hang_s: float,
        scale_s: float = 5.0,
        load_s: float = 3600.0,
        target_vocab_size: int | None = None,
    ) -> None:
        """
        Args:
            hang_s: a replica that holds requests and has answered none for so long is restarted.
            scale_s: between two looks at the load.
            load_s: a replica that has a place and is not loaded within so long is restarted.
            target_vocab_size: rows of the target's LM head; each replica looks it up where it is not given.
        """
        self._teacher = teacher
        self._target = target
        self._alignment = alignment
        self._target_vocab_size = target_vocab_size
        self._hang_s = hang_s
        self._load_s = load_s
        self._scale_s = scale_s
        self._description: Description | None = None
        self._failure: FuseLLMError | None = None
        self._members: dict[int, _Member] = {}
        self._numbers = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()
        self._scaler = Scaler(teacher.replicas)
        self._decisions: collections.deque[Decision] = collections.deque(maxlen=100)
        self._waited_s = 0.0
        self._num_restarts = 0
        self._metrics = PoolMetrics(teacher.name)
        self._keep(self._publish())
        for _ in range(teacher.replicas.min):
            self._add()
        if teacher.replicas.max > teacher.replicas.min:
            self._keep(self._scale())

    async def table(self, waited_s: float = 0.0) -> HandleTable:
        """The replicas that take requests now.

        Args:
            waited_s: how long the asking rank has waited for this teacher since it last asked.

        Raises:
            FuseLLMError: the teacher cannot work, whatever is restarted.
        """
        self._waited_s += waited_s
        self._raise_failure()
        ready = {m.number: m.handle for m in self._members.values() if m.state == "ready"}
        return HandleTable(ready)

    async def report(self, replica: int, reason: str, is_wrong: bool = False) -> HandleTable:
        """A rank had trouble with a replica: look at it, then answer with the table.

        Args:
            is_wrong: its answers cannot be read: it is restarted, whatever it says of itself.
        """
        member = self._members.get(replica)
        if member is not None and member.state == "ready":
            logger.warning("teacher %s, replica %d: reported: %s", self._teacher.name, replica, reason)
            if is_wrong:
                self._restart(member, reason, is_stuck=True)
            else:
                if member.look is None or member.look.done():
                    member.look = self._keep(self._look(member))
                await asyncio.wait({member.look}, timeout=_LOOK_S)
        return await self.table()

    async def status(self) -> PoolStatus:
        self._raise_failure()
        ready = [m for m in self._members.values() if m.state == "ready"]
        return PoolStatus(
            name=self._teacher.name,
            wanted=self._teacher.replicas.min,
            most=self._teacher.replicas.max,
            ready=len(ready),
            tokens_per_s=sum(m.tokens_per_s for m in ready),
            cache_hit_share=_share(
                sum(m.beat.cache_hits for m in ready if m.beat),
                sum(m.beat.cache_misses for m in ready if m.beat),
            ),
            settings=answer_settings(self._teacher, self._alignment),
            asks=self._teacher.asks,
            labels=self._teacher.resources.labels,
            hang_s=self._hang_s,
            problems=tuple(f"replica {m.number}: {m.problem}" for m in self._members.values() if m.problem),
            description=self._description,
            decisions=tuple(self._decisions),
            queued_tokens=self._queued_tokens(),
            restarts=self._num_restarts,
        )

    async def stats(self) -> dict[int, ReplicaStats]:
        """Of each replica that answers."""
        ready = [m for m in self._members.values() if m.state == "ready"]
        answers = await asyncio.gather(
            *(_within(_BEAT_S, m.handle.stats.remote()) for m in ready),
            return_exceptions=True,
        )
        return {m.number: a for m, a in zip(ready, answers, strict=True) if isinstance(a, ReplicaStats)}

    async def stop(self) -> None:
        """End all replicas."""
        for task in self._tasks:
            task.cancel()
        members = list(self._members.values())
        self._members.clear()
        await asyncio.gather(*(self._end(member) for member in members))

    def _raise_failure(self) -> None:
        """Say why the teacher cannot work, once there is no replica left that could."""
        if self._failure is not None and not any(self._may_work(m) for m in self._members.values()):
            raise self._failure

    def _may_work(self, member: _Member) -> bool:
        """Of a teacher that was never up, nobody waits for what fails to start, or for a place for one more."""
        was_up = self._description is not None
        return member.state != "refused" and (was_up or (member.has_had_place and not member.is_failing))

    # ------------------------------------------------------------------------------------ tending

    def _add(self) -> None:
        number = next(self._numbers)
        member = _Member(number, self._spawn(number))
        self._members[member.number] = member
        member.tending = self._keep(self._tend(member))

    def _keep(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._over)
        return task

    def _over(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            logger.error("teacher %s: its pool has an error", self._teacher.name, exc_info=error)

    def _spawn(self, number: int) -> Any:
        resources = self._teacher.resources
        engine = self._teacher.engine
        threads = str(engine.threads if isinstance(engine, TransformersEngine) else 1)
        return (
            ray.remote(TeacherReplica)
            .options(
                num_cpus=resources.num_cpus,
                num_gpus=resources.num_gpus,
                resources=resources.custom,
                label_selector=resources.labels or None,
                max_concurrency=_MAX_REQUESTS,
                max_restarts=-1,
                max_task_retries=0,  # ranks send again themselves, to whichever replica is up
                runtime_env={"env_vars": {"OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads}},
            )
            .remote(self._teacher, self._target, self._alignment, self._target_vocab_size, number=number)
        )

    async def _tend(self, member: _Member) -> None:
        """Bring a replica up, watch it, and bring it up again, for as long as the pool lives."""
        while True:
            try:
                description = await self._describe(member)
            except (RayError, FuseLLMError) as error:
                member.failed_starts += 1
                member.problem = summary_of(cause_of(error))
                logger.warning(
                    "teacher %s, replica %d does not start: %s",
                    self._teacher.name,
                    member.number,
                    member.problem,
                )
                if self._description is None and self._is_final(member, error):
                    return
                await asyncio.sleep(min(2.0 ** min(member.failed_starts - 1, 10), _LONGEST_PAUSE_S))
                if not isinstance(error, RayActorError):
                    ray.kill(
                        member.handle, no_restart=False
                    )  # a failed load is cached; load in a new process
                elif isinstance(error, ActorDiedError):
                    member.handle = self._spawn(member.number)
                continue
            member.failed_starts = 0
            if not self._accepts(member, description):
                await asyncio.sleep(_REFUSED_S)
                member.handle = self._spawn(member.number)
                continue
            member.state, member.incarnation, member.problem = "ready", description.incarnation, ""
            while member.state == "ready":
                await asyncio.sleep(_BEAT_S)
                if member.state == "ready":
                    await self._look(member)
            if member.state == "draining":
                await self._drain(member)
                return

    async def _describe(self, member: _Member) -> Description:
        """Wait for as long as it takes to get a place, then for `load_s`."""
        await member.handle.ready.remote()
        member.has_had_place = True
        try:
            return await _within(self._load_s, member.handle.describe.remote())
        except TimeoutError:
            raise EngineError(f"not loaded within {self._load_s:.0f} s (run.start_timeout_s)") from None

    def _is_final(self, member: _Member, error: Exception) -> bool:
        """Whether a teacher that was never up will never be; then `status` and `table` raise why.

        They also do while replicas only fail to start, which is tried on: it may pass.
        """
        cause = cause_of(error)
        if cannot_heal(cause):
            self._failure = cause
            for each in self._members.values():
                each.state = "refused"
            return True
        if member.is_failing:
            self._failure = ClusterError(
                f"teacher {self._teacher.name}: {member.failed_starts} attempts to start a replica failed, "
                f"the last with: {error}"
            )
        return False

    def _accepts(self, member: _Member, description: Description) -> bool:
        """Whether a replica is what the first one was, and gives its answers."""
        if self._description is None:
            self._description = description
        problem = self._disagreement(self._description, description)
        if problem is None:
            self._failure = None
            return True
        self._failure = AlignmentError(
            f"teacher {self._teacher.name}, replica {member.number} on {description.node}: {problem}, and the replica "
            f"is taken back within {_REFUSED_S:.0f} s, or start anew"
        )
        logger.error("%s", self._failure)
        member.state, member.problem = "refused", str(self._failure)
        ray.kill(member.handle)
        return False

    def _disagreement(self, first: Description, other: Description) -> str | None:
        """How a replica differs from the first one, and what to do about it."""
        if other.fingerprint != first.fingerprint:
            lines = differences(
                other.identity, first.identity, by=f"the first replica, on {first.node}, with"
            )
            return (
                "is not what the first replica was:\n  " + "\n  ".join(lines) + "\n"
                "a folder of the model, a tokenizer or an adapter was changed, or a hub branch has moved; restore it"
            )
        pairs = zip(other.passage_logprobs, first.passage_logprobs, strict=True)
        known = [(ours, its) for ours, its in pairs if math.isfinite(ours) or math.isfinite(its)]
        count = max(1, len(known))
        difference = sum(abs(ours - its) for ours, its in known) / count
        limit = _AGREEMENT_NATS.get(getattr(self._teacher.engine, "dtype", ""), _ROUGH_AGREEMENT_NATS)
        if difference <= limit:
            return None
        mean, wanted = sum(ours for ours, _ in known) / count, sum(its for _, its in known) / count
        return (
            f"gives the self-test's passage {mean:.3f} nats a token, the first replica, on {first.node}, {wanted:.3f}; "
            f"token by token they differ by {difference:.3f}, limit {limit}: the same weights compute something else "
            "there; look at its device and library versions, let that node not serve (resources.labels)"
        )

    async def _look(self, member: _Member) -> None:
        """Ask a ready replica for its heartbeat; out of the table with it if something is wrong."""
        is_stuck = False
        try:
            beat = await _within(self._hang_s, member.handle.heartbeat.remote())
        except TimeoutError:
            problem, is_stuck = f"no heartbeat for {self._hang_s:.0f} s", True
        except RayError as error:
            problem = summary_of(cause_of(error))
        else:
            member.note(beat)
            if beat.incarnation != member.incarnation:
                problem = "its process was restarted"
            elif beat.problem is not None:
                problem, is_stuck = beat.problem, True
            elif beat.stalled_s > self._hang_s:
                problem, is_stuck = f"holds requests and has answered none for {beat.stalled_s:.0f} s", True
            elif beat.failures >= _MAX_FAILURES:
                problem, is_stuck = f"failed the last {beat.failures} requests", True
            else:
                return
        if member.state == "ready":
            self._restart(member, problem, is_stuck=is_stuck)

    def _restart(self, member: _Member, problem: str, *, is_stuck: bool) -> None:
        """Out of the table; `_tend` brings it up again. Its process is ended where it is still there."""
        logger.warning(
            "teacher %s, replica %d: %s; it is restarted", self._teacher.name, member.number, problem
        )
        member.state, member.problem = "starting", problem
        self._num_restarts += 1
        if is_stuck:
            ray.kill(member.handle, no_restart=False)

    # ------------------------------------------------------------------------------------ scaling

    async def _scale(self) -> None:
        measured_at = time.monotonic()
        while True:
            await asyncio.sleep(self._scale_s)
            now = time.monotonic()
            load = self._measure(now - measured_at)
            measured_at = now
            decision = self._scaler.decide(load)
            current = load.replicas
            if decision.replicas == current:
                continue
            logger.warning(
                "teacher %s: %d → %d replicas: %s",
                self._teacher.name,
                current,
                decision.replicas,
                decision.reason,
            )
            self._decisions.append(decision)
            for _ in range(decision.replicas - current):
                self._add()
            if decision.replicas < current:
                self._remove_one()

    def _remove_one(self) -> None:
        """The latest that was refused or is not up yet, which nobody waits for; else the latest."""
        by_state: dict[str, list[_Member]] = {}
        for member in self._members.values():
            by_state.setdefault(member.state, []).append(member)
        if unready := by_state.get("refused") or by_state.get("starting"):
            member = self._members.pop(unready[-1].number)
            if member.tending is not None:
                member.tending.cancel()
            ray.kill(member.handle)
        else:
            by_state["ready"][-1].state = "draining"

    def _measure(self, seconds: float) -> Load:
        """The load since the last call."""
        ready = [m for m in self._members.values() if m.state == "ready"]
        busy_s, watched_s, positions, queued = 0.0, 0.0, 0, 0
        for member in ready:
            before, beat = member.counted, member.beat
            if beat is None:
                continue
            if before is not None and before.incarnation == beat.incarnation:
                busy_s += beat.engine_s - before.engine_s
                watched_s += member.beat_at - member.counted_at
                positions += beat.positions - before.positions
            queued += beat.queued_tokens
            member.counted, member.counted_at = beat, member.beat_at
        waited_s, self._waited_s = self._waited_s, 0.0
        return Load(
            ready=len(ready),
            starting=sum(m.state == "starting" for m in self._members.values()),
            refused=sum(m.state == "refused" for m in self._members.values()),
            busy=min(1.0, busy_s / watched_s) if watched_s else 0.0,
            wait=waited_s / seconds,
            queued_tokens=queued,
            tokens_per_s=positions / busy_s if busy_s else 0.0,
        )

    async def _publish(self) -> None:
        """Tell Prometheus how the pool stands."""
        while True:
            self._metrics.show(
                ready=sum(m.state == "ready" for m in self._members.values()),
                starting=sum(m.state == "starting" for m in self._members.values()),
                queued_tokens=self._queued_tokens(),
                restarts=self._num_restarts,
            )
            await asyncio.sleep(_BEAT_S)

    def _queued_tokens(self) -> int:
        return sum(m.beat.queued_tokens for m in self._members.values() if m.beat and m.state == "ready")

    async def _drain(self, member: _Member) -> None:
        """End a replica once it has answered what it was asked."""
        give_up = time.monotonic() + self._hang_s
        await asyncio.sleep(_DRAIN_S)
        try:
            while (left_s := give_up - time.monotonic()) > 0:
                if not (await _within(left_s, member.handle.heartbeat.remote())).queued_tokens:
                    break
                await asyncio.sleep(_BEAT_S)
        except (RayError, TimeoutError) as error:
            reason = (
                summary_of(cause_of(error)) if isinstance(error, RayError) else "hangs while it is drained"
            )
            logger.info("teacher %s, replica %d: %s", self._teacher.name, member.number, reason)
        await self._end(member)
        self._members.pop(member.number, None)

    async def _end(self, member: _Member) -> None:
        try:
            is_loaded = member.state in ("ready", "draining")
            await _within(STOP_TIMEOUT_S if is_loaded else 1, member.handle.stop.remote())
        except (RayError, FuseLLMError, TimeoutError) as error:
            logger.info("teacher %s, replica %d: stopped hard (%s)", self._teacher.name, member.number, error)
        ray.kill(member.handle)


def _share(part: int, rest: int) -> float:
    return part / max(1, part + rest)


async def _within(seconds: float, ref: Any) -> Any:
    # asyncio.wait_for swallows a cancellation that comes together with the answer (before Python 3.12).
    async with asyncio.timeout(seconds):
        return await ref
