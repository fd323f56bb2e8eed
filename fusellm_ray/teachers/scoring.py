"""A loaded teacher: requests of `stream.frame` in, frames out. Independent of Ray.

    request → segments → cache → teacher tokens, windows ─→ engine ─→ top-k rows → aligned → cache → frame
                                 └─── align thread ───┘  its thread or  └── align thread ──┘
                                                            process

While the engine scores one request, another one is being tokenised or aligned. Scoring is pure: the same request
gives the same frame, in any process, before and after a restart. So a request can always be sent again.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import itertools
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusellm_ray.alignment.project import Aligned, Aligner, Scored
from fusellm_ray.config import AlignmentConfig, ModelConfig, SimulatedEngine, TeacherConfig, VllmEngine
from fusellm_ray.corpus.rows import Segment
from fusellm_ray.corpus.tokens import ByteTokenizer, Encoding
from fusellm_ray.errors import ConfigError, EngineError, TokenizerError
from fusellm_ray.stream import frame
from fusellm_ray.teachers.cache import AnswerCache
from fusellm_ray.teachers.engine import Scores, make_engine
from fusellm_ray.teachers.identity import answer_settings
from fusellm_ray.teachers.report import ReplicaStats
from fusellm_ray.teachers.turns import Turns

SELF_TEST = "The café's naïve owner wrote:\n\n\tdef total(prices):\n\t\treturn sum(prices)  # 3 × 4 = 12 €\n"
"""Prose, code, tabs, newlines and characters of one to three bytes."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """One segment as its teacher reads it."""

    tokens: Encoding
    """The whole segment, BOS and EOS included."""
    windows: list[tuple[NDArray[np.int32], int]]
    """What the engine is asked; see `windows`."""


class TeacherScorer:
    """A teacher's engine, both tokenizers and the alignment between them."""

    def __init__(
        self,
        teacher: TeacherConfig,
        target: ModelConfig,
        alignment: AlignmentConfig,
        target_vocab_size: int | None = None,
    ) -> None:
        """Load everything; takes as long as the engine does.

        Args:
            target_vocab_size: rows of the target's LM head, where known: it is looked up with transformers and
                torch otherwise, which an engine without a model needs for nothing else.

        Raises:
            FuseLLMError: a model, its tokenizer or the configuration cannot work.
        """
        if target_vocab_size is None:
            from fusellm_ray.models import model_facts

            target_vocab_size = model_facts(target).vocab_size
        self.target = ByteTokenizer.of_model(target, target_vocab_size)
        self.engine = make_engine(teacher)
        smaller = min(self.engine.vocab_size, self.target.vocab_size)
        if teacher.top_k > smaller:
            raise ConfigError(
                f"teacher {teacher.name}: top_k={teacher.top_k} exceeds the vocabulary ({smaller}); "
                f"lower it to at most {smaller}"
            )
        self.tokenizer = ByteTokenizer.of_model(teacher, self.engine.vocab_size)
        self._name, self._top_k = teacher.name, teacher.top_k
        self._aligner = Aligner(self.tokenizer, self.target, alignment, teacher.top_k)
        self.identity = teacher_identity(teacher, alignment, self.tokenizer, self.target)
        self.fingerprint = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        self.passage_logprobs: tuple[float, ...] = ()
        """Of `self_test`; replicas of one teacher must agree in them."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"{teacher.name}-align")
        self._turns = Turns(2 * self.engine.max_prompts)  # as many again, so that it never runs dry
        self._cache = AnswerCache(teacher.cache_bytes)
        self._stats = ReplicaStats()
        self._in_flight: dict[int, tuple[int, float]] = {}  # request → target tokens, when it came
        self._numbers = itertools.count()
        self._answered_at = time.monotonic()
        self.failures = 0
        """Requests that failed since the engine last scored one."""
        self._in_engine = 0
        self._engine_since = 0.0

    async def answer(self, request: NDArray[np.uint8], run: str = "", batch: int = 0) -> NDArray[np.uint8]:
        """Score the segments of a request.

        Args:
            request: as `frame.encode_request` wrote it.
            run: who asks; runs get their turns in fairness.
            batch: a run's earliest goes first.

        Raises:
            FrameError: the request cannot be read.
            EngineError: the engine answered wrongly.
        """
        segments = frame.decode_request(request, vocab_size=self.target.vocab_size)
        number = next(self._numbers)
        tokens = sum(len(s.ids) for s in segments)
        self._in_flight[number] = (tokens, time.monotonic())
        try:
            parts = await self._cache.answers(segments, functools.partial(self._score_in_turn, run, batch))
            buffer = await asyncio.get_running_loop().run_in_executor(self._thread, self._encode, parts)
            self._stats.requests += 1
            self._stats.frame_bytes += buffer.nbytes
            self._stats.answered += sum(s.num_positions for s in segments)
            return buffer
        except Exception:
            self.failures += 1
            raise
        finally:
            del self._in_flight[number]
            self._answered_at = time.monotonic()

    async def self_test(self) -> None:
        """Answer a request for a fixed passage and read it as a rank would; compiles the alignment besides.

        Raises:
            EngineError: no position got a distribution.
            FrameError: the answer is no distribution.
        """
        tokens = self.target.sequence(SELF_TEST, True)
        passage = Segment(
            text=SELF_TEST.encode(),
            ids=tokens.ids,
            ends=tokens.ends,
            ends_document=True,
            domain="self-test",
            document="self-test",
        )
        stats = ReplicaStats()
        parts = await self._score([passage], stats)
        frame.decode_frame(
            self._encode(parts),
            teacher=self._name,
            fingerprint=self.fingerprint,
            vocab_size=self.target.vocab_size,
            top_k=self._top_k,
            num_positions=[passage.num_positions],
        )
        if stats.covered == 0:
            raise EngineError(
                f"teacher {self._name}: no position of the self-test passage got a distribution; its "
                f"tokenizer ({self.tokenizer.vocab_size} tokens) and the target's do not fit the text"
            )
        self.passage_logprobs = tuple(parts[0].gold.tolist())

    async def stop(self) -> None:
        """Give back the engine's memory and processes. Idempotent."""
        await self.engine.stop()
        self._thread.shutdown(wait=False, cancel_futures=True)

    @property
    def stats(self) -> ReplicaStats:
        busy_s = time.monotonic() - self._engine_since if self._in_engine else 0.0
        return replace(
            self._stats,
            engine_s=self._stats.engine_s + busy_s,
            cache_hits=self._cache.hits,
            cache_misses=self._cache.misses,
            cpu_s=time.process_time(),
            model_cpu_s=self.engine.model_cpu_s,
        )

    @property
    def queued_tokens(self) -> int:
        """Target tokens of the requests that are not answered yet."""
        return sum(tokens for tokens, _ in self._in_flight.values())

    @property
    def stalled_s(self) -> float:
        """How long requests have been waiting without one being answered."""
        if not self._in_flight:
            return 0.0
        oldest = min(since for _, since in self._in_flight.values())
        return time.monotonic() - max(oldest, self._answered_at)

    # ------------------------------------------------------------------------------------ one request

    async def _score_in_turn(self, run: str, batch: int, segments: Sequence[Segment]) -> list[Aligned]:
        tokens = sum(len(s.ids) for s in segments)
        async with self._turns.turn(run, batch, prompts=len(segments), tokens=tokens):
            parts = await self._score(segments, self._stats)
        self.failures = 0  # here, since an answer from the cache says nothing of the engine
        return parts

    async def _score(self, segments: Sequence[Segment], stats: ReplicaStats) -> list[Aligned]:
        loop = asyncio.get_running_loop()
        prompts = await loop.run_in_executor(self._thread, self._tokenise, segments)
        flat = [prompt for p in prompts for prompt, _ in p.windows]
        self._enter_engine()
        try:
            scores = await self.engine.score(flat, self._top_k) if flat else []
        finally:
            self._leave_engine()
        stats.tokens += sum(len(prompt) for prompt in flat)
        return await loop.run_in_executor(self._thread, self._align, segments, prompts, scores, stats)

    def _tokenise(self, segments: Sequence[Segment]) -> list[Prompts]:
        encodings = []
        outcomes = self.tokenizer.encode_each([s.text.decode() for s in segments])
        for segment, outcome in zip(segments, outcomes, strict=True):
            if isinstance(outcome, TokenizerError):
                raise TokenizerError(
                    f"teacher {self._name}: in a part of document {segment.document}: {outcome}"
                ) from outcome
            encodings.append(outcome)
        made = []
        for encoding, segment in zip(encodings, segments, strict=True):
            tokens = self.tokenizer.framed(encoding, segment.ends_document)
            made.append(Prompts(tokens, windows(tokens.ids, self.engine.max_context, self.tokenizer.bos_id)))
        return made

    def _align(
        self,
        segments: Sequence[Segment],
        prompts: Sequence[Prompts],
        scores: Sequence[Scores],
        stats: ReplicaStats,
    ) -> list[Aligned]:
        started = time.perf_counter()
        answers = iter(scores)
        scored = []
        for segment, prompt in zip(segments, prompts, strict=True):
            rows = join_windows([(next(answers), kept) for _, kept in prompt.windows], self._top_k)
            tokens = prompt.tokens
            scored.append(
                Scored(
                    segment.text,
                    segment.ids,
                    segment.ends,
                    tokens.ids,
                    tokens.ends,
                    rows.top_ids,
                    rows.top_logprobs,
                    rows.gold_logprobs,
                )
            )
        parts = []
        for segment, aligned in zip(segments, self._aligner.align_each(scored), strict=True):
            stats.record(segment, aligned)
            parts.append(frame.in_wire_form(aligned, self.target.vocab_size))
        stats.segments += len(segments)
        stats.align_s += time.perf_counter() - started
        return parts

    def _encode(self, parts: Sequence[Aligned]) -> NDArray[np.uint8]:
        return frame.encode_frame(
            parts, teacher=self._name, fingerprint=self.fingerprint, vocab_size=self.target.vocab_size
        )

    def _enter_engine(self) -> None:
        if self._in_engine == 0:
            self._engine_since = time.monotonic()
        self._in_engine += 1

    def _leave_engine(self) -> None:
        self._in_engine -= 1
        if self._in_engine == 0:
            self._stats.engine_s += time.monotonic() - self._engine_since


