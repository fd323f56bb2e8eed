"""One copy of a teacher, a Ray actor: text in, its distributions in the target's vocabulary out.

    event loop      requests, heartbeats                     never blocked
    engine          its own thread or process                scores one request while ...
    align thread    tokenises and aligns                     ... another one is being aligned

Scoring is pure: the same request gives the same frame, on any replica, before and after a restart. So a
request can always be sent again.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import os
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fusellm_ray.alignment.project import Aligned, Aligner
from fusellm_ray.config import AlignmentConfig, ModelConfig, TeacherConfig
from fusellm_ray.corpus.rows import Segment
from fusellm_ray.corpus.tokens import ByteTokenizer
from fusellm_ray.errors import ConfigError, EngineError
from fusellm_ray.models import model_facts
from fusellm_ray.stream import frame
from fusellm_ray.teachers.engine import Engine, Scores, make_engine

SELF_TEST = "The café's naïve owner wrote:\n\n\tdef total(prices):\n\t\treturn sum(prices)  # 3 × 4 = 12 €\n"
"""Scored once at start-up: prose, code, tabs, newlines and characters of one to three bytes."""


@dataclass(frozen=True, slots=True)
class Description:
    """What a loaded replica is."""

    name: str
    fingerprint: str
    """Of all that its answers depend on besides the text; equal for all replicas of a teacher."""
    vocab_size: int
    target_vocab_size: int
    max_context: int
    top_k: int
    incarnation: str
    """Changes when the process does."""
    pid: int


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a replica is busy with."""

    incarnation: str
    is_loaded: bool
    queued_tokens: int
    """Target tokens of the requests it has accepted and not answered."""
    stalled_s: float
    """How long requests have been waiting without one being answered."""
    scored_tokens: int
    engine_s: float


@dataclass(slots=True)
class ReplicaStats:
    """Sums since the process started."""

    requests: int = 0
    segments: int = 0
    tokens: int = 0
    """Teacher tokens scored."""
    positions: int = 0
    """Target positions answered for."""
    covered: int = 0
    """... of these, with a distribution."""
    engine_s: float = 0.0
    """Wall time during which the engine had at least one request."""
    align_s: float = 0.0
    cpu_s: float = 0.0
    frame_bytes: int = 0
    residual: float = 0.0
    """Sum over covered positions of the mass outside the candidates and the gold token."""
    aligned_nats: float = 0.0
    """Of gold at positions where it is known ..."""
    aligned_bytes: int = 0
    """... which predict this many bytes."""
    teacher_nats: float = 0.0
    """The teacher's own, on its own tokens ..."""
    teacher_bytes: int = 0
    """... which cover this many bytes."""

    @property
    def coverage(self) -> float:
        """Share of the target's positions that have a distribution."""
        return self.covered / max(1, self.positions)

    @property
    def fidelity(self) -> float:
        """Aligned nats per byte over the teacher's own: 1 is a perfect projection."""
        if not self.aligned_bytes or not self.teacher_nats:
            return float("nan")
        return (self.aligned_nats / self.aligned_bytes) / (self.teacher_nats / self.teacher_bytes)

    def record(self, segment: Segment, aligned: Aligned) -> None:
        self.positions += len(aligned.gold)
        self.covered += int(aligned.valid.sum())
        self.residual += float(np.exp(aligned.residual[aligned.valid]).sum())
        known = np.isfinite(aligned.gold)
        self.aligned_nats -= float(aligned.gold[known].sum())
        self.aligned_bytes += int(np.diff(segment.ends)[known].sum())
        self.teacher_nats += aligned.teacher_nats
        self.teacher_bytes += aligned.teacher_bytes


@dataclass(slots=True)
class _Load:
    """What loading a teacher gives."""

    engine: Engine
    teacher: ByteTokenizer
    target: ByteTokenizer
    aligner: Aligner
    fingerprint: str


