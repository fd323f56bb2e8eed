"""A teacher's top-k on its own tokens becomes a distribution over the target's next token.

    text, both token sequences  ->  which teacher row stands at each target position   (spans, dtw)
    top-k rows and gold         ->  P(gold), mapped candidates, residual               (here)

Called by a teacher replica for each segment, from any thread; the kernels hold no GIL.

The gold rule: let S(e) be the log-probability, under the teacher, of the realised text up to byte e: the sum over
whole teacher tokens, plus at a boundary inside a token the log of the mass of all tokens that begin with the part
read. The gold token of a position costs S at its end minus S at its start, which conditions in the first teacher
token, multiplies over whole ones and marginalises in the last. The nats of any run of gold tokens telescope.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fusellm_ray.alignment.compiled import compiled, frozen
from fusellm_ray.alignment.dtw import sole_matches
from fusellm_ray.alignment.edit_distance import Strings
from fusellm_ray.alignment.spans import TokenSequence, teacher_indices
from fusellm_ray.alignment.vocabulary import (
    NOWHERE,
    UNRESOLVED,
    VocabularyMap,
    Vocabulary,
    string_of,
    text_tokens,
)
from fusellm_ray.config import AlignmentConfig
from fusellm_ray.errors import AlignmentError

# What stands at a position instead of a teacher row.
NOTHING = -1
ONE_HOT = -2

MAX_MASS = 1.01  # of the probabilities received for one row; rounding explains less
ROUNDING = 1e-9  # a difference of two probabilities that is nothing
PENDING = 4096  # entries of the maps that one pass may ask for


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


class TeacherRows(NamedTuple):
    """What the teacher said; row q holds its prediction of token q + 1."""

    ids: NDArray[np.int32]
    """[M] its own tokens."""
    ends: NDArray[np.int32]
    """[M]"""
    top_ids: NDArray[np.int32]
    """[M-1, K]"""
    top_logprobs: NDArray[np.float32]
    """[M-1, K]"""
    gold: NDArray[np.float32]
    """[M-1] logprob of ids[q + 1] in row q; NaN: there is no row q."""
    has_bos: bool


class Tables(NamedTuple):
    """`vocabulary.VocabularyMap` for kernels."""

    flat: NDArray[np.uint8]
    start: NDArray[np.int32]
    lead: NDArray[np.int32]
    whole: NDArray[np.int32]
    suffix: NDArray[np.int32]
    at_start: NDArray[np.int32]


class Positions(NamedTuple):
    """What the target predicts; position p predicts token p + 1."""

    ids: NDArray[np.int32]
    """[T] target tokens."""
    ends: NDArray[np.int32]
    """[T]"""
    has_bos: bool
    index: NDArray[np.int32]
    """[T] teacher token at the last boundary at or before each end."""
    row: NDArray[np.int32]
    """[T] teacher row that applies, NOTHING or ONE_HOT."""
    is_warped: bool
    """Rows come from `dtw`: their boundaries may lie elsewhere than the target's."""


class Read(NamedTuple):
    """S, at each target token's end."""

    logprob: NDArray[np.float64]
    """[T] S; NaN where the teacher has no say."""
    inside: NDArray[np.float64]
    """[T] the part of S that lies inside a teacher token: log of the mass that begins with the part read, or 0."""
    gaps: NDArray[np.int32]
    """[T] teacher tokens so far that were never predicted; S leaves them out."""


class Found(NamedTuple):
    """Candidates of one position while they are collected."""

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float64]
    mass: NDArray[np.float64]


