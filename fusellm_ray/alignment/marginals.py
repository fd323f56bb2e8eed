"""What a teacher's rows say at the target's positions: P(gold), the other candidates, what is left. Kernels.

The gold rule: let S(e) be the log-probability, under the teacher, of the realised text up to byte e: the sum
over whole teacher tokens, plus at a boundary inside a token the log of the mass of all tokens that begin with
the part read. The gold token of a position has S at its end less S at its start, which conditions in the
first teacher token, multiplies over whole ones and marginalises in the last. The nats of any run of gold
tokens telescope.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fusellm_ray.alignment.vocabulary import NOWHERE, UNRESOLVED
from fusellm_ray.compiled import compiled, inlined

# What stands at a position instead of a teacher row.
NOTHING = -1
ONE_HOT = -2

ROUNDING = 1e-9  # a probability that is nothing


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
    top_mass: NDArray[np.float32]
    """[M-1, K] exp of these: taken all at once it costs a fraction."""
    gold: NDArray[np.float32]
    """[M-1] logprob of ids[q + 1] in row q; NaN: there is no row q."""
    total: NDArray[np.float64]
    """[M] logprob of tokens 1..q together, without those that no row predicts ..."""
    gaps: NDArray[np.int32]
    """[M] ... and how many of them these are."""
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
    boundary: NDArray[np.int32]
    """[T] teacher token at the last boundary at or before each end."""
    row: NDArray[np.int32]
    """[T] teacher row that applies, NOTHING or ONE_HOT."""
    is_warped: bool
    """Rows come from `dtw`: their boundaries may lie elsewhere than the target's."""


class Read(NamedTuple):
    """S at each target token's end."""

    logprob: NDArray[np.float64]
    """[T] S; NaN where the teacher has no say."""
    inside: NDArray[np.float64]
    """[T] the part of S that lies inside a teacher token, else 0."""
    gaps: NDArray[np.int32]
    """[T] teacher tokens so far that no row predicts; S leaves them out."""

    @classmethod
    def empty(cls, num_tokens: int) -> Read:
        """To be filled."""
        return cls(np.empty(num_tokens), np.empty(num_tokens), np.empty(num_tokens, np.int32))


class Distributions(NamedTuple):
    """The result, as in `project.Aligned`."""

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    gold: NDArray[np.float32]
    residual: NDArray[np.float32]
    valid: NDArray[np.bool_]

    @classmethod
    def empty(cls, num_positions: int, top_k: int) -> Distributions:
        """To be filled."""
        n, k = num_positions, top_k
        return cls(
            np.empty((n, k), np.int32),
            np.empty((n, k), np.float32),
            np.empty(n, np.float32),
            np.empty(n, np.float32),
            np.empty(n, np.bool_),
        )


class Workspace(NamedTuple):
    """Candidates of the position at hand, and the map entries that were missing."""

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float64]
    mass: NDArray[np.float64]
    place: NDArray[np.int32]
    """[V] where a target token is in `ids`, if it is there: only then does that place hold its id."""
    missing: NDArray[np.int64]
    """As `VocabularyMap.resolve` takes them; if there are more, the next pass asks again."""

    @classmethod
    def empty(cls, num_candidates: int, vocab_size: int, num_missing: int) -> Workspace:
        n, v = num_candidates, vocab_size
        places, missing = np.zeros(v, np.int32), np.empty(num_missing, np.int64)
        return cls(np.empty(n, np.int32), np.empty(n), np.empty(n), places, missing)


@compiled
def add_up(top_ids, top_mass, gold, vocab_size, max_mass, total, gaps):
    """Fill `total` and `gaps` of `TeacherRows`.

    Returns:
        Whether all ids are of the vocabulary, and all rows and realised tokens have masses that can be.
    """
    for q in range(len(gold)):
        mass = 0.0
        for c in range(top_ids.shape[1]):
            if not 0 <= top_ids[q, c] < vocab_size:
                return False
            mass += top_mass[q, c]
        is_gap = np.isnan(gold[q])
        if not is_gap and not (mass <= max_mass and -np.inf < gold[q] <= max_mass - 1.0):
            return False
        total[q + 1] = total[q] + (0.0 if is_gap else gold[q])
        gaps[q + 1] = gaps[q] + is_gap
    return True


