"""The paper's sequence alignment: dynamic time warping over token strings, compiled.

D[i, j] = cost(target i, teacher j) + min(D[i-1, j-1], D[i-1, j], D[i, j-1]), ties in that order, where the
cost is the Levenshtein distance of the two strings without their ▁/Ġ markers. Time and memory (a byte a cell)
grow with the product of the two lengths; each pair of distinct strings is compared once.

Source: FuseLLM, arXiv 2401.10491, section 3.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fusellm_ray.alignment.edit_distance import Strings, pair_costs
from fusellm_ray.compiled import compiled

DIAGONAL, UP, LEFT = 0, 1, 2


def sole_matches(
    strings: Strings, target: NDArray[np.int32], teacher: NDArray[np.int32]
) -> NDArray[np.int32]:
    """Warp one token sequence onto another.

    Args:
        strings: of both vocabularies, without markers.
        target, teacher: indices into `strings`, one a token.

    Returns:
        For each target token the only teacher token it is matched to, or -1 where there are several.
    """
    if len(target) == 0 or len(teacher) == 0:
        return np.full(len(target), -1, np.int32)
    rows, row_of = np.unique(target, return_inverse=True)
    columns, column_of = np.unique(teacher, return_inverse=True)
    costs = pair_costs(strings, rows, columns)
    moves = np.empty((len(target), len(teacher)), np.uint8)
    total = np.empty(len(teacher) + 1, np.int32)
    match = np.full(len(target), -1, np.int32)
    _fill_moves(moves, total, costs, row_of.astype(np.int32), column_of.astype(np.int32))
    _fill_matches(match, moves)
    return match


@compiled
def _fill_moves(moves, total, costs, rows, columns):
    """The predecessor of each cell's least cost; `total` is a row of D behind an unreachable cell."""
    unreachable = np.int32(2**30)
    total[:] = unreachable
    total[0] = 0
    for i in range(len(rows)):
        cost = costs[rows[i]]
        diagonal = total[0]
        total[0] = unreachable
        left = unreachable
        for j in range(len(columns)):
            up = total[j + 1]
            least, move = diagonal, DIAGONAL
            if up < least:
                least, move = up, UP
            if left < least:
                least, move = left, LEFT
            left = least + cost[columns[j]]
            moves[i, j] = move
            total[j + 1] = left
            diagonal = up


@compiled
def _fill_matches(match, moves):
    """Walk back from the last cell; a row that a move to the left stays in has several matches."""
    i, j = moves.shape[0] - 1, moves.shape[1] - 1
    match[i] = j
    while i > 0 or j > 0:
        move = moves[i, j]
        if move == LEFT:
            match[i] = -1
        else:
            i -= 1
        if move != UP:
            j -= 1
        if move != LEFT:
            match[i] = j