class Aligner:
    """Aligns one teacher to the target; built once per pair of tokenizers."""

    def __init__(self, teacher: Vocabulary, target: Vocabulary, config: AlignmentConfig, top_k: int) -> None:
        self.teacher, self.target, self.config, self.top_k = teacher, target, config, top_k
        self.map = VocabularyMap(teacher, target, config.projection)
        self._tables = Tables(
            self.map.bytes.flat,
            self.map.bytes.start,
            self.map.bytes.lead,
            self.map.whole,
            self.map.suffix,
            self.map.at_start,
        )
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
        """Bring a teacher's scores of one segment to the target's positions and vocabulary.

        Args:
            text: the segment, which both token sequences cover.
            target_ids, target_ends: [T] with BOS and EOS as the tokenizer adds them.
            teacher_ids, teacher_ends: [M] likewise.
            top_ids, top_logprobs: [M-1, K] the teacher's most probable next tokens, in nats; -inf: unused.
            gold_logprobs: [M-1] of teacher_ids[q + 1] in row q; NaN where the teacher has no distribution.

        Raises:
            AlignmentError: lengths, offsets or probabilities that do not belong together.
        """
        target = TokenSequence.of(self.target, target_ids, target_ends, len(text), "target")
        teacher = TokenSequence.of(self.teacher, teacher_ids, teacher_ends, len(text), "teacher")
        rows = _checked_rows(teacher, top_ids, top_logprobs, gold_logprobs, self.teacher.vocab_size)
        index = teacher_indices(target, teacher)
        positions = Positions(
            target.ids,
            target.ends,
            target.has_bos,
            index,
            frozen(self.rows(target, teacher, index), np.int32),
            self.config.sequence == "dtw",
        )
        letters = np.frombuffer(text, np.uint8)
        read = _read_logprobs(letters, positions, rows, self._tables)
        while True:
            pending = np.empty(PENDING, np.int64)
            ids, logprobs, gold, residual, valid, mass, num_pending = _project(
                letters, positions, rows, self._tables, read, self.top_k, pending
            )
            if num_pending == 0:
                break
            self.map.resolve(pending[:num_pending])
        if not mass <= MAX_MASS:
            raise AlignmentError(
                f"teacher: the probabilities of one row sum to {mass:.4f}, more than {MAX_MASS}; "
                "give logprobs in nats, normalised over the whole vocabulary"
            )
        scored = ~np.isnan(rows.gold)
        if (
            target.has_eos < teacher.has_eos
        ):  # the target does not predict an end: neither is the teacher judged on it
            scored[-1] = False
        return Aligned(
            ids,
            logprobs,
            gold,
            residual,
            valid,
            teacher_nats=-float(rows.gold[scored].sum(dtype=np.float64)),
            teacher_tokens=int(scored.sum()),
            teacher_bytes=int(np.diff(rows.ends)[scored].sum()),
        )

    def rows(
        self, target: TokenSequence, teacher: TokenSequence, index: NDArray[np.int32]
    ) -> NDArray[np.int32]:
        """Teacher row that applies at each target token, NOTHING or ONE_HOT, by the configured options."""
        if self.config.sequence == "dtw":
            return self._matched_rows(target, teacher)
        if self.config.straddle == "condition":
            return index
        is_inside = (index >= 0) & (teacher.ends[index] < target.ends)
        instead = ONE_HOT if self.config.straddle == "onehot" else NOTHING
        return np.where(is_inside, np.int32(instead), index)

    def _matched_rows(self, target: TokenSequence, teacher: TokenSequence) -> NDArray[np.int32]:
        """The paper's rule: a sole match that is equal (EM) or mined to the target token (MinED), else one-hot."""
        rows = np.full(len(target.ids), ONE_HOT, np.int32)
        if target.has_bos:
            rows[0] = 0 if teacher.has_bos else NOTHING
        ours, theirs = target.ids[target.text_tokens], teacher.ids[teacher.text_tokens]
        match = sole_matches(self._strings, ours, theirs + np.int32(self.target.vocab_size))
        if len(match) == 0 or len(theirs) == 0:
            return rows
        matched = theirs[match]
        is_same = self._spelling[ours] == self._spelling[matched + self.target.vocab_size]
        if match[0] == 0:  # at the start of a text "▁foo" and "foo" may be the same bytes
            is_same[0] |= self._at_start(self.target, ours[0]) == self._at_start(self.teacher, matched[0])
        if self.config.projection == "mined":
            is_same |= self.map.whole[matched] == ours
        rows[target.text_tokens] = np.where(
            (match >= 0) & is_same, match + np.int32(teacher.has_bos), ONE_HOT
        )
        return rows

    @staticmethod
    def _at_start(vocabulary: Vocabulary, token: int) -> bytes:
        part = vocabulary.token_bytes[token] or b""
        return part.removeprefix(b" ") if vocabulary.strips_leading_space else part


def _checked_rows(
    teacher: TokenSequence,
    top_ids: NDArray[np.int32],
    top_logprobs: NDArray[np.float32],
    gold: NDArray[np.float32],
    vocab_size: int,
) -> TeacherRows:
    m = max(len(teacher.ids) - 1, 0)
    if top_ids.ndim != 2 or top_ids.shape != top_logprobs.shape or len(top_ids) != m or gold.shape != (m,):
        raise AlignmentError(
            f"teacher: {len(teacher.ids)} tokens need {m} rows, got top_ids {top_ids.shape}, "
            f"top_logprobs {top_logprobs.shape}, gold_logprobs {gold.shape}"
        )
    if m and top_ids.size and (top_ids.min() < 0 or top_ids.max() >= vocab_size):
        raise AlignmentError(
            f"teacher: top_ids from {top_ids.min()} to {top_ids.max()}, vocabulary {vocab_size}; "
            "load its tokenizer with its model's vocab_size"
        )
    if np.isinf(gold).any():
        raise AlignmentError(
            f"teacher: gold_logprobs[{int(np.isinf(gold).argmax())}] is infinite; "
            "the realised token always has some probability, and NaN says that there is no distribution"
        )
    return TeacherRows(
        teacher.ids,
        teacher.ends,
        frozen(top_ids, np.int32),
        frozen(top_logprobs, np.float32),
        frozen(gold, np.float32),
        teacher.has_bos,
    )


