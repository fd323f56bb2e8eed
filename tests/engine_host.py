"""An engine in a process of its own, for tests: vLLM changes the process that it runs in."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from typing import Any

from fusellm_ray.config import TeacherConfig
from fusellm_ray.teachers.engine import Engine, make_engine


class HostedEngine:
    """The teacher's engine, loaded once this returns."""

    def __init__(self, teacher: TeacherConfig) -> None:
        self._connection, other = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=_host, args=(other, teacher))
        self._process.start()
        other.close()
        self.max_context: int = self._answer()

    def call(self, function: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        """What `function(engine, *args)`, a module's own, returns over there; raises what it raises."""
        self._connection.send((function, args))
        return self._answer()

    def stop(self) -> None:
        self._connection.send(None)
        self._process.join(60)
        self._process.kill()

    def _answer(self) -> Any:
        answer = self._connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer


def _host(connection: Connection, teacher: TeacherConfig) -> None:
    asyncio.run(_serve(connection, teacher))


async def _serve(connection: Connection, teacher: TeacherConfig) -> None:
    engine: Engine = await asyncio.to_thread(make_engine, teacher)
    connection.send(engine.max_context)
    while (call := await asyncio.to_thread(connection.recv)) is not None:
        function, args = call
        try:
            connection.send(await function(engine, *args))
        except Exception as error:
            connection.send(error)
    await engine.stop()
