"""Runs in which real processes are killed at given steps, and teachers whose answers are not always right."""

from __future__ import annotations

import asyncio
import os
import signal
import time
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
    frame, with an engine's error, as it should. With `late_s` all answers are right, and the third is that late."""

    def __init__(self, replica: Any, late_s: float, met: set[bytes]) -> None:
        self._replica = replica
        self._late_s = late_s
        self._met = set(met)
        self.faults = {"nan": 0, "error": 0, "late": 0}

    async def score(self, request: NDArray[np.uint8], run: str = "", batch: int = 0) -> NDArray[np.uint8]:
        answer = await self._replica.score.remote(request, run, batch)
        if request.tobytes() in self._met:
            return answer
        self._met.add(request.tobytes())
        number = len(self._met)
        if self._late_s:
            if number == 3:
                await asyncio.sleep(self._late_s)
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

    def __init__(self, pool: Any, late_s: float = 0.0) -> None:
        self._pool = pool
        self._late_s = late_s
        self._replicas: dict[Any, Any] = {}

    async def table(self, teacher: str, waited_s: float = 0.0) -> HandleTable:
        return await self._wrapped(await self._pool.table.remote(teacher, waited_s))

    async def report(self, teacher: str, replica: int, reason: str, is_wrong: bool = False) -> HandleTable:
        # What is wrong is here, not in the replica.
        return await self._wrapped(await self._pool.report.remote(teacher, replica, reason))

    async def status(self, teacher: str) -> Any:
        return await self._pool.status.remote(teacher)

    async def counted(self) -> dict[str, int]:
        """Faults by kind, and texts that more than one replica was asked for."""
        counts = [await replica.counted.remote() for replica in self._replicas.values()]
        met = [await replica.met.remote() for replica in self._replicas.values()]
        twice = sum(map(len, met)) - len(set().union(*met))
        return {kind: sum(count[kind] for count in counts) for kind in counts[0]} | {"twice": twice}

    async def _wrapped(self, table: HandleTable) -> HandleTable:
        # A replica that comes later must not answer NaN to what had NaN before: the second time ends a run.
        met = set().union(*[await replica.met.remote() for replica in self._replicas.values()])
        for handle in table.handles.values():
            if handle not in self._replicas:
                actor = ray.remote(FaultyReplica).options(num_cpus=0)
                self._replicas[handle] = actor.remote(handle, self._late_s, met)
        return HandleTable({n: self._replicas[h] for n, h in table.handles.items()})
