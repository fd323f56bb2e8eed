"""The replicas of one teacher: started in parallel, watched, replaced, and announced to ranks as a table.

    driver ── start_pools ─→ TeacherPool (one small actor a teacher)
                                 ├─ tends ─→ TeacherReplica 0, 1, ...
    ranks  ── table, report ─────┘            ↑
       └───── score ──────────────────────────┘

A pool adds and removes actors; Ray restarts their processes, and its autoscaler brings the nodes. A replica
is in the table while it is loaded, answers heartbeats, and has the fingerprint that the first one announced.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError

from fusellm_ray.config import AlignmentConfig, Config, ModelConfig, TeacherConfig, TransformersEngine
from fusellm_ray.errors import AlignmentError, ClusterError, FuseLLMError
from fusellm_ray.stream.client import HandleTable
from fusellm_ray.teachers.replica import Description, Heartbeat, ReplicaStats, TeacherReplica

logger = logging.getLogger(__name__)

_BEAT_S = 1.0
"""Between two looks at a replica."""
_MAX_FAILED_STARTS = 3
"""In a row, by a teacher of which no replica has ever been up."""
_STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """How a pool stands."""

    name: str
    wanted: int
    ready: int
    asks: dict[str, float]
    """Resources of one replica."""
    problems: tuple[str, ...]
    """What keeps replicas from being up, as far as known."""
    description: Description | None
    """Of the first replica that was ready."""


@dataclass(slots=True)
class _Member:
    """One replica and what is known of it."""

    number: int
    handle: Any
    state: Literal["starting", "ready", "refused"] = "starting"
    incarnation: str = ""
    beat: Heartbeat | None = None
    problem: str = ""


class TeacherPool:
    """Async Ray actor, one a teacher."""

    def __init__(
        self, teacher: TeacherConfig, target: ModelConfig, alignment: AlignmentConfig, hang_s: float
    ) -> None:
        """
        Args:
            hang_s: a replica that holds requests and has answered none for so long is restarted.
        """
        self._teacher = teacher
        self._target = target
        self._alignment = alignment
        self._hang_s = hang_s
        # A restarted pool must not repeat a version of its former self.
        self._version = time.time_ns()
        self._description: Description | None = None
        self._failure: FuseLLMError | None = None
        self._members: dict[int, _Member] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        for number in range(teacher.replicas.min):
            self._add(number)

    def __repr__(self) -> str:
        return f"pool {self._teacher.name}"

    async def table(self) -> HandleTable:
        """The replicas that take requests now.

        Raises:
            FuseLLMError: the teacher cannot work, whatever is restarted.
        """
        ready = {m.number: m.handle for m in self._members.values() if m.state == "ready"}
        if self._failure is not None and not ready:
            raise self._failure
        return HandleTable(self._version, ready)

    async def report(self, replica: int, reason: str) -> HandleTable:
        """A rank had trouble with a replica: look at it, then answer with the table."""
        member = self._members.get(replica)
        if member is not None and member.state == "ready":
            logger.warning("teacher %s, replica %d: reported: %s", self._teacher.name, replica, reason)
            await self._look(member)
        return await self.table()

    async def status(self) -> PoolStatus:
        if self._failure is not None and not any(m.state != "refused" for m in self._members.values()):
            raise self._failure
        resources = self._teacher.resources
        return PoolStatus(
            name=self._teacher.name,
            wanted=self._teacher.replicas.min,
            ready=sum(m.state == "ready" for m in self._members.values()),
            asks={"CPU": resources.num_cpus, "GPU": resources.num_gpus} | resources.custom,
            problems=tuple(f"replica {m.number}: {m.problem}" for m in self._members.values() if m.problem),
            description=self._description,
        )

    async def stats(self) -> dict[int, ReplicaStats]:
        """Of each replica that answers."""
        ready = [m for m in self._members.values() if m.state == "ready"]
        answers = await asyncio.gather(
            *(asyncio.wait_for(_await(m.handle.stats.remote()), _BEAT_S) for m in ready),
            return_exceptions=True,
        )
        return {m.number: a for m, a in zip(ready, answers, strict=True) if isinstance(a, ReplicaStats)}

    async def stop(self) -> None:
        """End all replicas."""
        for task in self._tasks:
            task.cancel()
        members = list(self._members.values())
        self._members.clear()
        self._version += 1
        await asyncio.gather(*(self._end(member) for member in members))

    # ------------------------------------------------------------------------------------ tending

    def _add(self, number: int) -> None:
        member = _Member(number, self._spawn())
        self._members[number] = member
        task = asyncio.get_running_loop().create_task(self._tend(member))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _spawn(self) -> Any:
        resources = self._teacher.resources
        engine = self._teacher.engine
        threads = str(engine.threads if isinstance(engine, TransformersEngine) else 1)
        return (
            ray.remote(TeacherReplica)
            .options(
                num_cpus=resources.num_cpus,
                num_gpus=resources.num_gpus,
                resources=resources.custom,
                max_restarts=-1,
                max_task_retries=0,  # ranks send again themselves, to whichever replica is up
                runtime_env={"env_vars": {"OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads}},
            )
            .remote(self._teacher, self._target, self._alignment)
        )

    async def _tend(self, member: _Member) -> None:
        """Bring a replica up, watch it, and bring it up again, for as long as the pool lives."""
        failed_starts = 0
        while True:
            try:
                description = await _await(member.handle.describe.remote())
            except (RayError, FuseLLMError) as error:
                failed_starts += 1
                member.problem = _summary(error)
                logger.warning(
                    "teacher %s, replica %d does not start: %s",
                    self._teacher.name,
                    member.number,
                    member.problem,
                )
                if self._description is None and self._is_final(error, failed_starts):
                    return
                await asyncio.sleep(min(2.0**failed_starts, 30.0) / 2)
                if not isinstance(error, RayActorError):
                    ray.kill(
                        member.handle, no_restart=False
                    )  # a failed load is cached; load in a new process
                elif isinstance(error, ActorDiedError):
                    member.handle = self._spawn()
                continue
            failed_starts = 0
            if not self._accepts(member, description):
                return
            member.state, member.incarnation, member.problem = "ready", description.incarnation, ""
            self._version += 1
            while member.state == "ready":
                await asyncio.sleep(_BEAT_S)
                if member.state == "ready":
                    await self._look(member)

    def _is_final(self, error: Exception, failed_starts: int) -> bool:
        """Whether a teacher that was never up will never be; then `status` and `table` raise why."""
        cause = getattr(error, "cause", None) if isinstance(error, RayTaskError) else None
        if isinstance(cause, FuseLLMError) and isinstance(cause, ValueError):
            self._failure = cause
        elif failed_starts >= _MAX_FAILED_STARTS:
            self._failure = ClusterError(
                f"teacher {self._teacher.name}: {failed_starts} attempts to start a replica failed, "
                f"the last with: {error}"
            )
        if self._failure is not None:
            for member in self._members.values():
                member.state = "refused"
        return self._failure is not None

    def _accepts(self, member: _Member, description: Description) -> bool:
        """Whether a replica gives the answers that the first one gave."""
        if self._description is None:
            self._description = description
        if description.fingerprint == self._description.fingerprint:
            return True
        self._failure = AlignmentError(
            f"teacher {self._teacher.name}, replica {member.number}: announces fingerprint "
            f"{description.fingerprint}, the first replica announced {self._description.fingerprint}: the "
            "folder of the model, of its tokenizer or of the target's was changed; restore it, or start anew"
        )
        logger.error("%s", self._failure)
        member.state, member.problem = "refused", str(self._failure)
        ray.kill(member.handle)
        return False

    async def _look(self, member: _Member) -> None:
        """Ask a ready replica for its heartbeat; out of the table with it if something is wrong."""
        is_hung = False
        try:
            beat = await asyncio.wait_for(_await(member.handle.heartbeat.remote()), self._hang_s)
        except TimeoutError:
            problem, is_hung = f"no heartbeat for {self._hang_s:.0f} s", True
        except RayError as error:
            problem = _summary(error)
        else:
            member.beat = beat
            if beat.incarnation != member.incarnation:
                problem = "its process was restarted"
            elif beat.stalled_s > self._hang_s:
                problem, is_hung = f"holds requests and has answered none for {beat.stalled_s:.0f} s", True
            else:
                return
        if member.state != "ready":
            return
        logger.warning(
            "teacher %s, replica %d: %s; it is restarted", self._teacher.name, member.number, problem
        )
        member.state, member.problem = "starting", problem
        self._version += 1
        if is_hung:
            ray.kill(member.handle, no_restart=False)

    async def _end(self, member: _Member) -> None:
        try:
            await asyncio.wait_for(
                _await(member.handle.stop.remote()), _STOP_TIMEOUT_S if member.state == "ready" else 1
            )
        except (RayError, FuseLLMError, TimeoutError) as error:
            logger.info("teacher %s, replica %d: stopped hard (%s)", self._teacher.name, member.number, error)
        ray.kill(member.handle)


# ---------------------------------------------------------------------------------------- the driver's side


def start_pools(config: Config) -> dict[str, Any]:
    """Begin to start every teacher that the run listens to; returns the pools' handles by teacher."""
    return {
        teacher.name: ray.remote(TeacherPool)
        .options(num_cpus=0, max_restarts=-1, max_task_retries=-1)
        .remote(teacher, config.target, config.alignment, config.stream.deadline_s / 2)
        for teacher in config.active_teachers
    }


