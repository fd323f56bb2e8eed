"""Plain Python to compare the compiled alignment with, and made-up teachers to feed both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusellm_ray.alignment import Aligned, Aligner, Vocabulary
from fusellm_ray.alignment.statistics import Sequences
from fusellm_ray.config import AlignmentConfig
from fusellm_ray.corpus.tokens import ByteTokenizer


@dataclass(frozen=True)
class Case:
    """One text in both models' tokens, with a random teacher's top k of each row."""

    target: ByteTokenizer
    teacher: ByteTokenizer
    sequences: Sequences
    top_ids: np.ndarray
    top_logprobs: np.ndarray
    gold: np.ndarray

    @classmethod
    def random(
        cls,
        text: str,
        target: ByteTokenizer,
        teacher: ByteTokenizer,
        k: int | None = None,
        seed: int = 0,
        ends_document: bool = True,
    ) -> Case:
        """k: default the whole vocabulary."""
        ours, theirs = target.sequence(text, ends_document), teacher.sequence(text, ends_document)
        rows = max(len(theirs.ids) - 1, 0)
        logits = 3.0 * np.random.default_rng(seed).standard_normal((rows, teacher.vocab_size))
        full = (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32)
        k = min(k or teacher.vocab_size, teacher.vocab_size)
        most = np.argpartition(-full, k - 1, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(full, most, 1), axis=1, kind="stable")
        top = np.take_along_axis(most, order, 1).astype(np.int32)
        sequences = Sequences(text.encode(), ours.ids, ours.ends, theirs.ids, theirs.ends)
        gold = full[np.arange(rows), theirs.ids[1:]]
        return cls(target, teacher, sequences, top, np.take_along_axis(full, top, 1), gold)

    def align(self, aligner: Aligner | None = None, **options: Any) -> Aligned:
        s = self.sequences
        config = AlignmentConfig(**options)
        aligner = aligner or Aligner(self.teacher, self.target, config, self.top_ids.shape[1])
        return aligner.align(
            s.text, s.target_ids, s.target_ends, s.teacher_ids, s.teacher_ends,
            self.top_ids, self.top_logprobs, self.gold,
        )  # fmt: skip

    def probabilities(self, q: int) -> dict[int, float]:
        """Row q as a mapping, in float64: what the top k and the realised token say."""
        row = dict(
            zip(self.top_ids[q].tolist(), np.exp(self.top_logprobs[q].astype(np.float64)), strict=True)
        )
        return row | {int(self.sequences.teacher_ids[q + 1]): math.exp(self.gold[q])}

    @property
    def teacher_has_bos(self) -> bool:
        return self.teacher.bos_id is not None

    def row_at(self, end: int) -> int:
        """The last teacher token that ends at or before a byte, for texts without tokens of no width."""
        return int(np.searchsorted(self.sequences.teacher_ends[:-1], end, side="right")) - 1


def total_mass(aligned: Aligned) -> np.ndarray:
    """Of each valid position: candidates, gold and residual."""
    parts = np.concatenate([aligned.logprobs, aligned.gold[:, None], aligned.residual[:, None]], axis=1)
    return np.exp(parts.astype(np.float64)).sum(1)[aligned.valid]


def distribution(aligned: Aligned, p: int) -> dict[int, float]:
    """Candidates of position p as a mapping."""
    pairs = zip(aligned.ids[p].tolist(), np.exp(aligned.logprobs[p].astype(np.float64)), strict=True)
    return {token: probability for token, probability in pairs if probability > 0}


def spelled(vocabulary: Vocabulary, token: int, at_start: bool = False) -> bytes:
    part = b"" if token in vocabulary.special_ids else vocabulary.token_bytes[token] or b""
    return part.removeprefix(b" ") if at_start and vocabulary.strips_leading_space else part


def gold_probability(case: Case, start: int, end: int) -> float:
    """Section 4's rule by the letter, for texts whose teacher tokens spell them and have a width."""
    text, ends = case.sequences.text, case.sequences.teacher_ends

    def beginning_with(q: int, part: bytes) -> float:
        at_start = case.teacher_has_bos and q == 0
        return sum(
            p for t, p in case.probabilities(q).items() if spelled(case.teacher, t, at_start).startswith(part)
        )

    probability = 1.0
    for q in range(len(ends) - 1):
        first, last = ends[q], ends[q + 1]
        if last <= start or first >= end:
            continue
        if first < start:  # condition on the part already read
            probability /= beginning_with(q, text[first:start])
        if last <= end:
            probability *= case.probabilities(q)[int(case.sequences.teacher_ids[q + 1])]
        else:  # marginalise
            probability *= beginning_with(q, text[first:end])
    return probability


