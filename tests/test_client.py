"""A rank's side of the stream against replicas and a clock made by hand, without Ray."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayActorError, RayTaskError

from fusellm_ray.config import StreamConfig
from fusellm_ray.corpus.rows import Segment
from fusellm_ray.errors import EngineError
from fusellm_ray.stream import client
from fusellm_ray.stream.address import HandleTable, TeacherAddress
from fusellm_ray.stream.client import TeacherStream

SOON_S = 0.01
ANSWER = np.zeros(8, np.uint8)
PARTS = ["parts of the answer"]
IDS = np.arange(9, dtype=np.int32)
SEGMENT = Segment(b"abcdefghi", IDS, IDS + 1, False, "d", "d:0")


class Clock:
    """In place of the module `time`, and of `ray` for what is to come at a known time."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def wait(self, refs: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        if all(ref.at > self.now for ref in refs):
            self.now = min(self.now + timeout, min(ref.at for ref in refs))
        ready = [ref for ref in refs if ref.at <= self.now][:num_returns]
        return ready, [ref for ref in refs if ref not in ready]

    def get(self, ref: Any) -> Any:
        if isinstance(ref.value, Exception):
            raise ref.value
        return ref.value


class Ref:
    """What comes at a time."""

    def __init__(self, at: float, value: Any) -> None:
        self.at, self.value = at, value


def method(call: Callable[..., Ref]) -> Any:
    return types.SimpleNamespace(remote=call)


def replica(call: Callable[[], Ref]) -> Any:
    return types.SimpleNamespace(score=method(lambda *_: call()))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(client, "time", clock)
    monkeypatch.setattr(client, "ray", clock)
    monkeypatch.setattr(client, "decode_frame", lambda *_, **__: PARTS)
    return clock


def address(clock: Clock, name: str, replicas: Callable[[], dict[int, Any]]) -> TeacherAddress:
    table = method(lambda *_: Ref(clock.now + SOON_S, HandleTable(replicas())))
    return TeacherAddress(name, "fingerprint", 4, types.SimpleNamespace(table=table, report=table))


def test_a_restarted_replica_is_asked_again_while_another_hangs(clock: Clock) -> None:
    asked: list[int] = []

    def first() -> Ref:
        asked.append(0)
        is_up = len(asked) > 1
        return Ref(clock.now + SOON_S, ANSWER if is_up else RayActorError("it crashed"))

    def second() -> Ref:
        asked.append(1)
        return Ref(math.inf, ANSWER)

    def replicas() -> dict[int, Any]:
        return {0: replica(first), 1: replica(second)} if not asked or clock.now > 5 else {1: replica(second)}

    settings = StreamConfig(on_teacher_loss="fail", loss_deadline_s=60)
    stream = TeacherStream([address(clock, "t", replicas)], settings, 100)
    assert list(stream.join([[SEGMENT]])) == [([SEGMENT], [PARTS])]
    assert asked == [0, 1, 0]


@pytest.mark.parametrize("error", ["crash", "error"])
def test_a_lost_teacher_is_back_soon_however_little_time_ranks_spend_in_the_stream(
    clock: Clock, error: str
) -> None:
    down, up = 20.0, 620.0

    def answer() -> Ref:
        if not down <= clock.now < up:
            return Ref(clock.now + SOON_S, ANSWER)
        if error == "crash":
            return Ref(clock.now + SOON_S, RayActorError("it crashed"))
        cause = EngineError("the engine answered NaN")
        return Ref(clock.now + SOON_S, RayTaskError("score", "", cause))

    def replicas() -> dict[int, Any]:
        return {} if error == "crash" and down <= clock.now < up else {0: replica(answer)}

    def batches() -> Iterator[list[Segment]]:
        while True:
            yield [SEGMENT]

    teachers = [
        address(clock, "well", lambda: {0: replica(lambda: Ref(clock.now + SOON_S, ANSWER))}),
        address(clock, "ill", replicas),
    ]
    settings = StreamConfig(on_teacher_loss="drop", loss_deadline_s=60, in_flight_tokens=40)
    was_lost = False
    for _, (well, ill) in TeacherStream(teachers, settings, 100).join(batches()):
        assert well is not None
        if was_lost and ill is not None:
            break
        was_lost |= ill is None
        clock.now += 1.0  # the step
        assert clock.now < up + 30
    assert clock.now >= up
