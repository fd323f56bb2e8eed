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

from fusellm_ray.compiled import compiled, inlined

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
    lengths = np.diff(strings.start)
    by_length = np.argsort(lengths[num_queries:], kind="stable").astype(np.int32)
    longest = int(lengths[num_queries:].max(initial=0))
    groups = np.searchsorted(lengths[num_queries:][by_length], np.arange(longest + 2)).astype(np.int32)
    found = np.empty(num_queries, np.int32)
    scratch = _scratch(strings)
    _fill_nearest(
        found,
        strings.letters,
        strings.start,
        by_length,
        groups,
        np.empty(len(by_length), np.uint64),
        *scratch,
    )
    return found


def pair_costs(
    strings: Strings, rows: NDArray[np.integer], columns: NDArray[np.integer]
) -> NDArray[np.int32]:
    """Distances [len(rows), len(columns)] between strings given by their indices."""
    costs = np.empty((len(rows), len(columns)), np.int32)
    _fill_pair_costs(costs, strings.letters, strings.start, rows, columns, *_scratch(strings))
    return costs


def _scratch(strings: Strings) -> tuple[NDArray[np.uint64], NDArray[np.int32]]:
    """Masks, one a letter and all clear; and a row of the textbook recurrence."""
    longest = int(np.diff(strings.start).max(initial=0))
    return np.zeros(strings.num_letters, np.uint64), np.empty(longest + 1, np.int32)


@compiled
def levenshtein(a, b, row):
    """Edit distance of two integer arrays of any length, by the textbook recurrence in `row`."""
    for j in range(len(b) + 1):
        row[j] = j
    for i in range(len(a)):
        diagonal = row[0]
        row[0] = i + 1
        for j in range(len(b)):
            substitute = diagonal + (a[i] != b[j])
            diagonal = row[j + 1]
            row[j + 1] = min(substitute, row[j + 1] + 1, row[j] + 1)
    return row[len(b)]


@inlined
def _set_pattern(pattern, masks):
    """Note in masks[letter] where the pattern has that letter, if it fits a word."""
    if len(pattern) <= WORD:
        bit = np.uint64(1)
        for letter in pattern:
            masks[letter] |= bit
            bit = bit << np.uint64(1)


@inlined
def _clear_pattern(pattern, masks):
    for letter in pattern:
        masks[letter] = np.uint64(0)


@inlined
def _distance(pattern, text, masks, row):
    """Edit distance; `masks` holds the pattern."""
    if len(pattern) == 0:
        return len(text)
    if len(pattern) > WORD:
        return np.int64(levenshtein(pattern, text, row))
    one = np.uint64(1)
    top = one << np.uint64(len(pattern) - 1)
    more = ~np.uint64(0)  # rows whose cell is one more than the cell above ...
    less = np.uint64(0)  # ... or one less
    distance = len(pattern)
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
def _fill_pair_costs(costs, letters, start, rows, columns, masks, row):
    for r in range(len(rows)):
        pattern = letters[start[rows[r]] : start[rows[r] + 1]]
        _set_pattern(pattern, masks)
        for c in range(len(columns)):
            text = letters[start[columns[c]] : start[columns[c] + 1]]
            costs[r, c] = _distance(pattern, text, masks, row)
        _clear_pattern(pattern, masks)


@inlined
def _letter_set(string):
    """Which letters occur, modulo 64, as bits."""
    bits = np.uint64(0)
    for letter in string:
        bits |= np.uint64(1) << np.uint64(letter & 63)
    return bits


@inlined
def _count_bits(x):
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((x * np.uint64(0x0101010101010101)) >> np.uint64(56))


@compiled
def _fill_nearest(found, letters, start, by_length, groups, sets, masks, row):
    """by_length: the strings from shortest to longest; groups[n]: where those of length n begin in it."""
    num_queries, longest = len(found), len(groups) - 2
    for i in range(len(by_length)):
        s = num_queries + by_length[i]
        sets[i] = _letter_set(letters[start[s] : start[s + 1]])
    for q in range(num_queries):
        query = letters[start[q] : start[q + 1]]
        query_set = _letter_set(query)
        _set_pattern(query, masks)
        best, best_index = len(query) + longest + 1, -1
        for difference in range(max(len(query), longest) + 1):
            if difference > best:  # strings that much longer or shorter are that far away
                break
            for length in (len(query) - difference, len(query) + difference):
                if length < 0 or length > longest:
                    continue
                for i in range(groups[length], groups[length + 1]):
                    # Each letter that only one of the two has costs an edit.
                    at_least = max(_count_bits(query_set & ~sets[i]), _count_bits(sets[i] & ~query_set))
                    if at_least > best or (at_least == best and by_length[i] > best_index):
                        continue
                    s = num_queries + by_length[i]
                    distance = _distance(query, letters[start[s] : start[s + 1]], masks, row)
                    if distance < best or (distance == best and by_length[i] < best_index):
                        best, best_index = distance, by_length[i]
        found[q] = best_index
        _clear_pattern(query, masks)