def wait_ready(
    pools: Mapping[str, Any],
    timeout_s: float,
    on_progress: Callable[[dict[str, str]], None] | None = None,
) -> dict[str, Description]:
    """Wait until every pool has the replicas it asked for.

    Args:
        pools: as `start_pools` gave them.
        timeout_s: for all of them.
        on_progress: called with a line a teacher whenever one changes.

    Raises:
        ClusterError: time is up; the message compares what is asked for with what the cluster has.
        FuseLLMError: a teacher cannot be loaded.
    """
    deadline = time.monotonic() + timeout_s
    said: dict[str, str] = {}
    while True:
        statuses = _statuses(pools, deadline)
        lines = {s.name: _line(s) for s in statuses}
        if on_progress is not None and lines != said:
            on_progress(lines)
        said = lines
        if all(s.ready >= s.wanted and s.description is not None for s in statuses):
            return {s.name: s.description for s in statuses if s.description is not None}
        if time.monotonic() > deadline:
            missing = [s for s in statuses if s.ready < s.wanted]
            waiting = "; ".join(
                f"teacher {s.name}: {_line(s)}, each asks for {_amounts(s.asks)}" for s in missing
            )
            raise ClusterError(
                f"teachers are not up after {timeout_s:.0f} s (run.start_timeout_s): {waiting}. {_shortage()}"
            )
        time.sleep(0.2)