def teacher_identity(
    teacher: TeacherConfig, alignment: AlignmentConfig, tokenizer: ByteTokenizer, target: ByteTokenizer
) -> dict[str, Any]:
    """All that a teacher's answers depend on besides the text, by the keys people write; JSON-able.

    The same for every process that sees the same files; no weights are loaded for it.

    Raises:
        ModelError: the model or its adapter cannot be read.
    """
    identity = answer_settings(teacher, alignment) | {
        "wire": frame.VERSION,
        "tokenizer": tokenizer.fingerprint,
        "target_tokenizer": target.fingerprint,
    }
    if isinstance(teacher.engine, SimulatedEngine):
        return identity
    # Not at the top: it brings torch, which an engine without a model needs for nothing.
    from fusellm_ray.models import folder_fingerprint, weights_fingerprint

    identity["weights"] = weights_fingerprint(teacher)
    if isinstance(teacher.engine, VllmEngine) and teacher.engine.lora:
        identity["engine.lora weights"] = folder_fingerprint(Path(teacher.engine.lora).expanduser())
    return identity


def windows(
    ids: NDArray[np.int32], max_context: int, bos_id: int | None
) -> list[tuple[NDArray[np.int32], int]]:
    """Prompts of at most `max_context` tokens that together predict all tokens of a sequence but its first.

    A sequence that fits is its own prompt. A longer one is read in windows that each repeat a quarter of the
    context before their first new token, so no prediction is made without context, and none is lost. Windows may
    begin anywhere: their rows are joined before alignment, which only ever sees the whole sequence, so no boundary
    of theirs must be one of the target's.

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


def join_windows(pieces: Sequence[tuple[Scores, int]], top_k: int) -> Scores:
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
