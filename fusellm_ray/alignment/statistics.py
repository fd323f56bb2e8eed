"""How well a teacher's distributions reach the target: the figures of `fusellm-ray align` and `check`.

A perfect alignment has coverage 1 and fidelity 1. Neither needs any training to be measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from fusellm_ray.alignment.marginals import NOTHING, ONE_HOT, Positions
from fusellm_ray.alignment.project import Aligned, Aligner
from fusellm_ray.alignment.spans import TokenSequence


class Kind(IntEnum):
    """How a target position got its distribution."""

    NONE = 0
    """It has none: the teacher has not read as far, or the position is masked."""
    EXACT = 1
    """Boundaries coincide, and the gold token is one teacher token."""
    PREFIX = 2
    """Boundaries coincide; the gold token is a part of a teacher token, or reaches into the next."""
    STRADDLED = 3
    """The boundary lies inside a teacher token (or, under dtw, elsewhere than the matched token's)."""
    ONE_HOT = 4
    """The gold token itself, with probability 1, instead of a distribution."""


@dataclass(frozen=True, slots=True)
class Sequences:
    """One text in both models' tokens; the first five arguments of `Aligner.align`."""

    text: bytes
    target_ids: NDArray[np.int32]
    target_ends: NDArray[np.int32]
    teacher_ids: NDArray[np.int32]
    teacher_ends: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class AlignmentStatistics:
    """Of some texts under one teacher. Shares are of target positions, masses are means over covered ones."""

    positions: int
    shares: dict[str, float]
    """By `Kind`, in lower case."""
    coverage: float
    """Share of positions with a distribution of the teacher's."""
    mapped_mass: float
    """Probability on the gold token and the candidates ..."""
    residual_mass: float
    """... and that on no named token: outside the top-k, or without a target token."""
    aligned_nats_per_byte: float
    """Of the gold tokens, over covered positions."""
    teacher_nats_per_byte: float
    """Of the teacher's own tokens."""

    @property
    def fidelity(self) -> float:
        """Aligned nats per byte over the teacher's own; NaN without any."""
        own = self.teacher_nats_per_byte
        return self.aligned_nats_per_byte / own if own else float("nan")


@dataclass(frozen=True, slots=True)
class MassStatistics:
    """Where the probability in a teacher's top-k rows goes under the vocabulary map alone; sums to 1."""

    exact: float
    """To the target token with the same bytes, or the same role."""
    other: float
    """To another one, by `prefix` or `mined`."""
    lost: float
    """To none."""
    unsent: float
    """Outside the top-k."""


def position_kinds(aligner: Aligner, sequences: Sequences) -> NDArray[np.uint8]:
    """The `Kind` of each target position [T-1], as far as the boundaries alone decide it."""
    num_bytes = len(sequences.text)
    target = TokenSequence.of(
        aligner.target, sequences.target_ids, sequences.target_ends, num_bytes, "target"
    )
    teacher = TokenSequence.of(
        aligner.teacher, sequences.teacher_ids, sequences.teacher_ends, num_bytes, "teacher"
    )
    return _kinds(aligner.positions(target, teacher), teacher)


def _kinds(positions: Positions, teacher: TokenSequence) -> NDArray[np.uint8]:
    row, boundary, ends = positions.row[:-1], positions.boundary, positions.ends
    kinds = np.full(len(row), Kind.NONE, np.uint8)
    kinds[row == ONE_HOT] = Kind.ONE_HOT
    has_row = (row > NOTHING) & (row < len(teacher.ids) - 1)
    if not has_row.any():
        return kinds
    coincides = has_row & (row == boundary[:-1]) & (teacher.ends[row] == ends[:-1])
    kinds[has_row] = Kind.STRADDLED
    kinds[coincides] = Kind.PREFIX
    is_whole = (boundary[1:] == row + 1) & (teacher.ends[boundary[1:]] == ends[1:])
    kinds[coincides & is_whole] = Kind.EXACT
    return kinds


def kind_shares(kinds: Sequence[NDArray[np.uint8]]) -> dict[str, float]:
    """Share of all positions by kind."""
    counts = sum((np.bincount(k, minlength=len(Kind)) for k in kinds), np.zeros(len(Kind), np.int64))
    return {kind.name.lower(): float(counts[kind] / max(counts.sum(), 1)) for kind in Kind}


def alignment_statistics(
    aligner: Aligner, sequences: Sequence[Sequences], aligned: Sequence[Aligned]
) -> AlignmentStatistics:
    """Figures over several texts and what `Aligner.align` made of them."""
    kinds = [position_kinds(aligner, s) for s in sequences]
    for k, a in zip(kinds, aligned, strict=True):
        k[~a.valid] = Kind.NONE
    is_covered = np.concatenate([(k != Kind.NONE) & (k != Kind.ONE_HOT) for k in kinds])
    gold = np.concatenate([a.gold for a in aligned])[is_covered]
    residual = np.exp(np.concatenate([a.residual for a in aligned])[is_covered], dtype=np.float64)
    gold_bytes = np.concatenate([np.diff(s.target_ends) for s in sequences])[is_covered]
    lost = float(residual.mean()) if len(residual) else float("nan")
    teacher_bytes = sum(a.teacher_bytes for a in aligned)
    return AlignmentStatistics(
        positions=len(is_covered),
        shares=kind_shares(kinds),
        coverage=float(is_covered.mean()) if len(is_covered) else 0.0,
        mapped_mass=1.0 - lost,
        residual_mass=lost,
        aligned_nats_per_byte=-float(gold.sum(dtype=np.float64)) / max(int(gold_bytes.sum()), 1),
        teacher_nats_per_byte=sum(a.teacher_nats for a in aligned) / max(teacher_bytes, 1),
    )


def mass_statistics(
    aligner: Aligner, top_ids: NDArray[np.int32], top_logprobs: NDArray[np.float32]
) -> MassStatistics:
    """Mean over rows [M-1, K] of a teacher's top-k."""
    mass = np.exp(top_logprobs, dtype=np.float64)
    rows = max(len(mass), 1)
    is_mapped, is_exact = aligner.map.whole[top_ids] >= 0, aligner.map.is_exact[top_ids]
    exact = float(mass[is_exact].sum()) / rows
    mapped = float(mass[is_mapped].sum()) / rows
    sent = float(mass.sum()) / rows
    return MassStatistics(exact=exact, other=mapped - exact, lost=sent - mapped, unsent=1.0 - sent)
