"""Plain Python to compare the compiled alignment with, and made-up teachers to feed both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fusellm_ray.alignment import Aligned, Aligner, Vocabulary
from fusellm_ray.config import AlignmentConfig
from fusellm_ray.corpus.tokens import ByteTokenizer


@dataclass(frozen=True)
class Case:
    """One text in both models' tokens, and a random teacher's rows: full [M-1, V], and its top k."""

    text: str
    target: ByteTokenizer
    teacher: ByteTokenizer
    ends_document: bool = True
    seed: int = 0
    k: int | None = None
    """None: the whole vocabulary."""

    def __post_init__(self) -> None:
        ours = self.target.sequence(self.text, self.ends_document)
        theirs = self.teacher.sequence(self.text, self.ends_document)
        rows = max(len(theirs.ids) - 1, 0)
        logits = 3.0 * np.random.default_rng(self.seed).standard_normal((rows, self.teacher.vocab_size))
        full = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        top = np.argsort(-full, axis=1, kind="stable")[:, : self.k].astype(np.int32)
        fields = {
            "ours": ours,
            "theirs": theirs,
            "full": full,
            "top_ids": top,
            "top_logprobs": np.take_along_axis(full, top, 1).astype(np.float32),
            "gold": full[np.arange(rows), theirs.ids[1:]].astype(np.float32),
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def align(
        self, aligner: Aligner | None = None, gold: np.ndarray | None = None, **options: str
    ) -> Aligned:
        k = self.k or self.teacher.vocab_size
        aligner = aligner or Aligner(self.teacher, self.target, AlignmentConfig(**options), k)
        ours, theirs = self.ours, self.theirs  # type: ignore[attr-defined]
        gold = self.gold if gold is None else gold  # type: ignore[attr-defined]
        arrays = (ours.ids, ours.ends, theirs.ids, theirs.ends, self.top_ids, self.top_logprobs, gold)  # type: ignore[attr-defined]
        return aligner.align(self.text.encode(), *arrays)


def total_mass(aligned: Aligned) -> np.ndarray:
    """Of each valid position: candidates, gold and residual."""
    parts = np.concatenate([aligned.logprobs, aligned.gold[:, None], aligned.residual[:, None]], axis=1)
    return np.exp(parts.astype(np.float64)).sum(1)[aligned.valid]


def spelled(vocabulary: Vocabulary, token: int, at_start: bool = False) -> bytes:
    part = vocabulary.token_bytes[token] or b""
    part = b"" if token in vocabulary.special_ids else part
    return part[1:] if at_start and vocabulary.strips_leading_space and part[:1] == b" " else part


def gold_probability(
    row_of: Mapping[int, Mapping[int, float]], vocabulary: Vocabulary, ids: Sequence[int], ends: Sequence[int],
    text: bytes, start: int, end: int,
) -> float:  # fmt: skip
    """Section 4's rule by the letter, for texts whose tokens spell them: row_of[q][token] = probability."""
    has_bos = ids[0] == vocabulary.bos_id

    def beginning_with(q: int, part: bytes) -> float:
        return sum(
            p for t, p in row_of[q].items() if spelled(vocabulary, t, has_bos and q == 0).startswith(part)
        )

    probability = 1.0
    for q in range(len(ids) - 1):
        first, last = ends[q], ends[q + 1]
        if last <= start or first >= end:
            continue
        if first < start:  # condition on the part already read
            probability /= beginning_with(q, text[first:start])
        if last <= end:
            probability *= row_of[q][ids[q + 1]]
        else:  # marginalise
            probability *= beginning_with(q, text[first:end])
    return probability


def first_target_token(target: ByteTokenizer, part: bytes) -> int | None:
    """The `prefix` projection of bytes inside a text, for a target without a dummy prefix."""
    exact = [i for i in range(target.vocab_size) if spelled(target, i) == part]
    if exact:
        return exact[0]
    try:
        return int(target.encode(part.decode()).ids[0])
    except UnicodeDecodeError:
        begun = [
            i for i in range(target.vocab_size) if spelled(target, i) and part.startswith(spelled(target, i))
        ]
        return max(begun, key=lambda i: len(spelled(target, i)))


def edit_distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a):
        previous, row[0] = row[:], i + 1
        for j, y in enumerate(b):
            row[j + 1] = min(previous[j] + (x != y), previous[j + 1] + 1, row[j] + 1)
    return row[-1]


def warp(a: Sequence[str], b: Sequence[str]) -> list[list[int]]:
    """Dynamic time warping in float64: the tokens of b that each token of a is matched to."""
    total = np.full((len(a) + 1, len(b) + 1), math.inf)
    total[0, 0] = 0.0
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            total[i + 1, j + 1] = edit_distance(x, y) + min(total[i, j], total[i, j + 1], total[i + 1, j])
    matches: list[list[int]] = [[] for _ in a]
    i, j = len(a), len(b)
    while i > 0 and j > 0:
        matches[i - 1].append(j - 1)
        move = int(np.argmin([total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]]))
        i, j = i - (move != 2), j - (move != 1)
    return matches
