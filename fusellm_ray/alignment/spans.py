"""Byte boundaries: which teacher token's distribution stands where each target token ends.

    target     BOS  he  llo  _world        ends 0 2 5 11
    teacher    BOS  hello  _wor  ld        ends 0 5 9 11
    index      0    0   1    3             "he" ends inside a teacher token: all that was read by then is BOS

In: ids and byte ends of both token sequences, BOS and EOS included. Out: one teacher index a target token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fusellm_ray.alignment.vocabulary import Vocabulary
from fusellm_ray.compiled import compiled, frozen
from fusellm_ray.errors import AlignmentError


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """One text in one model's tokens. `ends[i]`: bytes of the text read once token i has been read."""

    ids: NDArray[np.int32]
    ends: NDArray[np.int32]
    has_bos: bool
    has_eos: bool

    @classmethod
    def of(
        cls, vocabulary: Vocabulary, ids: NDArray, ends: NDArray, num_bytes: int, who: str
    ) -> TokenSequence:
        """Find BOS and EOS by role: they are where the tokenizer puts them, and cover no bytes.

        Raises:
            AlignmentError: the offsets do not describe a text of `num_bytes` bytes.
        """
        ids, ends = frozen(ids, np.int32), frozen(ends, np.int32)
        if ids.ndim != 1 or ids.shape != ends.shape:
            raise AlignmentError(
                f"{who}: ids {ids.shape} and ends {ends.shape} differ; give one end offset per token"
            )
        if len(ids) == 0:
            return cls(ids, ends, False, False)
        are_ends, are_ids = _check(ids, ends, num_bytes, vocabulary.vocab_size)
        if not are_ends:
            raise AlignmentError(
                f"{who}: byte ends go from {ends[0]} to {ends[-1]}; they must grow from 0 to the text's "
                f"{num_bytes} bytes. Tokenize this very text, and whole"
            )
        if not are_ids:
            raise AlignmentError(
                f"{who}: token ids from {ids.min()} to {ids.max()}, vocabulary {vocabulary.vocab_size}; "
                "load the tokenizer that made them, with its model's vocab_size"
            )
        has_bos = bool(vocabulary.bos_id is not None and ids[0] == vocabulary.bos_id and ends[0] == 0)
        before_last = ends[-2] if len(ids) > 1 else 0
        has_eos = bool(
            vocabulary.eos_id is not None and ids[-1] == vocabulary.eos_id and ends[-1] == before_last
        )
        return cls(ids, ends, has_bos, has_eos and not (has_bos and len(ids) == 1))

    @property
    def text_tokens(self) -> slice:
        """Without BOS and EOS."""
        return slice(int(self.has_bos), len(self.ids) - self.has_eos)


@compiled
def _check(ids, ends, num_bytes, vocab_size):
    """Whether ends grow from 0 to `num_bytes`, and whether all ids are of the vocabulary."""
    are_ends = ends[0] >= 0 and ends[-1] == num_bytes
    are_ids = True
    for i in range(len(ids)):
        are_ids &= 0 <= ids[i] < vocab_size
        are_ends &= i == 0 or ends[i] >= ends[i - 1]
    return are_ends, are_ids


def teacher_indices(target: TokenSequence, teacher: TokenSequence) -> NDArray[np.int32]:
    """For each target token the teacher token at the last boundary at or before its end.

    BOS pairs with BOS and EOS with EOS. A token of no width (a lone SentencePiece marker, the first part of a
    character that normalisation split) belongs to the bytes after it: of several that end at one byte, the
    first pairs with the first and so on, so that equal tokenizers pair one to one.

    Returns:
        Teacher indices [T]; -1 where the teacher has not read anything yet, nor begun.
    """
    index = np.full(len(target.ends), -1, np.int32)
    _fill_indices(
        index, target.ends, target.has_bos, target.has_eos, teacher.ends, teacher.has_bos, teacher.has_eos
    )
    return index


@compiled
def _fill_indices(index, target_ends, target_bos, target_eos, teacher_ends, teacher_bos, teacher_eos):
    first = 1 if teacher_bos else 0
    stop = len(teacher_ends) - (1 if teacher_eos else 0)
    before_text = 0 if teacher_bos else -1
    first_of_ours = 1 if target_bos else 0
    if target_bos:
        index[0] = before_text
    j = first - 1  # the last text token that ends before the boundary
    for i in range(first_of_ours, len(target_ends) - (1 if target_eos else 0)):
        end = target_ends[i]
        if i > first_of_ours and target_ends[i - 1] == end:
            candidate, otherwise = index[i - 1] + 1, index[i - 1]
        else:
            while j + 1 < stop and teacher_ends[j + 1] < end:
                j += 1
            candidate, otherwise = j + 1, j if j >= first else before_text
        is_at_end = candidate < stop and teacher_ends[candidate] == end
        index[i] = candidate if is_at_end else otherwise
    if target_eos and teacher_eos:
        index[-1] = len(teacher_ends) - 1
