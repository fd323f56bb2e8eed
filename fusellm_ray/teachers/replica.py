"""One copy of a teacher: a Ray actor around a `TeacherScorer`, with its start, its heartbeat and its end.

event loop      requests, heartbeats: never blocked
threads         loading; then the engine's and the align thread of `scoring`
"""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import time
import uuid
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fusellm_ray.config import AlignmentConfig, ModelConfig, TeacherConfig
from fusellm_ray.errors import EngineError
from fusellm_ray.observe.metrics import ReplicaMetrics
from fusellm_ray.teachers.report import Description, Heartbeat, ReplicaStats

if TYPE_CHECKING:
    from fusellm_ray.teachers.scoring import TeacherScorer


class TeacherReplica:
    """Async Ray actor. `describe` loads it, not its constructor: so loading can fail with its own error."""

    def __init__(
        self,
        teacher: TeacherConfig,
        target: ModelConfig,
        alignment: AlignmentConfig,
        target_vocab_size: int | None = None,
        *,
        number: int,
    ) -> None:
        self._teacher = teacher
        self._target = target
        self._alignment = alignment
        self._target_vocab_size = target_vocab_size
        self._number = number
        self._incarnation = uuid.uuid4().hex
        self._loading: asyncio.Task[TeacherScorer] | None = None
        self._scorer: TeacherScorer | None = None
        self._metrics = ReplicaMetrics(teacher.name)

    def __repr__(self) -> str:  # Ray puts it in front of this process's log lines
        return f"teacher {self._teacher.name}, replica {self._number}"

    async def ready(self) -> None:
        """Answered once the actor has a place and its process is up."""

    async def describe(self) -> Description:
        """Load if need be, and say what is loaded.

        Raises:
            FuseLLMError: the model, its tokenizer or the configuration cannot work.
        """
        if self._loading is None:
            self._loading = asyncio.create_task(self._load())
        scorer = await asyncio.shield(self._loading)
        return Description(
            name=self._teacher.name,
            fingerprint=scorer.fingerprint,
            vocab_size=scorer.engine.vocab_size,
            target_vocab_size=scorer.target.vocab_size,
            max_context=scorer.engine.max_context,
            top_k=self._teacher.top_k,
            incarnation=self._incarnation,
            pid=os.getpid(),
            node=socket.gethostname(),
            identity=scorer.identity,
            passage_logprobs=scorer.passage_logprobs,
        )

    async def score(self, request: NDArray[np.uint8], run: str = "", batch: int = 0) -> NDArray[np.uint8]:
        """Answer a request of `stream.frame`, for a batch of `run`, with a frame.

        Raises:
            FrameError: the request cannot be read.
            EngineError: not loaded (again) yet, or the engine answered wrongly; worth another try.
        """
        started = time.monotonic()
        answer = await self._loaded().answer(request, run, batch)
        self._metrics.answered(time.monotonic() - started)
        return answer

    async def heartbeat(self) -> Heartbeat:
        scorer = self._loaded()
        stats = scorer.stats
        self._metrics.follow(positions=stats.answered, frame_bytes=stats.frame_bytes)
        return Heartbeat(
            incarnation=self._incarnation,
            queued_tokens=scorer.queued_tokens,
            stalled_s=scorer.stalled_s,
            failures=scorer.failures,
            positions=stats.answered,
            engine_s=stats.engine_s,
            cache_hits=stats.cache_hits,
            cache_misses=stats.cache_misses,
            problem=scorer.engine.problem,
        )

    async def stats(self) -> ReplicaStats:
        return self._loaded().stats

    async def stop(self) -> None:
        """Give back the engine's memory and processes. Idempotent."""
        scorer, self._scorer = self._scorer, None
        if scorer is not None:
            await scorer.stop()

    def _loaded(self) -> TeacherScorer:
        if self._scorer is None:
            raise EngineError(f"teacher {self._teacher.name}: this replica is not loaded")
        return self._scorer

    async def _load(self) -> TeacherScorer:
        scorer = await asyncio.to_thread(self._make_scorer)
        await scorer.self_test()
        gc.collect()
        gc.freeze()  # what is loaded by now stays: no collection need look through it again
        self._scorer = scorer
        return scorer

    def _make_scorer(self) -> TeacherScorer:
        # Brings torch and transformers: not into the pool, which needs this module to start replicas.
        from fusellm_ray.teachers.scoring import TeacherScorer

        return TeacherScorer(self._teacher, self._target, self._alignment, self._target_vocab_size)
