"""Scaling decisions, without a cluster; `test_stream` sees them carried out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fusellm_ray.config import Replicas
from fusellm_ray.teachers.scaling import QUIET_LOOKS, Decision, Load, Scaler

BOUNDS = Replicas(min=1, max=8)


def load(
    ready: int, busy: float, wait: float, starting: int = 0, refused: int = 0, queued_tokens: int = 60_000
) -> Load:
    return Load(
        ready=ready,
        starting=starting,
        refused=refused,
        busy=busy,
        wait=wait,
        queued_tokens=queued_tokens,
        tokens_per_s=10_000.0,
    )


def test_waiting_ranks_and_busy_replicas_bring_half_as_many_again() -> None:
    assert Scaler(BOUNDS).decide(load(1, busy=1.0, wait=0.5)) == Decision(
        2, "ranks wait 0.50 s a second, replicas are busy 100%, 60000 tokens are queued (6.0 s)"
    )
    assert Scaler(BOUNDS).decide(load(4, busy=0.9, wait=0.5)).replicas == 6


def test_little_waiting_brings_few() -> None:
    assert Scaler(Replicas(min=1, max=16)).decide(load(8, busy=0.9, wait=0.2)).replicas == 10


def test_nothing_is_added_where_nothing_is_queued() -> None:
    assert Scaler(BOUNDS).decide(load(2, busy=1.0, wait=0.5, queued_tokens=0)).replicas == 2


def test_an_addition_that_never_starts_is_taken_back() -> None:
    scaler = Scaler(BOUNDS)
    decided = [scaler.decide(load(2, busy=0.9, wait=0.0, starting=2)).replicas for _ in range(QUIET_LOOKS)]
    assert decided == [4] * (QUIET_LOOKS - 1) + [3]


def test_no_more_than_max() -> None:
    assert Scaler(BOUNDS).decide(load(7, busy=1.0, wait=2.0)).replicas == 8
    decision = Scaler(BOUNDS).decide(load(8, busy=1.0, wait=2.0))
    assert decision.replicas == 8
    assert "replicas.max=8" in decision.reason


def test_a_refused_replica_takes_a_place_and_is_the_first_to_go() -> None:
    scaler = Scaler(Replicas(min=1, max=2))
    assert scaler.decide(load(1, busy=1.0, wait=2.0, refused=1)).replicas == 2
    decided = [scaler.decide(load(1, busy=0.7, wait=0.0, refused=1)).replicas for _ in range(QUIET_LOOKS)]
    assert decided == [2] * (QUIET_LOOKS - 1) + [1]


def test_busy_replicas_alone_or_waiting_ranks_alone_change_nothing() -> None:
    assert Scaler(BOUNDS).decide(load(2, busy=1.0, wait=0.0)).replicas == 2
    assert Scaler(BOUNDS).decide(load(2, busy=0.3, wait=0.9)).replicas == 2


def test_nothing_is_added_while_the_last_addition_starts() -> None:
    assert Scaler(BOUNDS).decide(load(1, busy=1.0, wait=0.9, starting=1)).replicas == 2


def test_one_replica_goes_after_a_long_quiet_time() -> None:
    scaler = Scaler(BOUNDS)
    decided = [scaler.decide(load(4, busy=0.3, wait=0.0)).replicas for _ in range(2 * QUIET_LOOKS)]
    assert decided == ([4] * (QUIET_LOOKS - 1) + [3]) * 2


def test_a_busy_moment_ends_the_quiet_time() -> None:
    scaler = Scaler(BOUNDS)
    quiet, busy = load(2, busy=0.1, wait=0.0), load(2, busy=0.7, wait=0.0)
    looks = [quiet] * (QUIET_LOOKS - 1) + [busy] + [quiet] * (QUIET_LOOKS - 1)
    assert {scaler.decide(look).replicas for look in looks} == {2}


def test_no_replica_goes_whose_work_the_others_could_not_take() -> None:
    scaler = Scaler(BOUNDS)
    assert {scaler.decide(load(4, busy=0.61, wait=0.0)).replicas for _ in range(3 * QUIET_LOOKS)} == {4}


@given(
    st.integers(1, 4),
    st.integers(0, 6),
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 10), st.booleans()), max_size=60),
)
def test_decisions_stay_within_bounds(low: int, spread: int, looks: list[tuple[float, float, bool]]) -> None:
    bounds = Replicas(min=low, max=low + spread)
    scaler, ready, starting = Scaler(bounds), bounds.min, 0
    for busy, wait, has_started in looks:
        if has_started:
            ready, starting = ready + starting, 0
        decision = scaler.decide(load(ready, busy, wait, starting))
        assert bounds.min <= decision.replicas <= bounds.max
        assert decision.reason
        starting += max(0, decision.replicas - ready - starting)
        ready = min(ready, decision.replicas)
