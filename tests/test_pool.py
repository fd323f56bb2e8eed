"""What a pool makes of what its replicas say, without processes."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from fusellm_ray.config import AlignmentConfig, ModelConfig, TeacherConfig
from fusellm_ray.errors import AlignmentError, ClusterError
from fusellm_ray.teachers import pool as pool_module
from fusellm_ray.teachers.pool import TeacherPool
from fusellm_ray.teachers.report import Description, Heartbeat

WELL = Heartbeat(
    incarnation="0",
    queued_tokens=0,
    stalled_s=0.0,
    failures=0,
    positions=0,
    engine_s=0.0,
    cache_hits=0,
    cache_misses=0,
    problem=None,
)


class Replica:
    """In place of an actor's handle: `handle.method.remote()` is awaited."""

    def __init__(self) -> None:
        self.restarts = 0
        self.failures = 0
        self.failed_starts = 0
        """That are still to come."""
        self.problem: str | None = None
        self.weights = "f"
        self.passage_logprobs = (-1.0, float("nan"), -3.0)
        self.is_down = False
        self.is_frozen = False

    def __getattr__(self, name: str) -> Any:
        method = getattr(self, f"answer_{name}")
        return type("Method", (), {"remote": staticmethod(method)})

    async def answer_ready(self) -> None:
        """It has a place."""

    async def answer_describe(self) -> Description:
        while self.is_down:
            await asyncio.sleep(0.01)
        if self.failed_starts:
            self.failed_starts -= 1
            raise RayActorError("it crashed")
        return Description(
            name="t",
            fingerprint=self.weights,
            vocab_size=10,
            target_vocab_size=10,
            max_context=64,
            top_k=4,
            incarnation=str(self.restarts),
            pid=1,
            node="host",
            identity={"weights": self.weights},
            passage_logprobs=self.passage_logprobs,
        )

    async def answer_heartbeat(self) -> Heartbeat:
        while self.is_frozen:
            await asyncio.sleep(0.01)
        return replace(WELL, incarnation=str(self.restarts), failures=self.failures, problem=self.problem)


@pytest.fixture
def replicas(monkeypatch: pytest.MonkeyPatch) -> list[Replica]:
    """Those that pools have spawned; killing one restarts it."""
    spawned: list[Replica] = []

    def spawn(pool: TeacherPool, number: int) -> Replica:
        spawned.append(Replica())
        return spawned[-1]

    def kill(replica: Replica, no_restart: bool = True) -> None:
        replica.restarts += 1
        replica.failures, replica.problem = 0, None
        replica.is_down |= no_restart

    monkeypatch.setattr(TeacherPool, "_spawn", spawn)
    monkeypatch.setattr(pool_module.ray, "kill", kill)
    monkeypatch.setattr(pool_module, "_BEAT_S", 0.01)
    return spawned


def make_pool(
    count: int, most: int | None = None, engine: dict[str, Any] | None = None, **options: Any
) -> TeacherPool:
    engine = engine or {"type": "transformers"}
    teacher = TeacherConfig(name="t", model="m", engine=engine, replicas={"min": count, "max": most or count})
    return TeacherPool(teacher, ModelConfig(model="m"), AlignmentConfig(), hang_s=60, **options)


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def test_a_replica_that_fails_every_request_gets_a_new_process(replicas: list[Replica]) -> None:
    async def run() -> None:
        pool = make_pool(1)
        await until(lambda: pool._members[0].state == "ready")
        replicas[0].failures = 3
        await asyncio.sleep(0.1)
        assert replicas[0].restarts == 0
        replicas[0].failures = 4
        await until(lambda: replicas[0].restarts == 1)
        await until(lambda: pool._members[0].state == "ready")
        assert (await pool.status()).restarts == 1

    asyncio.run(run())


def test_a_replica_whose_engine_died_gets_a_new_process_at_once_and_status_says_why(
    replicas: list[Replica],
) -> None:
    async def run() -> None:
        pool = make_pool(2)
        await until(lambda: {m.state for m in pool._members.values()} == {"ready"})
        replicas[1].is_down = True  # it takes its time to come back
        replicas[1].problem = "its engine died; out of memory"
        await until(lambda: replicas[1].restarts == 1)
        assert (await pool.status()).problems == ("replica 1: its engine died; out of memory",)
        assert list((await pool.table()).handles) == [0]
        replicas[1].is_down = False
        await until(lambda: pool._members[1].state == "ready")
        assert (await pool.status()).problems == ()
        assert (await pool.status()).restarts == 1

    asyncio.run(run())