@compiled
def own_sums(gold, ends, num_rows):
    """Over the teacher's own tokens that rows say something of: nats, how many they are, their bytes."""
    nats, num_tokens, num_bytes = 0.0, 0, 0
    for q in range(num_rows):
        if not np.isnan(gold[q]):
            nats -= gold[q]
            num_tokens += 1
            num_bytes += ends[q + 1] - ends[q]
    return nats, num_tokens, num_bytes


@compiled
def read_logprobs(text, positions, rows, tables, read):
    """Fill `read`."""
    for i in range(len(positions.ends)):
        q = positions.boundary[i]
        read.logprob[i], read.inside[i], read.gaps[i] = np.nan, 0.0, 0
        if q < 0:
            continue
        if rows.ends[q] < positions.ends[i]:
            read.inside[i] = _log_mass_beginning_with(text, rows.ends[q], positions.ends[i], rows, q, tables)
        read.logprob[i] = rows.total[q] + read.inside[i]
        read.gaps[i] = rows.gaps[q]


@inlined
def _log_mass_beginning_with(text, start, end, rows, q, tables):
    """Of the tokens in row q that begin with text[start:end]; the realised one does, whatever its bytes."""
    realised = rows.ids[q + 1]
    mass = np.exp(np.float64(rows.gold[q]))
    for c in range(rows.top_ids.shape[1]):
        token = rows.top_ids[q, c]
        lead = _lead(tables, rows, token, q)
        if token != realised and _begins(tables, token, lead, text, start, end):
            mass += rows.top_mass[q, c]
    return np.log(mass)


@inlined
def _begins(tables, token, lead, text, start, end):
    """Whether the token's bytes, from `lead` on, begin with text[start:end]."""
    first = tables.start[token] + lead
    if tables.start[token + 1] - first < end - start:
        return False
    for i in range(end - start):  # noqa: SIM110 (no generators in numba)
        if tables.flat[first + i] != text[start + i]:
            return False
    return True


@inlined
def _lead(tables, rows, token, q):
    """Bytes of the token that the start of the text swallows, if row q predicts the start."""
    return tables.lead[token] if q == 0 and rows.has_bos else 0


@compiled
def project(text, positions, rows, tables, read, result, work, todo):
    """Fill `result` at the positions in `todo`; those that lacked map entries move to its front.

    Returns:
        How many map entries were missing, and at how many positions: resolve them and call again for these.
    """
    num_missing = num_again = 0
    for p in todo:
        gold_logprob = read.logprob[p + 1] - read.logprob[p]
        is_known = read.gaps[p + 1] == read.gaps[p] and not np.isnan(gold_logprob)
        _set_nothing(result, p)
        if is_known:
            result.gold[p] = gold_logprob
        row = positions.row[p]
        if row == ONE_HOT:
            _set_one_hot(result, p)
            continue
        if row < 0 or row >= len(rows.gold) or np.isnan(rows.gold[row]):
            continue
        if positions.is_warped and not (row == positions.boundary[p] and rows.ends[row] == positions.ends[p]):
            size, gold_mass = _collect_shifted(positions, p, rows, row, tables, work)
            if gold_mass == 0.0:
                _set_one_hot(result, p)
                continue
            result.gold[p] = np.log(gold_mass)
        elif is_known:
            gold_mass = np.exp(gold_logprob)
            size, num_missing, is_whole = _collect(
                text, positions, p, rows, row, tables, read.inside[p], gold_mass, work, num_missing
            )
            if not is_whole:
                todo[num_again] = p
                num_again += 1
                continue
        else:
            continue
        _store(result, p, gold_mass, work, size)
    return num_missing, num_again


@inlined
def _set_nothing(result, p):
    for c in range(result.ids.shape[1]):
        result.ids[p, c], result.logprobs[p, c] = 0, -np.inf
    result.gold[p] = result.residual[p] = -np.inf
    result.valid[p] = False


@inlined
def _set_one_hot(result, p):
    result.gold[p] = 0.0
    result.valid[p] = True


@inlined
def _store(result, p, gold_mass, work, size):
    """The best candidates and what they leave."""
    _sort(work, size)
    top_k = result.ids.shape[1]
    kept = gold_mass
    for c in range(min(size, top_k)):
        result.ids[p, c] = work.ids[c]
        result.logprobs[p, c] = work.logprobs[c]
        kept += work.mass[c]
    result.residual[p] = np.log(1.0 - kept) if kept < 1.0 - ROUNDING else -np.inf
    result.valid[p] = True


