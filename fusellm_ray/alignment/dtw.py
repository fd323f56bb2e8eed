"""The paper's sequence alignment: dynamic time warping over token strings, compiled.

D[i, j] = cost(target i, teacher j) + min(D[i-1, j-1], D[i-1, j], D[i, j-1]), ties in that order, where the cost is
the Levenshtein distance of the two strings without their ▁/Ġ markers. Time and memory (a byte a cell) grow with
the product of the two lengths; each pair of distinct strings is compared once.

Source: FuseLLM, arXiv 2401.10491, section 3.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fusellm_ray.alignment.compiled import compiled
from fusellm_ray.alignment.edit_distance import Strings, pair_costs

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
    moves = _moves(costs, row_of.astype(np.int32), column_of.astype(np.int32))
    return _sole_matches(moves)


@compiled
def _moves(costs, rows, columns):
    """The predecessor that each cell's least cost came from: uint8 [T, M]."""
    num_rows, num_columns = len(rows), len(columns)
    unreachable = np.int32(2**30)
    moves = np.empty((num_rows, num_columns), np.uint8)
    total = np.full(num_columns + 1, unreachable, np.int32)  # row i of D, after a column of unreachable cells
    total[0] = 0
    for i in range(num_rows):
        cost = costs[rows[i]]
        diagonal = total[0]
        total[0] = unreachable
        left = unreachable
        for j in range(num_columns):
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
    return moves


@compiled
def _sole_matches(moves):
    i, j = moves.shape[0] - 1, moves.shape[1] - 1
    match = np.full(moves.shape[0], -1, np.int32)
    match[i] = j
    while i > 0 or j > 0:
        move = moves[i, j]
        if move == LEFT:
            match[i] = -1
        if move != LEFT:
            i -= 1
        if move != UP:
            j -= 1
        if move != LEFT:
            match[i] = j
    return match
