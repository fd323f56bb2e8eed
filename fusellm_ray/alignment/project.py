"""A teacher's top-k on its own tokens becomes a distribution over the target's next token.

    text, both token sequences  ->  which teacher row stands at each target position   (spans, dtw)
    top-k rows and gold         ->  P(gold), mapped candidates, residual               (marginals, vocabulary)

Called by a teacher replica for the segments of each request, from any thread; the kernels hold no GIL.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fusellm_ray.alignment.dtw import sole_matches
from fusellm_ray.alignment.edit_distance import Strings
from fusellm_ray.alignment.marginals import (
    NOTHING,
    ONE_HOT,
    Distributions,
    Positions,
    Read,
    Tables,
    TeacherRows,
    Workspace,
    add_up,
    own_sums,
    project,
    read_logprobs,
)
from fusellm_ray.alignment.spans import TokenSequence, teacher_indices
from fusellm_ray.alignment.vocabulary import Vocabulary, VocabularyMap, string_of, text_tokens
from fusellm_ray.compiled import frozen
from fusellm_ray.config import AlignmentConfig
from fusellm_ray.errors import AlignmentError

_MAX_MASS = 1.01  # of the probabilities received for one row; rounding explains less
_MAX_MISSING = 4096  # map entries that one pass may ask for


@dataclass(frozen=True, slots=True)
class Aligned:
    """One segment, one teacher, in the target's vocabulary: n positions, k candidates, nats.

    Where valid, exp(logprobs).sum() + exp(gold) + exp(residual) = 1.
    """

    ids: NDArray[np.int32]
    """[n, k] candidates other than the gold token, most probable first; unused slots are id 0 at -inf."""
    logprobs: NDArray[np.float32]
    """[n, k]"""
    gold: NDArray[np.float32]
    """[n] logprob of the gold token, also where masked; -inf where unknown."""
    residual: NDArray[np.float32]
    """[n] log of the mass on all other tokens; -inf where nothing is left."""
    valid: NDArray[np.bool_]
    """[n] a distribution is available."""
    teacher_nats: float
    """The teacher's own nats on its own tokens of the segment ..."""
    teacher_tokens: int
    """... over this many of them (those it has a distribution for) ..."""
    teacher_bytes: int
    """... which cover this many bytes."""


class Scored(NamedTuple):
    """One segment as a teacher has scored it."""

    text: bytes
    """Which both token sequences cover."""
    target_ids: NDArray[np.int32]
    """[T] with BOS and EOS as the tokenizer adds them."""
    target_ends: NDArray[np.int32]
    teacher_ids: NDArray[np.int32]
    """[M] likewise."""
    teacher_ends: NDArray[np.int32]
    top_ids: NDArray[np.int32]
    """[M-1, K] the teacher's most probable next tokens."""
    top_logprobs: NDArray[np.float32]
    """[M-1, K] nats; -inf: unused."""
    gold_logprobs: NDArray[np.float32]
    """[M-1] of teacher_ids[q + 1] in row q; NaN where the teacher has no distribution."""


@dataclass(slots=True)
class _Segment:
    """One on its way from `Scored` to `Aligned`."""

    letters: NDArray[np.uint8]
    positions: Positions
    rows: TeacherRows
    read: Read
    result: Distributions
    own: tuple[float, int, int]
    """As the last three of `Aligned`."""
    todo: NDArray[np.int32]
    """Positions that are not filled yet."""


