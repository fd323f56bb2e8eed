"""Whose request comes next, where several runs share a replica. One event loop, no threads."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

MIN_REQUESTS = 3
"""Inside at once, whatever their size: one each is tokenised, scored and aligned."""


class Turns:
    """Lets in as many requests as keep the engine busy; the next is of the run that got the fewest tokens.

    Start-time fair queueing: a run that was away does not catch up on what it did not ask for, so one request of
    a small run waits for what is inside, never for the queue of a greedy one.
    """

    def __init__(self, max_prompts: int) -> None:
        """
        Args:
            max_prompts: that keep the engine busy; beyond `MIN_REQUESTS` no more are let in.
        """
        self._max_prompts = max_prompts
        self._requests = 0
        self._prompts = 0
        self._waiting: dict[str, deque[tuple[asyncio.Future[None], int, int]]] = {}
        self._served: dict[str, int] = {}  # tokens by run, counted from a common start
        self._start = 0  # of the request let in last

    @asynccontextmanager
    async def turn(self, run: str, prompts: int, tokens: int) -> AsyncIterator[None]:
        """Wait for the turn of a request of so many prompts and tokens, and hold it for the block."""
        if run not in self._waiting:
            self._served[run] = max(self._served.get(run, 0), self._start)
        admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(run, deque()).append((admitted, prompts, tokens))
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
            admitted, prompts, tokens = queue.popleft()
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