class TeacherReplica:
    """Async Ray actor. `describe` loads it, not its constructor: so loading can fail with its own error."""

    def __init__(self, teacher: TeacherConfig, target: ModelConfig, alignment: AlignmentConfig) -> None:
        self._config = teacher
        self._target_config = target
        self._alignment = alignment
        self._incarnation = uuid.uuid4().hex
        self._loading: asyncio.Task[_Load] | None = None
        self._loaded: _Load | None = None
        self._align_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"{teacher.name}-align")
        self._stats = ReplicaStats()
        self._in_flight: dict[int, tuple[int, float]] = {}  # request → target tokens, when it came
        self._numbers = itertools.count()
        self._last_answer = time.monotonic()
        self._in_engine = 0
        self._engine_since = 0.0

    def __repr__(self) -> str:  # Ray puts it in front of this process's log lines
        return f"teacher {self._config.name}"

    async def describe(self) -> Description:
        """Load if need be, and say what is loaded.

        Raises:
            FuseLLMError: the model, its tokenizer or the configuration cannot work.
        """
        if self._loading is None:
            self._loading = asyncio.create_task(self._load())
        load = await asyncio.shield(self._loading)
        return Description(
            name=self._config.name,
            fingerprint=load.fingerprint,
            vocab_size=load.engine.vocab_size,
            target_vocab_size=load.target.vocab_size,
            max_context=load.engine.max_context,
            top_k=self._config.top_k,
            incarnation=self._incarnation,
            pid=os.getpid(),
        )

    async def score(self, request: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Answer a request of `stream.frame` with a frame.

        Raises:
            FrameError: the request cannot be read.
            EngineError: not loaded (again) yet, or the engine answered wrongly; worth another try.
        """
        load = self._loaded
        if load is None:
            raise EngineError(f"teacher {self._config.name}: this replica is still loading")
        segments = frame.decode_request(request, vocab_size=load.target.vocab_size)
        number = next(self._numbers)
        self._in_flight[number] = (sum(len(s.ids) for s in segments), time.monotonic())
        try:
            return await self._answer(load, segments, self._stats)
        finally:
            del self._in_flight[number]
            self._last_answer = time.monotonic()

    async def heartbeat(self) -> Heartbeat:
        oldest = min((since for _, since in self._in_flight.values()), default=None)
        stalled_s = time.monotonic() - max(oldest, self._last_answer) if oldest is not None else 0.0
        return Heartbeat(
            incarnation=self._incarnation,
            is_loaded=self._loaded is not None,
            queued_tokens=sum(tokens for tokens, _ in self._in_flight.values()),
            stalled_s=stalled_s,
            scored_tokens=self._stats.tokens,
            engine_s=self._engine_seconds(),
        )

    async def stats(self) -> ReplicaStats:
        return replace(self._stats, engine_s=self._engine_seconds(), cpu_s=time.process_time())

    async def stop(self) -> None:
        """Give back the engine's memory and processes. Idempotent."""
        load, self._loaded = self._loaded, None
        if load is not None:
            await load.engine.stop()
        self._align_thread.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------------------------------ loading

    async def _load(self) -> _Load:
        load = await asyncio.to_thread(self._load_parts)
        await self._self_test(load)
        self._loaded = load
        return load

    def _load_parts(self) -> _Load:
        config, wanted = self._config, self._target_config
        target = ByteTokenizer.load(
            wanted.model,
            revision=wanted.revision,
            trust_remote_code=wanted.trust_remote_code,
            vocab_size=model_facts(wanted).vocab_size,
        )
        engine = make_engine(config)
        smaller = min(engine.vocab_size, target.vocab_size)
        if config.top_k > smaller:
            raise ConfigError(
                f"teacher {config.name}: top_k={config.top_k} exceeds the vocabulary ({smaller}); "
                f"lower it to at most {smaller}"
            )
        teacher = ByteTokenizer.load(
            config.model,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            vocab_size=engine.vocab_size,
        )
        identity = {
            "wire": frame.VERSION,
            "model": config.model,
            "revision": config.revision,
            "tokenizer": teacher.fingerprint,
            "target_tokenizer": target.fingerprint,
            "alignment": self._alignment.model_dump(),
            "top_k": config.top_k,
            "max_context": engine.max_context,
        }
        return _Load(
            engine=engine,
            teacher=teacher,
            target=target,
            aligner=Aligner(teacher, target, self._alignment, config.top_k),
            fingerprint=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        )

    async def _self_test(self, load: _Load) -> None:
        """Answer a request for a fixed passage and read it as a rank would; compiles alignment besides."""
        tokens = load.target.sequence(SELF_TEST, True)
        passage = Segment(
            text=SELF_TEST.encode(),
            ids=tokens.ids,
            ends=tokens.ends,
            ends_document=True,
            domain="self-test",
            document="self-test",
        )
        stats = ReplicaStats()
        buffer = await self._answer(load, [passage], stats)
        frame.decode_frame(
            buffer,
            teacher=self._config.name,
            fingerprint=load.fingerprint,
            vocab_size=load.target.vocab_size,
            num_positions=[passage.num_positions],
        )
        if stats.covered == 0:
            raise EngineError(
                f"teacher {self._config.name}: no position of the self-test passage got a distribution; its "
                f"tokenizer ({load.teacher.vocab_size} tokens) and the target's do not fit the text"
            )

    # ------------------------------------------------------------------------------------ scoring

    async def _answer(
        self, load: _Load, segments: Sequence[Segment], stats: ReplicaStats
    ) -> NDArray[np.uint8]:
        loop = asyncio.get_running_loop()
        sequences, prompts = await loop.run_in_executor(self._align_thread, self._prompts, load, segments)
        flat = [prompt for pieces in prompts for prompt, _ in pieces]
        self._enter_engine()
        try:
            scores = await load.engine.score(flat, self._config.top_k) if flat else []
        finally:
            self._leave_engine()
        stats.tokens += sum(len(prompt) for prompt in flat)
        return await loop.run_in_executor(
            self._align_thread, self._align, load, segments, sequences, prompts, scores, stats
        )

    def _prompts(
        self, load: _Load, segments: Sequence[Segment]
    ) -> tuple[list[tuple[NDArray[np.int32], NDArray[np.int32]]], list[list[tuple[NDArray[np.int32], int]]]]:
        """Each segment's teacher tokens (ids, ends), and the prompts that score them (see `windows`)."""
        encodings = load.teacher.encode_batch([s.text.decode() for s in segments])
        tokens = [load.teacher.framed(e, s.ends_document) for e, s in zip(encodings, segments, strict=True)]
        prompts = [windows(t.ids, load.engine.max_context, load.teacher.bos_id) for t in tokens]
        return [(t.ids, t.ends) for t in tokens], prompts

    def _align(
        self,
        load: _Load,
        segments: Sequence[Segment],
        sequences: Sequence[tuple[NDArray[np.int32], NDArray[np.int32]]],
        prompts: Sequence[Sequence[tuple[NDArray[np.int32], int]]],
        scores: Sequence[Scores],
        stats: ReplicaStats,
    ) -> NDArray[np.uint8]:
        started = time.perf_counter()
        answers = iter(scores)
        parts = []
        for segment, (ids, ends), pieces in zip(segments, sequences, prompts, strict=True):
            rows = _join([(next(answers), kept) for _, kept in pieces], self._config.top_k)
            aligned = load.aligner.align(
                segment.text,
                segment.ids,
                segment.ends,
                ids,
                ends,
                rows.top_ids,
                rows.top_logprobs,
                rows.gold_logprobs,
            )
            stats.record(segment, aligned)
            parts.append(aligned)
        buffer = frame.encode_frame(
            parts, teacher=self._config.name, fingerprint=load.fingerprint, vocab_size=load.target.vocab_size
        )
        stats.requests += 1
        stats.segments += len(segments)
        stats.frame_bytes += buffer.nbytes
        stats.align_s += time.perf_counter() - started
        return buffer

    def _enter_engine(self) -> None:
        if self._in_engine == 0:
            self._engine_since = time.monotonic()
        self._in_engine += 1

    def _leave_engine(self) -> None:
        self._in_engine -= 1
        if self._in_engine == 0:
            self._stats.engine_s += time.monotonic() - self._engine_since

    def _engine_seconds(self) -> float:
        now = time.monotonic() - self._engine_since if self._in_engine else 0.0
        return self._stats.engine_s + now


def windows(
    ids: NDArray[np.int32], max_context: int, bos_id: int | None
) -> list[tuple[NDArray[np.int32], int]]:
    """Prompts of at most `max_context` tokens that together predict all tokens of a sequence but its first.

    A sequence that fits is its own prompt. A longer one is read in windows that each repeat a quarter of the
    context before their first new token, so no prediction is made without context, and none is lost.

    Args:
        ids: [M], with BOS if the tokenizer adds one.
        max_context: at least 2.
        bos_id: what later windows begin with too, if the tokenizer adds one.

    Returns:
        (prompt, number of its last rows that are new) in order; the numbers add up to M - 1.

    Example:
        windows(arange(10), 8, None) → [(0..7, 7), (6..9, 2)]
    """
    if len(ids) < 2:
        return []
    pieces = [(ids[:max_context], min(len(ids), max_context) - 1)]
    prefix = ids[:0] if bos_id is None else np.array([bos_id], dtype=np.int32)
    room = max_context - len(prefix)
    repeated = min(max(1, max_context // 4), room - 1)
    start = max_context
    while start < len(ids):
        stop = min(len(ids), start - repeated + room)
        pieces.append((np.concatenate([prefix, ids[start - repeated : stop]]), stop - start))
        start = stop
    return pieces


def _join(pieces: Sequence[tuple[Scores, int]], top_k: int) -> Scores:
    """The rows of a whole sequence from those of its windows."""
    if not pieces:
        none = np.zeros((0, top_k), dtype=np.float32)
        return Scores(none.astype(np.int32), none, none[:, 0])
    if len(pieces) == 1:
        return pieces[0][0]
    return Scores(
        np.concatenate([scores.top_ids[-kept:] for scores, kept in pieces]),
        np.concatenate([scores.top_logprobs[-kept:] for scores, kept in pieces]),
        np.concatenate([scores.gold_logprobs[-kept:] for scores, kept in pieces]),
    )