@inlined
def _collect(text, positions, p, rows, q, tables, log_given, gold_mass, work, num_missing):
    """Candidates of a position from row q, given that the token begins with the bytes read since."""
    start, end, gold_end = rows.ends[q], positions.ends[p], positions.ends[p + 1]
    is_first = p == 0 and positions.has_bos
    ends_inside = positions.boundary[p + 1] == q  # the gold token is a part of the realised teacher token
    realised, gold = rows.ids[q + 1], positions.ids[p + 1]
    num_candidates = rows.top_ids.shape[1]
    given = np.exp(log_given)
    size = 0
    is_whole = True
    for c in range(num_candidates + 1):
        if c < num_candidates:
            token = rows.top_ids[q, c]
            mass = rows.top_mass[q, c] / given
            if token == realised or mass == 0.0:
                continue
            lead = _lead(tables, rows, token, q)
            if end > start and not _begins(tables, token, lead, text, start, end):
                continue
            if ends_inside and _begins(tables, token, lead, text, start, gold_end):
                continue  # part of P(gold)
            logprob = rows.top_logprobs[q, c] - log_given
        else:  # the realised token, less what P(gold) takes of it
            if ends_inside:
                continue
            token = realised
            lead = _lead(tables, rows, token, q)
            mass = np.exp(rows.gold[q] - log_given) - gold_mass
            if mass <= ROUNDING or not _begins(tables, token, lead, text, start, end):
                continue
            logprob = np.log(mass)
        ours = _target_token(tables, token, lead, end - start, is_first)
        if ours == UNRESOLVED:
            is_whole = False
            if num_missing < len(work.missing):
                work.missing[num_missing] = ~token if is_first else tables.start[token] + lead + end - start
                num_missing += 1
        elif ours >= 0 and ours != gold:
            size = _add(work, size, ours, logprob, mass)
    return size, num_missing, is_whole


@inlined
def _target_token(tables, token, lead, skip, is_first):
    """Target token for the bytes from lead + skip on; NOWHERE if none are left, or UNRESOLVED."""
    if is_first:
        return tables.at_start[token]
    if lead + skip == 0:
        return tables.whole[token]
    offset = tables.start[token] + lead + skip
    return tables.suffix[offset] if offset < tables.start[token + 1] else NOWHERE


@compiled
def _collect_shifted(positions, p, rows, q, tables, work):
    """Candidates from a row whose boundary lies elsewhere, as the paper takes them; and the mass on gold."""
    gold, realised = positions.ids[p + 1], rows.ids[q + 1]
    gold_mass = 0.0
    size = 0
    num_candidates = rows.top_ids.shape[1]
    for c in range(num_candidates + 1):
        is_realised = c == num_candidates
        token = realised if is_realised else rows.top_ids[q, c]
        if token == realised and not is_realised:
            continue
        logprob = np.float64(rows.gold[q] if is_realised else rows.top_logprobs[q, c])
        mass = np.exp(logprob)
        ours = tables.whole[token]
        if ours == gold:
            gold_mass += mass
        elif ours >= 0 and mass > 0.0:
            size = _add(work, size, ours, logprob, mass)
    return size, gold_mass


@inlined
def _add(work, size, token, logprob, mass):
    """Several teacher tokens that become one target token add up."""
    i = work.place[token]
    if i < size and work.ids[i] == token:
        work.mass[i] += mass
        work.logprobs[i] = np.log(work.mass[i])
        return size
    work.place[token] = size
    work.ids[size], work.logprobs[size], work.mass[size] = token, logprob, mass
    return size + 1


@inlined
def _sort(work, size):
    """Most probable first; nearly so already."""
    for i in range(1, size):
        token, logprob, mass = work.ids[i], work.logprobs[i], work.mass[i]
        j = i
        while j > 0 and work.logprobs[j - 1] < logprob:
            work.ids[j] = work.ids[j - 1]
            work.logprobs[j] = work.logprobs[j - 1]
            work.mass[j] = work.mass[j - 1]
            j -= 1
        work.ids[j], work.logprobs[j], work.mass[j] = token, logprob, mass