class Aligner:
    """Aligns one teacher to the target; built once per pair of tokenizers.

    Under `dtw` a matched teacher token's row applies as it stands, the gold token's probability by the gold
    rule. Where the matched token ends at another byte than the target's (the paper accepts that, at up to 1 %
    of positions), the gold token has the mass mapped onto it; with none the position is one-hot.
    """

    def __init__(self, teacher: Vocabulary, target: Vocabulary, config: AlignmentConfig, top_k: int) -> None:
        self.teacher, self.target, self.config, self.top_k = teacher, target, config, top_k
        self.map = VocabularyMap(teacher, target, config.projection)
        table = self.map.bytes
        self._tables = Tables(
            table.flat, table.start, table.lead, self.map.whole, self.map.suffix, self.map.at_start
        )
        self._local = threading.local()
        if config.sequence == "dtw":
            tokens = text_tokens(target) + text_tokens(teacher)
            self._strings = Strings.of([string_of(part) for part in tokens])
            self._spelling = _spellings(tokens)

    def align(
        self,
        text: bytes,
        target_ids: NDArray[np.int32],
        target_ends: NDArray[np.int32],
        teacher_ids: NDArray[np.int32],
        teacher_ends: NDArray[np.int32],
        top_ids: NDArray[np.int32],
        top_logprobs: NDArray[np.float32],
        gold_logprobs: NDArray[np.float32],
    ) -> Aligned:
        """Bring a teacher's scores of one segment to the target's positions and vocabulary; see `Scored`."""
        scored = Scored(
            text, target_ids, target_ends, teacher_ids, teacher_ends, top_ids, top_logprobs, gold_logprobs
        )
        return self.align_each([scored])[0]

    def align_each(self, segments: Sequence[Scored]) -> list[Aligned]:
        """The same for several segments: what they lack in the vocabulary's map is looked up at once.

        Raises:
            AlignmentError: lengths, offsets or probabilities that do not belong together.
        """
        begun = [self._begin(segment) for segment in segments]
        waiting = begun
        while waiting:
            missing = [self._project(part) for part in waiting]
            waiting = [part for part in waiting if len(part.todo)]
            if waiting:
                self.map.resolve(np.concatenate(missing))
        return [Aligned(*part.result, *part.own) for part in begun]

    def _begin(self, segment: Scored) -> _Segment:
        num_bytes = len(segment.text)
        target = TokenSequence.of(self.target, segment.target_ids, segment.target_ends, num_bytes, "target")
        teacher = TokenSequence.of(
            self.teacher, segment.teacher_ids, segment.teacher_ends, num_bytes, "teacher"
        )
        rows = _checked_rows(
            teacher, segment.top_ids, segment.top_logprobs, segment.gold_logprobs, self.teacher.vocab_size
        )
        # Where the target does not predict the end, the teacher is not judged on it either.
        nats, *sizes = own_sums(
            rows.gold, rows.ends, len(rows.gold) - (teacher.has_eos and not target.has_eos)
        )
        positions, letters = self.positions(target, teacher), np.frombuffer(segment.text, np.uint8)
        read = Read.empty(len(target.ids))
        read_logprobs(letters, positions, rows, self._tables, read)
        num_positions = max(len(target.ids) - 1, 0)
        return _Segment(
            letters=letters,
            positions=positions,
            rows=rows,
            read=read,
            result=Distributions.empty(num_positions, self.top_k),
            own=(max(0.0, nats), *sizes),  # rounding may pass a probability of 1
            todo=np.arange(num_positions, dtype=np.int32),
        )

    def _project(self, part: _Segment) -> NDArray[np.int64]:
        """Fill what can be filled of its result; returns the map's entries that the rest waits for."""
        work = self._workspace(part.rows.top_ids.shape[1] + 1)
        num_missing, num_again = project(
            part.letters, part.positions, part.rows, self._tables, part.read, part.result, work, part.todo
        )
        part.todo = part.todo[:num_again]
        return work.missing[:num_missing].copy()

    def _workspace(self, num_candidates: int) -> Workspace:
        """This thread's own."""
        work = getattr(self._local, "work", None)
        if work is None or len(work.ids) < num_candidates:
            work = self._local.work = Workspace.empty(num_candidates, self.target.vocab_size, _MAX_MISSING)
        return work

    def positions(self, target: TokenSequence, teacher: TokenSequence) -> Positions:
        """Which teacher row applies at each target token, NOTHING or ONE_HOT, by the configured options."""
        boundary = teacher_indices(target, teacher)
        if self.config.sequence == "dtw":
            row = self._matched_rows(target, teacher)
        elif self.config.straddle == "condition" or len(teacher.ids) == 0:
            row = boundary
        else:
            is_inside = (boundary >= 0) & (teacher.ends[boundary] < target.ends)
            row = np.where(is_inside, ONE_HOT if self.config.straddle == "onehot" else NOTHING, boundary)
        is_warped = self.config.sequence == "dtw"
        return Positions(target.ids, target.ends, target.has_bos, boundary, row.astype(np.int32), is_warped)

    def _matched_rows(self, target: TokenSequence, teacher: TokenSequence) -> NDArray[np.int32]:
        """The paper's rule: a sole match that is equal (EM) or mined to the token (MinED), else one-hot."""
        rows = np.full(len(target.ids), ONE_HOT, np.int32)
        if target.has_bos:
            rows[0] = 0 if teacher.has_bos else NOTHING
        ours, theirs = target.ids[target.text_tokens], teacher.ids[teacher.text_tokens]
        if len(ours) == 0 or len(theirs) == 0:
            return rows
        match = sole_matches(self._strings, ours, theirs + np.int32(self.target.vocab_size))
        matched = theirs[match]
        is_same = self._spelling[ours] == self._spelling[matched + self.target.vocab_size]
        if match[0] == 0:  # at the start of a text "▁foo" and "foo" may be the same bytes
            is_same[0] |= _at_start(self.target, ours[0]) == _at_start(self.teacher, matched[0])
        if self.config.projection == "mined":
            is_same |= self.map.whole[matched] == ours
        rows[target.text_tokens] = np.where((match >= 0) & is_same, match + teacher.has_bos, ONE_HOT)
        return rows


