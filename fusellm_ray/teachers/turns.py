"""Which request comes next, of the run whose turn it is. One event loop, no threads."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

MIN_REQUESTS = 3
"""Inside at once, whatever their size: one each is tokenised, scored and aligned."""


class Turns:
    """Lets in as many requests as keep the engine busy; the next is of the run that got the fewest tokens.

    Start-time fair queueing: a run that was away does not catch up on what it did not ask for, so one request of
    a small run waits for what is inside, never for the queue of a greedy one. Of one run's requests the earliest
    batch comes first: its ranks can do nothing without it, and an async Ray actor gets its calls in any order.
    """

    def __init__(self, max_prompts: int) -> None:
        """
        Args:
            max_prompts: that keep the engine busy; beyond `MIN_REQUESTS` no more are let in.
        """
        self._max_prompts = max_prompts
        self._requests = 0
        self._prompts = 0
        self._waiting: dict[str, list[tuple[int, int, asyncio.Future[None], int, int]]] = {}
        """By run, a heap of (batch, arrival, admitted, prompts, tokens)."""
        self._arrivals = itertools.count()
        self._served: dict[str, int] = {}  # tokens by run, counted from a common start
        self._start = 0  # of the request let in last

    @asynccontextmanager
    async def turn(self, run: str, batch: int, prompts: int, tokens: int) -> AsyncIterator[None]:
        """Wait for the turn of a request of so many prompts and tokens, and hold it for the block."""
        if run not in self._waiting:
            self._served[run] = max(self._served.get(run, 0), self._start)
        admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (batch, next(self._arrivals), admitted, prompts, tokens)
        heapq.heappush(self._waiting.setdefault(run, []), entry)
        self._admit()
        try:
            await admitted
            yield
        finally:
            if admitted.done() and not admitted.cancelled():
                self._requests -= 1
                self._prompts -= prompts
                self._admit()

    def _admit(self) -> None:
        while self._waiting and (self._requests < MIN_REQUESTS or self._prompts < self._max_prompts):
            run = min(self._waiting, key=self._served.__getitem__)
            queue = self._waiting[run]
            *_, admitted, prompts, tokens = heapq.heappop(queue)
            if not queue:
                del self._waiting[run]
            if admitted.cancelled():
                continue
            self._requests += 1
            self._prompts += prompts
            self._start = self._served[run]
            self._served[run] += tokens
            admitted.set_result(None)
        # A run that is neither waiting nor ahead is as good as new.
        self._served = {r: s for r, s in self._served.items() if r in self._waiting or s > self._start}