def test_a_refused_replica_ends_nothing_while_another_may_come_back(replicas: list[Replica]) -> None:
    async def run() -> None:
        pool = make_pool(2)
        replicas[1].weights = "another"
        await until(lambda: {m.state for m in pool._members.values()} == {"ready", "refused"})
        good = next(m for m in pool._members.values() if m.state == "ready")
        assert list((await pool.table()).handles) == [good.number]
        good.handle.is_down = True
        good.handle.failures = 4
        await until(lambda: good.state == "starting")
        assert not (await pool.table()).handles
        good.state = "refused"
        with pytest.raises(
            AlignmentError, match="weights: it runs with 'another', the first replica, on host, with 'f'"
        ):
            await pool.table()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("logprobs", "is_refused"),
    [
        ((-1.005, float("nan"), -3.005), False),
        ((-1.02, float("nan"), -3.02), True),
        ((-1.0, -2.0, -3.0), True),
        ((-1.0, float("nan"), -math.inf), True),
    ],
)
def test_replicas_must_agree_on_the_self_tests_passage(
    replicas: list[Replica], logprobs: tuple[float, ...], is_refused: bool
) -> None:
    async def run() -> None:
        pool = make_pool(2)
        replicas[1].passage_logprobs = logprobs
        await until(lambda: "starting" not in {m.state for m in pool._members.values()})
        problems = (await pool.status()).problems
        assert bool(problems) is is_refused
        if problems and logprobs[0] == -1.02:
            assert "-2.020 nats a token, the first replica, on host, -2.000" in problems[0]
            assert "differ by 0.020, limit 0.01" in problems[0]

    asyncio.run(run())


def test_replicas_in_half_precision_may_differ_by_its_rounding(replicas: list[Replica]) -> None:
    async def run() -> None:
        pool = make_pool(2, engine={"type": "transformers", "dtype": "bfloat16"})
        replicas[1].passage_logprobs = (-1.05, float("nan"), -3.05)
        await until(lambda: {m.state for m in pool._members.values()} == {"ready"})

    asyncio.run(run())


def test_a_refused_replica_is_taken_back_once_its_folder_is_restored(
    replicas: list[Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "_REFUSED_S", 0.05)

    async def run() -> None:
        pool = make_pool(2)
        replicas[1].weights = "another"
        await until(lambda: "refused" in {m.state for m in pool._members.values()})
        await until(lambda: {m.state for m in pool._members.values()} == {"ready"})
        assert len(replicas) == 3
        assert not (await pool.status()).problems

    asyncio.run(run())


def test_a_replica_whose_answers_cannot_be_read_gets_a_new_process(replicas: list[Replica]) -> None:
    async def run() -> None:
        pool = make_pool(1)
        await until(lambda: pool._members[0].state == "ready")
        assert list((await pool.report(0, "no answer")).handles) == [0]
        assert replicas[0].restarts == 0
        assert not (await pool.report(0, "wrong frames", is_wrong=True)).handles
        assert replicas[0].restarts == 1

    asyncio.run(run())


def test_a_rank_that_reports_a_frozen_replica_gets_the_table_all_the_same(
    replicas: list[Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "_LOOK_S", 0.05)

    async def run() -> None:
        pool = make_pool(2)
        await until(lambda: {m.state for m in pool._members.values()} == {"ready"})
        replicas[0].is_frozen = True
        async with asyncio.timeout(20):
            assert list((await pool.report(0, "no answer")).handles) == [0, 1]

    asyncio.run(run())


def test_a_replica_that_does_not_load_gets_a_new_process(replicas: list[Replica]) -> None:
    async def run() -> None:
        pool = make_pool(1, load_s=0.05)
        replicas[0].is_down = True
        await until(lambda: replicas[0].restarts == 1)
        assert "not loaded within" in pool._members[0].problem
        replicas[0].is_down = False
        await until(lambda: pool._members[0].state == "ready")

    asyncio.run(run())


def test_a_teacher_that_does_not_start_is_said_and_tried_on(
    replicas: list[Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "_LONGEST_PAUSE_S", 0.01)

    async def run() -> None:
        pool = make_pool(1)
        replicas[0].failed_starts = 100
        await until(lambda: pool._members[0].is_failing)
        with pytest.raises(ClusterError, match=r"teacher t: \d+ attempts to start a replica failed"):
            await pool.status()
        await until(lambda: pool._members[0].state == "ready")
        assert list((await pool.table()).handles) == [0]

    asyncio.run(run())


def test_one_replica_that_does_not_start_ends_nothing_while_another_loads(
    replicas: list[Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "_LONGEST_PAUSE_S", 0.01)

    async def run() -> None:
        pool = make_pool(2)
        replicas[0].failed_starts = 10_000
        replicas[1].is_down = True
        await until(lambda: pool._members[0].is_failing)
        assert not (await pool.table()).handles
        replicas[1].is_down = False
        await until(lambda: pool._members[1].state == "ready")
        replicas[0].failed_starts = 0
        await until(lambda: pool._members[0].state == "ready")

    asyncio.run(run())


def test_an_addition_that_cannot_start_is_withdrawn(replicas: list[Replica]) -> None:
    async def run() -> None:
        pool = make_pool(1, most=2, scale_s=0.01)
        await until(lambda: pool._members[0].state == "ready")
        pool._add()
        replicas[1].is_down = True
        await until(lambda: len(pool._members) == 1)
        assert replicas[1].restarts == 1
        assert pool._members[0].state == "ready"

    asyncio.run(run())
