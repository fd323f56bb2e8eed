"""Levenshtein distances between many short strings: the cell costs of `dtw` and the search behind `mined`.

Myers's bit-parallel algorithm: one machine word holds a column of the distance matrix, so a pair of
tokens costs a few operations per character of the second. Strings are code points numbered densely.

Source: Myers, J. ACM 46(3), 1999; in Hyyrö's form for edit distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fusellm_ray.alignment.compiled import compiled

WORD = 64


@dataclass(frozen=True, slots=True)
class Strings:
    """Strings as one array: string i is letters[start[i]:start[i + 1]], letters numbered from 0."""

    letters: NDArray[np.int32]
    start: NDArray[np.int32]
    num_letters: int

    @classmethod
    def of(cls, strings: Sequence[str]) -> Strings:
        start = np.zeros(len(strings) + 1, np.int32)
        np.cumsum([len(s) for s in strings], out=start[1:])
        joined = "".join(strings).encode("utf-32-le", errors="surrogatepass")
        alphabet, letters = np.unique(np.frombuffer(joined, np.uint32), return_inverse=True)
        return cls(letters.astype(np.int32), start, len(alphabet))


def nearest(strings: Strings, num_queries: int) -> NDArray[np.int32]:
    """For each of the first `num_queries` strings the nearest of the others, the first on ties.

    Returns:
        Indices [num_queries], counted from the first string that is not a query.
    """
    lengths = np.diff(strings.start)[num_queries:]
    by_length = np.argsort(lengths, kind="stable").astype(np.int32)
    groups = np.searchsorted(lengths[by_length], np.arange(lengths.max(initial=0) + 2)).astype(np.int32)
    return _nearest(strings.letters, strings.start, strings.num_letters, num_queries, by_length, groups)


def pair_costs(strings: Strings, rows: NDArray[np.int32], columns: NDArray[np.int32]) -> NDArray[np.int32]:
    """Distances [len(rows), len(columns)] between strings given by their indices."""
    return _pair_costs(strings.letters, strings.start, strings.num_letters, rows, columns)


@compiled
def _set_pattern(pattern, masks):
    """Note in masks[letter] where the pattern has that letter."""
    bit = np.uint64(1)
    for letter in pattern:
        masks[letter] |= bit
        bit = bit << np.uint64(1)


@compiled
def _clear_pattern(pattern, masks):
    for letter in pattern:
        masks[letter] = np.uint64(0)


@compiled
def _distance_to_pattern(masks, length, text):
    """Distance of `text` to the pattern of 1 to 64 letters in `masks`."""
    one = np.uint64(1)
    top = one << np.uint64(length - 1)
    more = ~np.uint64(0)  # rows whose cell is one more than the cell above
    less = np.uint64(0)
    distance = length
    for letter in text:
        equal = masks[letter]
        vertical = equal | less
        horizontal = (((equal & more) + more) ^ more) | equal
        up = less | ~(horizontal | more)
        down = more & horizontal
        if up & top:
            distance += 1
        elif down & top:
            distance -= 1
        up = (up << one) | one
        down = down << one
        more = down | ~(vertical | up)
        less = up & vertical
    return distance


@compiled
def levenshtein(a, b):
    """Edit distance of two integer arrays of any length, by the textbook recurrence."""
    row = np.arange(len(b) + 1)
    for i in range(len(a)):
        diagonal = row[0]
        row[0] = i + 1
        for j in range(len(b)):
            substitute = diagonal + (a[i] != b[j])
            diagonal = row[j + 1]
            row[j + 1] = min(substitute, row[j + 1] + 1, row[j] + 1)
    return row[-1]


@compiled
def _distance(masks, pattern, text):
    """Distance of any two strings; `masks` holds the pattern where that fits a word."""
    if len(pattern) == 0:
        return len(text)
    if len(pattern) > WORD:
        return levenshtein(pattern, text)
    return _distance_to_pattern(masks, len(pattern), text)


@compiled
def _pair_costs(letters, start, num_letters, rows, columns):
    masks = np.zeros(num_letters, np.uint64)
    costs = np.empty((len(rows), len(columns)), np.int32)
    for r in range(len(rows)):
        pattern = letters[start[rows[r]] : start[rows[r] + 1]]
        if len(pattern) <= WORD:
            _set_pattern(pattern, masks)
        for c in range(len(columns)):
            text = letters[start[columns[c]] : start[columns[c] + 1]]
            costs[r, c] = _distance(masks, pattern, text)
        if len(pattern) <= WORD:
            _clear_pattern(pattern, masks)
    return costs


@compiled
def _letter_set(string):
    """A 64-bit summary: which letters occur, modulo 64."""
    bits = np.uint64(0)
    for letter in string:
        bits |= np.uint64(1) << np.uint64(letter & 63)
    return bits


@compiled
def _count_bits(x):
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((x * np.uint64(0x0101010101010101)) >> np.uint64(56))


@compiled
def _nearest(letters, start, num_letters, num_queries, by_length, groups):
    """by_length: the strings from shortest to longest; groups[n]: where those of length n begin in it."""
    longest = len(groups) - 2
    sets = np.empty(len(by_length), np.uint64)
    for i in range(len(by_length)):
        s = num_queries + by_length[i]
        sets[i] = _letter_set(letters[start[s] : start[s + 1]])
    masks = np.zeros(num_letters, np.uint64)
    found = np.empty(num_queries, np.int32)
    for q in range(num_queries):
        query = letters[start[q] : start[q + 1]]
        query_set = _letter_set(query)
        if len(query) <= WORD:
            _set_pattern(query, masks)
        best, best_index = len(query) + longest + 1, -1
        for apart in range(max(len(query), longest) + 1):
            if apart > best:  # strings that much longer or shorter are that far away
                break
            for side in range(2 if apart else 1):
                length = len(query) + apart if side else len(query) - apart
                if length < 0 or length > longest:
                    continue
                for i in range(groups[length], groups[length + 1]):
                    # Each letter that only one of the two has costs an edit.
                    apart_at_least = max(_count_bits(query_set & ~sets[i]), _count_bits(sets[i] & ~query_set))
                    if apart_at_least > best or (apart_at_least == best and by_length[i] > best_index):
                        continue
                    s = num_queries + by_length[i]
                    distance = _distance(masks, query, letters[start[s] : start[s + 1]])
                    if distance < best or (distance == best and by_length[i] < best_index):
                        best, best_index = distance, by_length[i]
        found[q] = best_index
        if len(query) <= WORD:
            _clear_pattern(query, masks)
    return found