def first_target_token(target: ByteTokenizer, part: bytes) -> int | None:
    """The `prefix` projection of bytes inside a text, for a target without a dummy prefix."""
    spellings = [spelled(target, i) for i in range(target.vocab_size)]
    if part in spellings:
        return spellings.index(part)
    try:
        return int(target.encode(part.decode()).ids[0])
    except UnicodeDecodeError:
        return max(
            (i for i, s in enumerate(spellings) if s and part.startswith(s)),
            key=lambda i: len(spellings[i]),
            default=None,
        )


def candidates(case: Case, p: int, project: Mapping[bytes, int | None]) -> dict[int, float]:
    """Sections 3 and 4 for one position: condition, set the gold token's mass aside, map what remains."""
    s = case.sequences
    start, end = int(s.target_ends[p]), int(s.target_ends[p + 1])
    q = case.row_at(start)
    read, needed = s.text[s.teacher_ends[q] : start], s.text[s.teacher_ends[q] : end]
    realised, gold = int(s.teacher_ids[q + 1]), int(s.target_ids[p + 1])
    row = {
        (t, spelled(case.teacher, t, case.teacher_has_bos and q == 0)): mass
        for t, mass in case.probabilities(q).items()
    }
    row = {key: mass for key, mass in row.items() if key[1].startswith(read)}
    given = sum(row.values()) if read else 1.0
    mapped: dict[int, float] = {}
    for (token, spelling), mass in row.items():
        mass /= given
        if s.teacher_ends[q + 1] > end and spelling.startswith(needed):
            continue
        if s.teacher_ends[q + 1] <= end and token == realised:
            mass -= gold_probability(case, start, end)
            mass = mass if mass > 1e-9 else 0.0
        rest = spelling[len(read) :]
        ours = case.target.eos_id if token == case.teacher.eos_id else project[rest] if rest else None
        if ours is not None and ours != gold and mass > 0:
            mapped[ours] = mapped.get(ours, 0.0) + mass
    return mapped


def edit_distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a):
        previous, row[0] = row[:], i + 1
        for j, y in enumerate(b):
            row[j + 1] = min(previous[j] + (x != y), previous[j + 1] + 1, row[j] + 1)
    return row[-1]


def warp(a: Sequence[str], b: Sequence[str]) -> list[list[int]]:
    """Dynamic time warping in float64: the items of b that each item of a is matched to."""
    total = np.full((len(a) + 1, len(b) + 1), math.inf)
    total[0, 0] = 0.0
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            total[i + 1, j + 1] = edit_distance(x, y) + min(total[i, j], total[i, j + 1], total[i + 1, j])
    total = total[1:, 1:]
    matches: list[list[int]] = [[] for _ in a]
    i, j = len(a) - 1, len(b) - 1
    matches[i].append(j)
    while i > 0 or j > 0:
        diagonal = total[i - 1, j - 1] if i > 0 and j > 0 else math.inf
        up = total[i - 1, j] if i > 0 else math.inf
        left = total[i, j - 1] if j > 0 else math.inf
        move = int(np.argmin([diagonal, up, left]))
        i, j = i - (move != 2), j - (move != 1)
        matches[i].append(j)
    return matches