def _spellings(tokens: list[bytes]) -> NDArray[np.int32]:
    """A number for each token's bytes, equal where they are; tokens without bytes equal none."""
    number: dict[bytes, int] = {}
    return np.array(
        [number.setdefault(part, len(number)) if part else -1 - i for i, part in enumerate(tokens)], np.int32
    )


@__import__("numba").njit(nogil=True, _nrt=False, forceinline=True)
def _begins(tables, token, lead, text, start, end):
    """Whether the token's bytes, from `lead` on, begin with text[start:end]."""
    first = tables.start[token] + lead
    if tables.start[token + 1] - first < end - start:
        return False
    for i in range(end - start):
        if tables.flat[first + i] != text[start + i]:
            return False
    return True


@__import__("numba").njit(nogil=True, _nrt=False, forceinline=True)
def _lead(tables, rows, token, q):
    """Bytes of the token that the start of the text swallows, if row q predicts the start."""
    return tables.lead[token] if q == 0 and rows.has_bos else 0


@compiled
def _read_logprobs(text, positions, rows, tables):
    num_tokens = len(rows.ids)
    whole = np.zeros(num_tokens + 1)
    gaps_before = np.zeros(num_tokens + 1, np.int32)
    for j in range(1, num_tokens):
        is_gap = np.isnan(rows.gold[j - 1])
        whole[j] = whole[j - 1] + (0.0 if is_gap else rows.gold[j - 1])
        gaps_before[j] = gaps_before[j - 1] + (1 if is_gap else 0)
    n = len(positions.ends)
    read = Read(np.full(n, np.nan), np.zeros(n), np.zeros(n, np.int32))
    for i in range(n):
        q = positions.index[i]
        if q < 0:
            continue
        if rows.ends[q] < positions.ends[i]:
            read.inside[i] = _log_mass_beginning_with(text, rows.ends[q], positions.ends[i], rows, q, tables)
        read.logprob[i] = whole[q] + read.inside[i]
        read.gaps[i] = gaps_before[q]
    return read


@__import__("numba").njit(nogil=True, _nrt=False, forceinline=True)
def _log_mass_beginning_with(text, start, end, rows, q, tables):
    """Log of the mass in row q on tokens that begin with text[start:end]; the realised one does, whatever its bytes."""
    mass = np.exp(np.float64(rows.gold[q]))
    for c in range(rows.top_ids.shape[1]):
        token = rows.top_ids[q, c]
        if token != rows.ids[q + 1] and _begins(
            tables, token, _lead(tables, rows, token, q), text, start, end
        ):
            mass += np.exp(np.float64(rows.top_logprobs[q, c]))
    return np.log(mass)


@compiled
def _project(text, positions, rows, tables, read, top_k, pending):
    """All positions. The last result counts the map entries that were missing: with any, call again."""
    n = max(len(positions.ids) - 1, 0)
    ids = np.zeros((n, top_k), np.int32)
    logprobs = np.full((n, top_k), -np.inf, np.float32)
    gold = np.full(n, -np.inf, np.float32)
    residual = np.full(n, -np.inf, np.float32)
    valid = np.zeros(n, np.bool_)
    capacity = rows.top_ids.shape[1] + 1
    found = Found(np.empty(capacity, np.int32), np.empty(capacity), np.empty(capacity))
    most_mass = 0.0
    num_pending = 0
    for p in range(n):
        gold_logprob = read.logprob[p + 1] - read.logprob[p]
        is_known = read.gaps[p + 1] == read.gaps[p] and not np.isnan(gold_logprob)
        if is_known:
            gold[p] = gold_logprob
        row = positions.row[p]
        if row == ONE_HOT:
            gold[p], valid[p] = 0.0, True
            continue
        if row < 0 or row >= len(rows.gold) or np.isnan(rows.gold[row]):
            continue
        is_shifted = positions.is_warped and (
            row != positions.index[p] or rows.ends[row] != positions.ends[p]
        )
        if is_shifted:
            size, gold_mass = _collect_shifted(positions, p, rows, row, tables, found)
        elif is_known:
            gold_mass = np.exp(gold_logprob)
            size, num_pending = _collect(
                text, positions, p, rows, row, tables, read.inside[p], gold_mass, found, pending, num_pending
            )
        else:
            continue
        valid[p] = True
        if gold_mass == 0.0:  # a shifted row that says nothing of the gold token
            gold[p] = 0.0
            continue
        total = gold_mass + found.mass[:size].sum()
        if not total <= most_mass:  # NaN too
            most_mass = total
        gold[p] = np.log(gold_mass) if is_shifted else gold_logprob
        _sort(found, size)
        kept = gold_mass
        for c in range(min(size, top_k)):
            ids[p, c], logprobs[p, c] = found.ids[c], found.logprobs[c]
            kept += found.mass[c]
        if kept < 1.0:
            residual[p] = np.log(1.0 - kept)
    return ids, logprobs, gold, residual, valid, most_mass, num_pending


