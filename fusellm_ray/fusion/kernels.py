"""The passes over a chunk's logits as Triton kernels: one that reads each logit, one that reads and writes it.

A program a row, float32 inside whatever the logits' type. Imported for logits on a GPU alone (`fusion.passes`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
"""Logits of a row that a program holds at once."""
_NUM_WARPS = 8


def row_mass(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(maximum, Σ exp(logits − maximum)) of each row [C, V]; (-inf, 0) for a row of -inf. float32 [C] each."""
    top, mass = logits.new_empty((2, len(logits)), dtype=torch.float32)
    _row_mass[(len(logits),)](
        logits, top, mass, logits.shape[1], logits.stride(0), block=_BLOCK, num_warps=_NUM_WARPS
    )
    return top, mass


def scaled_exp_(logits: Tensor, top: Tensor, factor: Tensor) -> None:
    """logits := factor · exp(logits − top), row by row."""
    _scaled_exp[(len(logits), triton.cdiv(logits.shape[1], _BLOCK))](
        logits, top, factor, logits.shape[1], logits.stride(0), block=_BLOCK, num_warps=_NUM_WARPS
    )


@triton.jit
def _row_mass(
    logits: Any, top: Any, mass: Any, num_columns: Any, row_stride: Any, block: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, block)
    # Each lane keeps the maximum and the mass of what it has seen; they are joined at the end.
    lane_top = tl.full((block,), -float("inf"), tl.float32)
    lane_mass = tl.zeros((block,), tl.float32)
    for start in range(0, num_columns, block):
        column = start + lane
        z = tl.load(logits + row * row_stride + column, mask=column < num_columns, other=-float("inf")).to(
            tl.float32
        )
        higher = tl.maximum(lane_top, z)
        base = tl.where(higher == -float("inf"), 0.0, higher)
        lane_mass = lane_mass * tl.exp(lane_top - base) + tl.exp(z - base)
        lane_top = higher
    row_top = tl.max(lane_top, axis=0)
    base = tl.where(row_top == -float("inf"), 0.0, row_top)
    tl.store(top + row, row_top)
    tl.store(mass + row, tl.sum(lane_mass * tl.exp(lane_top - base), axis=0))


@triton.jit
def _scaled_exp(
    logits: Any, top: Any, factor: Any, num_columns: Any, row_stride: Any, block: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < num_columns
    place = logits + row * row_stride + column
    z = tl.load(place, mask=inside, other=-float("inf")).to(tl.float32)
    value = tl.load(factor + row) * tl.exp(z - tl.load(top + row))
    tl.store(place, value.to(logits.dtype.element_ty), mask=inside)
