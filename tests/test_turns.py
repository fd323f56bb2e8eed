"""Several runs on one replica: whose request comes next."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from fusellm_ray.teachers.turns import MIN_REQUESTS, Turns

Request = tuple[str, int]
"""Run and tokens."""


def served(requests: Sequence[Request], max_prompts: int = 1) -> list[Request]:
    """The order in which requests that all come at once get their turn; one prompt each."""

    async def serve() -> list[Request]:
        turns, order, inside, most = Turns(max_prompts), [], 0, 0

        async def ask(run: str, tokens: int) -> None:
            nonlocal inside, most
            async with turns.turn(run, 0, prompts=1, tokens=tokens):
                order.append((run, tokens))
                inside += 1
                most = max(most, inside)
                await asyncio.sleep(0)
                inside -= 1

        await asyncio.gather(*(ask(*request) for request in requests))
        assert most <= max(MIN_REQUESTS, max_prompts)
        return order

    return asyncio.run(serve())


def test_a_small_run_waits_for_what_is_inside_and_not_for_a_greedy_runs_queue() -> None:
    order = served([("greedy", 1000)] * 50 + [("small", 1000)] * 3)
    assert all(at <= MIN_REQUESTS + 4 for at, (run, _) in enumerate(order) if run == "small")


def test_runs_get_equal_tokens_not_equal_requests() -> None:
    order = served([("large", 4000)] * 20 + [("small", 1000)] * 40)
    first = order[MIN_REQUESTS : MIN_REQUESTS + 20]
    tokens = {run: sum(size for name, size in first if name == run) for run in ("large", "small")}
    assert abs(tokens["large"] - tokens["small"]) <= 4000


def test_a_run_that_comes_late_catches_up_on_nothing() -> None:
    async def serve() -> list[str]:
        turns, order = Turns(1), []

        async def ask(run: str) -> None:
            async with turns.turn(run, 0, prompts=1, tokens=100):
                order.append(run)
                await asyncio.sleep(0)

        await asyncio.gather(*(ask("early") for _ in range(30)))
        await asyncio.gather(*(ask(run) for run in ["early"] * 10 + ["late"] * 10))
        return order[30:]

    order = asyncio.run(serve())
    assert order[MIN_REQUESTS : MIN_REQUESTS + 6].count("late") <= 4


def test_a_runs_earliest_batch_comes_first_in_whatever_order_they_arrive() -> None:
    async def serve() -> list[int]:
        turns, order = Turns(1), []

        async def ask(batch: int) -> None:
            async with turns.turn("a", batch, prompts=1, tokens=100):
                order.append(batch)
                await asyncio.sleep(0)

        await asyncio.gather(*(ask(batch) for batch in [9, 4, 7, 3, 8, 1, 0, 2, 6, 5]))
        return order

    assert asyncio.run(serve()) == [9, 4, 7, 0, 1, 2, 3, 5, 6, 8]


def test_as_many_prompts_are_let_in_as_the_engine_takes_at_once() -> None:
    assert served([("a", 10)] * 100, max_prompts=40) == [("a", 10)] * 100


def test_a_request_that_is_given_up_leaves_its_turn_to_others() -> None:
    async def serve() -> int:
        turns, done = Turns(1), 0

        async def ask(seconds: float) -> None:
            nonlocal done
            async with turns.turn("a", 0, prompts=1, tokens=1):
                await asyncio.sleep(seconds)
                done += 1

        tasks = [asyncio.create_task(ask(60)) for _ in range(6)]
        await asyncio.sleep(0)
        for task in tasks:  # three inside, three waiting
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.wait_for(asyncio.gather(*(ask(0) for _ in range(5))), 10)
        return done

    assert asyncio.run(serve()) == 5


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 100)), max_size=40), st.integers(1, 10))
def test_every_request_gets_its_turn_and_a_runs_own_in_order(requests: list[Request], width: int) -> None:
    order = served(requests, width)
    for run in "abc":
        assert [r for r in order if r[0] == run] == [r for r in requests if r[0] == run]