@__import__("numba").njit(nogil=True, _nrt=False, forceinline=True)
def _collect(text, positions, p, rows, q, tables, log_given, gold_mass, found, pending, num_pending):
    """Candidates of a position from row q, given that the token begins with the bytes read since."""
    start, end, gold_end = rows.ends[q], positions.ends[p], positions.ends[p + 1]
    is_first = p == 0 and positions.has_bos
    ends_inside = positions.index[p + 1] == q  # the gold token is a part of the realised teacher token
    realised, gold = rows.ids[q + 1], positions.ids[p + 1]
    size = 0
    for c in range(rows.top_ids.shape[1] + 1):
        if c < rows.top_ids.shape[1]:
            token = rows.top_ids[q, c]
            logprob = rows.top_logprobs[q, c] - log_given
            if token == realised or logprob == -np.inf:
                continue
            lead = _lead(tables, rows, token, q)
            if end > start and not _begins(tables, token, lead, text, start, end):
                continue
            if ends_inside and _begins(tables, token, lead, text, start, gold_end):
                continue  # part of P(gold)
            mass = np.exp(logprob)
        else:  # the realised token, less what P(gold) takes of it
            token = realised
            lead = _lead(tables, rows, token, q)
            mass = np.exp(rows.gold[q] - log_given) - gold_mass
            if ends_inside or mass <= ROUNDING or not _begins(tables, token, lead, text, start, end):
                continue
            logprob = np.log(mass)
        ours = _target_token(tables, token, lead, end - start, is_first)
        if ours == UNRESOLVED and num_pending < len(pending):
            pending[num_pending] = ~token if is_first else tables.start[token] + lead + end - start
            num_pending += 1
        if ours >= 0 and ours != gold:
            size = _add(found, size, ours, logprob, mass)
    return size, num_pending


@__import__("numba").njit(nogil=True, _nrt=False, forceinline=True)
def _target_token(tables, token, lead, skip, is_first):
    """Target token for the bytes from lead + skip on; NOWHERE if none are left, or UNRESOLVED."""
    if is_first:
        return tables.at_start[token]
    if lead + skip == 0:
        return tables.whole[token]
    offset = tables.start[token] + lead + skip
    return tables.suffix[offset] if offset < tables.start[token + 1] else NOWHERE


@compiled
def _collect_shifted(positions, p, rows, q, tables, found):
    """Candidates from a row whose boundary lies elsewhere, as the paper takes them; and the mass on gold."""
    gold, realised = positions.ids[p + 1], rows.ids[q + 1]
    gold_mass = 0.0
    size = 0
    for c in range(rows.top_ids.shape[1] + 1):
        is_realised = c == rows.top_ids.shape[1]
        token = realised if is_realised else rows.top_ids[q, c]
        if token == realised and not is_realised:
            continue
        logprob = np.float64(rows.gold[q] if is_realised else rows.top_logprobs[q, c])
        ours = tables.whole[token]
        mass = np.exp(logprob)
        if ours == gold:
            gold_mass += mass
        elif ours >= 0 and mass > 0.0:
            size = _add(found, size, ours, logprob, mass)
    return size, gold_mass


@__import__("numba").njit(nogil=True, _nrt=False, forceinline=True)
def _add(found, size, token, logprob, mass):
    """Several teacher tokens that become one target token add up."""
    for i in range(size):
        if found.ids[i] == token:
            found.mass[i] += mass
            found.logprobs[i] = np.log(found.mass[i])
            return size
    found.ids[size], found.logprobs[size], found.mass[size] = token, logprob, mass
    return size + 1


@__import__("numba").njit(nogil=True, _nrt=False, forceinline=True)
def _sort(found, size):
    """Most probable first; nearly so already."""
    for i in range(1, size):
        token, logprob, mass = found.ids[i], found.logprobs[i], found.mass[i]
        j = i
        while j > 0 and found.logprobs[j - 1] < logprob:
            found.ids[j], found.logprobs[j], found.mass[j] = (
                found.ids[j - 1],
                found.logprobs[j - 1],
                found.mass[j - 1],
            )
            j -= 1
        found.ids[j], found.logprobs[j], found.mass[j] = token, logprob, mass
