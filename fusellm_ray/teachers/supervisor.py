"""The actor in which the pools of some teachers live: one small process, however many teachers there are.

An idle Ray process wakes a hundred times a second, so a process a pool costs more than all that pools do. Standing
teachers and those of a study have one each, for each ends alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from fusellm_ray.config import AlignmentConfig, ModelConfig, TeacherConfig
from fusellm_ray.stream.address import HandleTable
from fusellm_ray.teachers.pool import TeacherPool
from fusellm_ray.teachers.report import PoolStatus, ReplicaStats


class PoolSupervisor:
    """Async Ray actor. What it is asked names the teacher, and is answered as `TeacherPool` says."""

    def __init__(
        self,
        teachers: Sequence[TeacherConfig],
        target: ModelConfig,
        alignment: AlignmentConfig,
        hang_s: float,
        scale_s: float = 5.0,
        load_s: float = 3600.0,
        target_vocab_size: int | None = None,
    ) -> None:
        self._pools = {
            teacher.name: TeacherPool(teacher, target, alignment, hang_s, scale_s, load_s, target_vocab_size)
            for teacher in teachers
        }

    def __repr__(self) -> str:  # Ray puts it in front of this process's log lines
        return f"pools of {', '.join(self._pools)}"

    async def table(self, teacher: str, waited_s: float = 0.0) -> HandleTable:
        return await self._pools[teacher].table(waited_s)

    async def report(self, teacher: str, replica: int, reason: str, is_wrong: bool = False) -> HandleTable:
        return await self._pools[teacher].report(replica, reason, is_wrong)

    async def status(self, teacher: str) -> PoolStatus:
        return await self._pools[teacher].status()

    async def stats(self, teacher: str) -> dict[int, ReplicaStats]:
        return await self._pools[teacher].stats()

    async def stop(self) -> None:
        """End all replicas of all teachers."""
        await asyncio.gather(*(pool.stop() for pool in self._pools.values()))
