"""Logprobs as they travel, in float16: rounded on a teacher; read, checked and normalised on a rank. Kernels.

They do what numpy's `astype`, `exp` and `sum` would, in one pass and a fraction of the time: numpy converts float16 in
software, one number after the other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusellm_ray.compiled import compiled, frozen

_VALUES = frozen(np.arange(1 << 16, dtype=np.uint16).view(np.float16), np.float32)
"""The value of each float16 number, by its bits ..."""
with np.errstate(over="ignore", invalid="ignore"):
    _EXP = frozen(np.exp(_VALUES), np.float32)
    """... and its exponential."""


def rounded(values: NDArray[np.float32]) -> NDArray[Any]:
    """The nearest float16 numbers, ties to even; infinite where they are out of range."""
    halves = np.empty(values.size, np.uint16)
    _round(frozen(values.reshape(-1), np.float32), halves)
    return halves.view(np.float16).reshape(values.shape)


def normalised(
    logprobs: NDArray[np.float16],
    gold: NDArray[np.float16],
    residual: NDArray[np.float16],
    valid: NDArray[np.bool_],
    tolerance: float,
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32], int]:
    """A batch of distributions in float32; where valid, divided by the sum of their probabilities.

    Args:
        logprobs: [N, k], nats.
        gold, residual: [N]
        valid: [N]; elsewhere only the gold token's logprob means something.
        tolerance: how far from one probabilities may add up, and how far above zero a gold logprob may be.

    Returns:
        logprobs, gold, residual, and the first position that holds something else, or -1.
    """
    halves = (logprobs, gold, residual)
    out = tuple(np.empty(array.shape, np.float32) for array in halves)
    bits = (frozen(array.view(np.uint16), np.uint16) for array in halves)
    wrong = _normalise(*bits, frozen(valid, np.bool_), tolerance, _VALUES, _EXP, *out)
    return out[0], out[1], out[2], wrong


@compiled
def _round(values, halves):
    """float32 numbers as the bits of float16 numbers."""
    for i in range(len(values)):
        bits = int(np.float32(values[i]).view(np.uint32))
        sign, size = bits >> 16 & 0x8000, bits & 0x7FFFFFFF
        if size > 0x7F800000:  # not a number
            half = 0x7E00
        elif size >= 0x47800000:  # 2^16 or more
            half = 0x7C00
        elif size >= 0x38800000:  # 2^-14 or more: 13 bits fewer, and another offset of the exponent
            half = (size - 0x38000000 + 0xFFF + (size >> 13 & 1)) >> 13
        else:  # a multiple of 2^-24, as the float32 numbers from 0.5 to 1 are
            half = int(np.float32(abs(values[i]) + 0.5).view(np.uint32)) - 0x3F000000
        halves[i] = sign | half


@compiled
def _normalise(
    logprob_bits, gold_bits, residual_bits, valid, tolerance, value, exp, logprobs, gold, residual
):
    """Fill the last three; returns the first wrong position, or -1."""
    for p in range(len(valid)):
        mass = np.float32(0.0)
        for c in range(logprob_bits.shape[1]):
            mass += exp[logprob_bits[p, c]]
        mass += exp[gold_bits[p]] + exp[residual_bits[p]]
        gold[p], residual[p] = value[gold_bits[p]], value[residual_bits[p]]
        is_sound = abs(mass - 1.0) <= tolerance if valid[p] else gold[p] <= tolerance
        if not (is_sound and np.isfinite(mass)):
            return p
        log_mass = np.log(mass) if valid[p] else np.float32(0.0)
        for c in range(logprob_bits.shape[1]):
            logprobs[p, c] = value[logprob_bits[p, c]] - log_mass
        gold[p] -= log_mass
        residual[p] -= log_mass
    return -1
