"""Answers that are kept: what is asked twice is scored once, and the bytes of a frame stay the same."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from fusellm_ray.alignment.project import Aligned
from fusellm_ray.config import AlignmentConfig, ModelConfig, SimulatedEngine, TeacherConfig
from fusellm_ray.corpus.rows import Segment
from fusellm_ray.corpus.tokens import ByteTokenizer
from fusellm_ray.errors import EngineError
from fusellm_ray.stream.frame import encode_frame, encode_request, in_wire_form
from fusellm_ray.teachers.cache import AnswerCache
from fusellm_ray.teachers.scoring import TeacherScorer
from tests.models import tiny_model
from tests.tokenizers import VOCAB_SIZE, build, training_text

SIZE = 100


def segment(content: int, document: str = "d") -> Segment:
    ids = np.arange(SIZE + 1, dtype=np.int32)
    return Segment(str(content).zfill(SIZE + 1).encode(), ids, ids + 1, False, "domain", document)


def answer_to(asked: Segment) -> Aligned:
    return Aligned(
        ids=np.zeros((SIZE, 4), np.uint16),
        logprobs=np.full((SIZE, 4), -float(asked.text), np.float16),
        gold=np.zeros(SIZE, np.float16),
        residual=np.zeros(SIZE, np.float16),
        valid=np.ones(SIZE, np.bool_),
        teacher_nats=float(asked.text),
        teacher_tokens=SIZE,
        teacher_bytes=SIZE,
    )


ENTRY_BYTES = SIZE * (4 * 4 + 2 * 2 + 1) + 1024


class Scoring:
    """Counts what it is asked for; may fail."""

    def __init__(self) -> None:
        self.scored: list[int] = []
        self.fails = False

    async def __call__(self, segments: Sequence[Segment]) -> list[Aligned]:
        self.scored += [int(s.text) for s in segments]
        await asyncio.sleep(0)
        if self.fails:
            raise EngineError("out of memory")
        return [answer_to(s) for s in segments]


def nats(answers: Sequence[Aligned]) -> list[float]:
    return [answer.teacher_nats for answer in answers]


def test_what_is_asked_again_is_not_scored_again_whatever_it_is_asked_with() -> None:
    async def ask() -> None:
        cache, scoring = AnswerCache(1 << 20), Scoring()
        assert nats(await cache.answers([segment(1), segment(2)], scoring)) == [1, 2]
        asked = [segment(3), segment(2, "of another document"), segment(3), segment(1)]
        assert nats(await cache.answers(asked, scoring)) == [3, 2, 3, 1]
        assert scoring.scored == [1, 2, 3]
        assert (cache.hits, cache.misses) == (3, 3)

    asyncio.run(ask())


def test_what_is_asked_at_once_is_scored_once() -> None:
    async def ask() -> None:
        cache, scoring = AnswerCache(1 << 20), Scoring()
        requests = [[segment(1), segment(2)], [segment(2), segment(3)], [segment(3), segment(1)]]
        answers = await asyncio.gather(*(cache.answers(request, scoring) for request in requests))
        assert [nats(a) for a in answers] == [[1, 2], [2, 3], [3, 1]]
        assert sorted(scoring.scored) == [1, 2, 3]

    asyncio.run(ask())


def test_a_failure_reaches_all_who_wait_and_is_not_kept() -> None:
    async def ask() -> None:
        cache, scoring = AnswerCache(1 << 20), Scoring()
        scoring.fails = True
        requests = [cache.answers([segment(1)], scoring) for _ in range(3)]
        outcomes = await asyncio.gather(*requests, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [EngineError] * 3
        scoring.fails = False
        assert nats(await cache.answers([segment(1)], scoring)) == [1]
        assert scoring.scored == [1, 1]

    asyncio.run(ask())


def test_memory_is_bounded_and_the_least_recently_asked_goes_first() -> None:
    async def ask() -> None:
        cache, scoring = AnswerCache(3 * ENTRY_BYTES), Scoring()
        for content in (1, 2, 3, 1, 4):  # 1 is asked again before 4 comes, so 2 must go
            await cache.answers([segment(content)], scoring)
            assert cache.num_bytes <= 3 * ENTRY_BYTES
        scoring.scored.clear()
        await cache.answers([segment(content) for content in (1, 3, 4, 2)], scoring)
        assert scoring.scored == [2]

    asyncio.run(ask())


def test_without_memory_nothing_is_kept() -> None:
    async def ask() -> None:
        cache, scoring = AnswerCache(0), Scoring()
        for _ in range(2):
            await cache.answers([segment(1)], scoring)
        assert scoring.scored == [1, 1]

    asyncio.run(ask())


def test_the_target_tokens_and_the_documents_end_are_part_of_the_question() -> None:
    async def ask() -> None:
        cache, scoring = AnswerCache(1 << 20), Scoring()
        plain = segment(1)
        ids = plain.ids.copy()
        ids[3] += 1
        others = [
            Segment(plain.text, ids, plain.ends, False, "domain", "d"),
            Segment(plain.text, plain.ids, plain.ends, True, "domain", "d"),
            Segment(plain.text, plain.ids, np.maximum(plain.ends, 5), False, "domain", "d"),
        ]
        for asked in (plain, *others):
            await cache.answers([asked], scoring)
        assert cache.misses == 4

    asyncio.run(ask())


@pytest.mark.parametrize("vocab_size", [1200, 100_000])
def test_the_wire_form_encodes_to_the_same_bytes(vocab_size: int) -> None:
    rng = np.random.default_rng(0)
    part = Aligned(
        ids=rng.integers(0, vocab_size, (SIZE, 4)).astype(np.int32),
        logprobs=np.concatenate([rng.normal(-3, 2, (SIZE, 3)), np.full((SIZE, 1), -1e6)], 1).astype(
            np.float32
        ),
        gold=rng.normal(-3, 2, SIZE).astype(np.float32),
        residual=np.full(SIZE, -np.inf, np.float32),
        valid=rng.random(SIZE) < 0.5,
        teacher_nats=1.5,
        teacher_tokens=SIZE,
        teacher_bytes=SIZE,
    )
    names = {"teacher": "t", "fingerprint": "f", "vocab_size": vocab_size}
    np.testing.assert_array_equal(
        encode_frame([in_wire_form(part, vocab_size)], **names), encode_frame([part], **names)
    )


def five_segments(folder: Path) -> list[Segment]:
    tokenizer = ByteTokenizer.load(str(folder), vocab_size=VOCAB_SIZE)
    text = "".join(training_text())
    segments = []
    for start in range(0, 1500, 300):
        tokens = tokenizer.sequence(text[start : start + 300], False)
        piece = text[start : start + 300].encode()
        segments.append(Segment(piece, tokens.ids, tokens.ends, False, "domain", "d"))
    return segments


def test_an_answer_from_memory_does_not_hide_an_engine_that_fails(tmp_path: Path) -> None:
    folder = build("llama", tmp_path)
    known, new, *_ = five_segments(folder)

    async def ask() -> None:
        teacher = TeacherConfig(
            name="t", model=str(folder), top_k=8, engine=SimulatedEngine(type="simulated")
        )
        scorer = TeacherScorer(teacher, ModelConfig(model=str(folder)), AlignmentConfig(), VOCAB_SIZE)
        await scorer.self_test()
        await scorer.answer(encode_request([known]))
        well = scorer.engine._cost  # type: ignore[attr-defined]
        scorer.engine._cost = well.model_copy(update={"failure_rate": 1.0})  # type: ignore[attr-defined]
        for failures in (1, 2):
            with pytest.raises(EngineError):
                await scorer.answer(encode_request([known, new]))
            await scorer.answer(encode_request([known]))
            assert scorer.failures == failures
        scorer.engine._cost = well  # type: ignore[attr-defined]
        await scorer.answer(encode_request([known, new]))
        assert scorer.failures == 0
        await scorer.stop()

    asyncio.run(ask())


def test_a_replica_answers_from_memory_with_the_same_frame(tmp_path: Path) -> None:
    folder = build("llama", tiny_model("llama", VOCAB_SIZE, tmp_path / "model"))
    segments = five_segments(folder)

    async def ask() -> None:
        teacher = TeacherConfig(name="t", model=str(folder), top_k=8)
        scorer = TeacherScorer(teacher, ModelConfig(model=str(folder)), AlignmentConfig())
        await scorer.self_test()
        first = await scorer.answer(encode_request(segments), run="a")
        scored = scorer.stats.tokens
        again, part = await asyncio.gather(
            scorer.answer(encode_request(segments), run="b"),
            scorer.answer(encode_request(segments[1:3]), run="c"),
        )
        np.testing.assert_array_equal(again, first)
        assert part.nbytes < first.nbytes
        stats = scorer.stats
        assert (stats.tokens, stats.segments) == (scored, 5)
        assert (stats.cache_misses, stats.cache_hits, stats.requests) == (5, 7, 3)
        assert stats.answered > stats.positions
        await scorer.stop()

    asyncio.run(ask())