def stop_pools(pools: Mapping[str, Any]) -> None:
    """End pools and replicas, and wait for it. Idempotent."""
    stops = [pool.stop.remote() for pool in pools.values()]
    if stops:
        ray.wait(stops, num_returns=len(stops), timeout=_STOP_TIMEOUT_S + 5)
    for pool in pools.values():
        ray.kill(pool)


def _statuses(pools: Mapping[str, Any], deadline: float) -> Sequence[PoolStatus]:
    try:
        return ray.get(
            [pool.status.remote() for pool in pools.values()], timeout=max(1.0, deadline - time.monotonic())
        )
    except RayTaskError as error:
        if isinstance(error.cause, FuseLLMError):
            raise error.cause from None
        raise
    except TimeoutError:
        raise ClusterError(f"the teachers' pools do not answer. {_shortage()}") from None


def _line(status: PoolStatus) -> str:
    line = f"{status.ready}/{status.wanted} replicas ready"
    return f"{line} ({'; '.join(status.problems)})" if status.problems else line


def _shortage() -> str:
    total, free = ray.cluster_resources(), ray.available_resources()
    kinds = sorted(key for key in total if not key.startswith(("node:", "object_store_memory", "memory")))
    has, rest = ({kind: amounts.get(kind, 0) for kind in kinds} for amounts in (total, free))
    return f"The cluster has {_amounts(has)}; free: {_amounts(rest)}"


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {amount:g}" for name, amount in resources.items() if amount) or "nothing"


async def _await(ref: Any) -> Any:
    return await ref


def _summary(error: Exception) -> str:
    cause = error.cause if isinstance(error, RayTaskError) and isinstance(error.cause, Exception) else error
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0] if lines else ''}"[:300]
