"""The ensemble baseline: the mean of several teachers' distributions, without any training.

    documents ─ each teacher's windows ─ its engine ─ alignment to the target's tokens ─┐
                                                                                        ├─ mean ─ nats of gold
    documents ─ the target's tokens ────────────────────────────────────────────────────┘

Teachers with other tokenizers meet at the target's positions, through the same alignment and fusion as in
training. A teacher reads a document in the windows in which `perplexity` reads it, so that the ensemble of one
teacher scores what that teacher scores alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fusellm_ray.alignment.project import Aligner
from fusellm_ray.config import AlignmentConfig, FusionConfig, TeacherConfig
from fusellm_ray.corpus.source import Document
from fusellm_ray.corpus.tokens import ByteTokenizer, Encoding
from fusellm_ray.fusion.fuse import Candidates, fuse
from fusellm_ray.perplexity import DocumentScore, token_windows
from fusellm_ray.teachers.engine import Engine, Scores, make_engine
from fusellm_ray.teachers.scoring import join_windows

MEAN = FusionConfig(rule="mean")
EXACT = AlignmentConfig()
"""Under it a teacher's nats are kept; what is measured here is an ensemble, not an alignment."""


def evaluate_ensemble(
    teachers: Sequence[TeacherConfig],
    target: ByteTokenizer,
    documents: Iterable[Document],
    *,
    row_tokens: int = 2048,
) -> list[DocumentScore]:
    """Nats that the mean of the teachers' distributions pays for each document.

    Args:
        teachers: loaded one after the other, so only one is in memory.
        target: whose tokens the distributions are brought to.
        row_tokens: tokens a teacher reads at once; lowered to what it can.

    Returns:
        One score a document, in order. A position whose gold token no teacher knows is counted nowhere: the first
        of a document, where no tokenizer adds a BOS.
    """
    documents = list(documents)
    sequences = [target.sequence(document.text, ends_document=False) for document in documents]
    by_teacher = [_golds(teacher, target, documents, sequences, row_tokens) for teacher in teachers]
    results = []
    for document, sequence, *known in zip(documents, sequences, *by_teacher, strict=True):
        nats, is_known = mean_nats(known)
        gold_bytes = np.diff(sequence.ends)
        results.append(
            DocumentScore(
                document.domain,
                document.name,
                float(nats[is_known].sum()),
                int(gold_bytes[is_known].sum()),
                int(is_known.sum()),
            )
        )
    return results


def _golds(
    teacher: TeacherConfig,
    target: ByteTokenizer,
    documents: Sequence[Document],
    sequences: Sequence[Encoding],
    row_tokens: int,
) -> list[NDArray[np.float32]]:
    """A teacher's aligned log-probabilities of each document's target tokens; its model is gone when they are there."""
    threads = torch.get_num_threads()
    engine = make_engine(teacher)
    tokenizer = ByteTokenizer.of_model(teacher, engine.vocab_size)
    aligner = Aligner(tokenizer, target, EXACT, teacher.top_k)
    own = [tokenizer.sequence(document.text, ends_document=False) for document in documents]
    limit = min(row_tokens, engine.max_context)
    scores = asyncio.run(
        _score(engine, [tokens.ids for tokens in own], tokenizer.bos_id, limit, teacher.top_k)
    )
    torch.set_num_threads(threads)  # an engine sets its own
    return [
        aligner.align(
            document.text.encode(),
            sequence.ids,
            sequence.ends,
            tokens.ids,
            tokens.ends,
            rows.top_ids,
            rows.top_logprobs,
            rows.gold_logprobs,
        ).gold
        for document, sequence, tokens, rows in zip(documents, sequences, own, scores, strict=True)
    ]


def mean_nats(golds: Sequence[NDArray[np.float32]]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Nats of the gold tokens under the mean of the teachers that know them.

    Args:
        golds: a teacher's aligned log-probabilities of the gold tokens each, [N]; -inf where unknown.

    Returns:
        (nats [N], where at least one teacher knows the gold token [N])
    """
    teachers = []
    for gold in golds:
        known = torch.from_numpy(gold.astype(np.float32))
        missing = Candidates.missing(len(gold))
        teachers.append(Candidates(missing.ids, missing.logprobs, known, missing.residual, known.isfinite()))
    nothing = torch.zeros(len(golds[0]), dtype=torch.long)
    fused = fuse(teachers, config=MEAN, segment=nothing, row=nothing, gold_bytes=nothing)
    return -fused.gold.double().numpy(), fused.valid.numpy()


async def _score(
    engine: Engine, sequences: Sequence[NDArray[np.int32]], bos_id: int | None, limit: int, top_k: int
) -> list[Scores]:
    """Rows of whole sequences, read in the windows of `perplexity`."""
    windows = [list(token_windows(ids, limit, bos_id)) for ids in sequences]
    try:
        answers = iter(await engine.score([read for own in windows for *_, read in own], top_k))
    finally:
        await engine.stop()
    return [
        join_windows([(next(answers), stop - start - 1) for start, stop, _ in own], top_k) for own in windows
    ]