def _checked_rows(
    teacher: TokenSequence,
    top_ids: NDArray[np.int32],
    top_logprobs: NDArray[np.float32],
    gold: NDArray[np.float32],
    vocab_size: int,
) -> TeacherRows:
    num_tokens = len(teacher.ids)
    m = max(num_tokens - 1, 0)
    if top_ids.ndim != 2 or top_ids.shape != top_logprobs.shape or len(top_ids) != m or gold.shape != (m,):
        raise AlignmentError(
            f"teacher: {num_tokens} tokens need {m} rows, got top_ids {top_ids.shape}, "
            f"top_logprobs {top_logprobs.shape}, gold_logprobs {gold.shape}"
        )
    top_ids, top_logprobs = frozen(top_ids, np.int32), frozen(top_logprobs, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        top_mass = frozen(np.exp(top_logprobs), np.float32)
    gold = frozen(gold, np.float32)
    total, gaps = np.zeros(num_tokens), np.zeros(num_tokens, np.int32)
    if not add_up(top_ids, top_mass, gold, vocab_size, _MAX_MASS, total, gaps):
        raise AlignmentError(_problem(top_ids, top_mass, gold, vocab_size))
    return TeacherRows(
        teacher.ids, teacher.ends, top_ids, top_logprobs, top_mass, gold, total, gaps, teacher.has_bos
    )


def _problem(
    top_ids: NDArray[np.int32], top_mass: NDArray[np.float32], gold: NDArray[np.float32], vocab_size: int
) -> str:
    """What `add_up` found."""
    if top_ids.size and (top_ids.min() < 0 or top_ids.max() >= vocab_size):
        return (
            f"teacher: top_ids from {top_ids.min()} to {top_ids.max()}, vocabulary {vocab_size}; "
            "load its tokenizer with its model's vocab_size"
        )
    wrong = np.isinf(gold) | (gold > _MAX_MASS - 1)
    if wrong.any():
        row = int(wrong.argmax())
        return (
            f"teacher: gold_logprobs[{row}] is {gold[row]}; a realised token has a probability above 0 and at "
            "most 1 (NaN says that there is no distribution)"
        )
    total_mass = top_mass.sum(1, dtype=np.float64)
    row = int((~(total_mass <= _MAX_MASS) & ~np.isnan(gold)).argmax())  # NaN is not at most anything
    return (
        f"teacher: the probabilities of row {row} sum to {total_mass[row]:.4f}, more than {_MAX_MASS}; "
        "give logprobs in nats, normalised over the whole vocabulary"
    )


def _spellings(tokens: list[bytes]) -> NDArray[np.int32]:
    """A number for each token's bytes, equal where they are; tokens without bytes equal none."""
    number: dict[bytes, int] = {}
    numbers = [number.setdefault(part, len(number)) if part else ~i for i, part in enumerate(tokens)]
    return np.array(numbers, np.int32)


def _at_start(vocabulary: Vocabulary, token: int) -> bytes:
    part = vocabulary.token_bytes[token] or b""
    return part.removeprefix(b" ") if vocabulary.strips_leading_space else part
