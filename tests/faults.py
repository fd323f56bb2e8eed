"""Runs in which real processes are killed at given steps, and teachers whose answers are not always right."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from fusellm_ray.config import Config
from fusellm_ray.errors import EngineError
from fusellm_ray.job import export_run
from fusellm_ray.observe.progress import Display
from fusellm_ray.stream.address import HandleTable
from tests.runs import of_event


class Injector(Display):
    """A display that does something when the record of a step comes in; keeps all records and notes."""

    def __init__(self, faults: dict[int, Callable[[], None]]) -> None:
        self.faults = dict(faults)
        self.records: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def show(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if record["event"] == "step" and record["step"] in self.faults:
            self.faults.pop(record["step"])()

    @property
    def losses(self) -> list[float]:
        return [record["loss"] for record in of_event(self.records, "step")]


def replica_pids(teacher: str, pool: Any) -> list[int]:
    table = ray.get(pool.table.remote(teacher))
    return [d.pid for d in ray.get([h.describe.remote() for h in table.handles.values()])]


def own_processes(title: str) -> list[int]:
    """Processes below this one whose title begins like this, for instance ray::PoolSupervisor."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[0].startswith(title):
                found.append(process.pid)
        except (psutil.NoSuchProcess, IndexError):
            continue
    return found


class Descendants:
    """Processes that were seen below this one, those that outlive their parents included."""

    def __init__(self) -> None:
        self._seen: set[psutil.Process] = set()

    def look(self) -> None:
        self._seen.update(psutil.Process().children(recursive=True))

    def left(self, timeout_s: float = 20.0) -> list[str]:
        """Names of those that still run when none does any more or the time is up."""
        give_up = time.monotonic() + timeout_s
        while (names := [name for p in self._seen if (name := _running(p))]) and time.monotonic() < give_up:
            time.sleep(0.2)
        return names


def _running(process: psutil.Process) -> str | None:
    try:
        return process.name() if process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def weights(config: Config, folder: Path) -> dict[str, torch.Tensor]:
    """The trained weights, by name."""
    return load_file(export_run(config, folder) / "model.safetensors")


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class FaultyReplica:
    """Actor between ranks and a replica. To texts that were not `met` before it answers, in turn: with NaN in the
    frame, with an engine's error, as it should. With `pool` all answers are right, and the third comes only after
    another replica's to the same text."""

    def __init__(self, replica: Any, met: set[bytes], pool: Any | None) -> None:
        self._replica = replica
        self._met = set(met)
        self._pool = pool
        self.faults = {"nan": 0, "error": 0, "late": 0}

    async def score(self, request: NDArray[np.uint8], run: str = "", batch: int = 0) -> NDArray[np.uint8]:
        answer = await self._replica.score.remote(request, run, batch)
        text = request.tobytes()
        if text in self._met:
            return answer
        self._met.add(text)
        number = len(self._met)
        if self._pool is not None:
            times = await self._pool.answered.remote(text)
            if number == 3:
                while times < 2:
                    await asyncio.sleep(0.1)
                    times = await self._pool.times.remote(text)
                await asyncio.sleep(0.3)
                self.faults["late"] += 1
        elif number % 3 == 1:
            self.faults["nan"] += 1
            return with_nan(answer)
        elif number % 3 == 2:
            self.faults["error"] += 1
            raise EngineError("the engine answered NaN")
        return answer

    async def counted(self) -> dict[str, int]:
        return self.faults

    async def met(self) -> set[bytes]:
        return self._met


def with_nan(answer: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The frame with its last residuals overwritten: they lie before the bits of `valid`."""
    changed = answer.copy()
    end = len(changed) // 8 * 8 - 64
    changed[end - 256 : end] = 0xFF  # float16 0xFFFF is NaN
    return changed


class FaultyPool:
    """Actor between ranks and a supervisor: its table holds a `FaultyReplica` before each replica."""

    def __init__(self, pool: Any, *, is_late: bool = False) -> None:
        self._pool = pool
        self._is_late = is_late
        self._replicas: dict[Any, Any] = {}
        self._times: Counter[bytes] = Counter()

    async def table(self, teacher: str, waited_s: float = 0.0) -> HandleTable:
        return await self._wrapped(await self._pool.table.remote(teacher, waited_s))

    async def report(self, teacher: str, replica: int, reason: str, is_wrong: bool = False) -> HandleTable:
        # What is wrong is here, not in the replica.
        return await self._wrapped(await self._pool.report.remote(teacher, replica, reason))

    async def status(self, teacher: str) -> Any:
        return await self._pool.status.remote(teacher)

    async def counted(self) -> dict[str, int]:
        counts = [await replica.counted.remote() for replica in self._replicas.values()]
        return {kind: sum(count[kind] for count in counts) for kind in counts[0]}

    async def answered(self, text: bytes) -> int:
        """One more replica has an answer to this text."""
        self._times[text] += 1
        return self._times[text]

    async def times(self, text: bytes) -> int:
        return self._times[text]

    async def _wrapped(self, table: HandleTable) -> HandleTable:
        # A replica that comes later must not answer NaN to what had NaN before: the second time ends a run.
        met = set().union(*[await replica.met.remote() for replica in self._replicas.values()])
        for handle in table.handles.values():
            if handle not in self._replicas:
                actor = ray.remote(FaultyReplica).options(num_cpus=0)
                own = ray.get_runtime_context().current_actor if self._is_late else None
                self._replicas[handle] = actor.remote(handle, met, own)
        return HandleTable({n: self._replicas[h] for n, h in table.handles.items()})
