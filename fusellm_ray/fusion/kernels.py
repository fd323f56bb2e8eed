"""What a GPU does between the head's products, as Triton kernels: a few launches a chunk, float32 inside.

Imported for tensors on a GPU alone, by `fusion.passes` and `fusion.divergence`, which say what each must equal.
Tensors are contiguous. Annotations of kernels are Triton's own types: its compiler looks each name up and knows no
other, though its interpreter takes any.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
"""Logits of a row that a program holds at once."""
_NUM_WARPS = 8
_TILE = 256
"""Entries of [rows, slots] that a program compares at once."""


def row_mass(logits: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's maximum, of `logits` [C, V] and of `slots` [C, m], and Σ exp(logits − maximum); float32 [C] both.

    (-inf, 0) where all of a row is -inf.
    """
    top, mass = logits.new_empty((2, len(logits)), dtype=torch.float32)
    _row_mass[(len(logits),)](
        logits,
        slots,
        top,
        mass,
        logits.shape[1],
        logits.stride(0),
        slots.shape[1],
        block=_BLOCK,
        slot_block=triton.next_power_of_2(slots.shape[1]),
        num_warps=_NUM_WARPS,
    )
    return top, mass


def scaled_exp_(logits: Tensor, top: Tensor, factor: Tensor) -> None:
    """logits := factor · exp(logits − top), row by row."""
    _scaled_exp[(len(logits), triton.cdiv(logits.shape[1], _BLOCK))](
        logits, top, factor, logits.shape[1], logits.stride(0), block=_BLOCK, num_warps=_NUM_WARPS
    )


def scale_(values: Tensor, factor: Tensor) -> None:
    """values *= factor, a scalar on the GPU: where it is 1, nothing is touched, and nobody waits to know."""
    _scale[(triton.cdiv(values.numel(), _BLOCK),)](
        values, factor, values.numel(), block=_BLOCK, num_warps=_NUM_WARPS
    )


def compare_slots(
    gathered: Tensor,
    top: Tensor,
    outside: Tensor,
    log_p: Tensor,
    residual: Tensor,
    listened: Tensor,
    *,
    divergence: str,
    tail: str,
    clm_weight: float,
    vocab_size: int,
    least_mass: float,
    least_teacher_mass: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`fusion.divergence._compare_slots` in one launch; the gradient of the slots in the type of `gathered`."""
    C, M = gathered.shape
    clm, fusion, factor = gathered.new_empty((3, C), dtype=torch.float32)
    values = torch.empty_like(gathered)
    slot_block = triton.next_power_of_2(M)
    rows = max(1, _TILE // slot_block)
    _compare_slots[(triton.cdiv(C, rows),)](
        gathered,
        top,
        outside,
        log_p,
        residual,
        listened,
        clm,
        fusion,
        values,
        factor,
        C,
        M,
        vocab_size,
        clm_weight,
        divergence=divergence,
        tail=tail,
        least_mass=least_mass,
        least_residual=math.log(least_teacher_mass),
        row_block=rows,
        slot_block=slot_block,
    )
    return clm, fusion, values, factor


@triton.jit
def _row_mass(
    logits: tl.tensor,
    slots: tl.tensor,
    top: tl.tensor,
    mass: tl.tensor,
    num_columns: tl.tensor,
    row_stride: tl.tensor,
    num_slots: tl.tensor,
    block: tl.constexpr,
    slot_block: tl.constexpr,
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
    slot = tl.arange(0, slot_block)
    in_slots = tl.load(slots + row * num_slots + slot, mask=slot < num_slots, other=-float("inf"))
    row_top = tl.maximum(tl.max(lane_top, axis=0), tl.max(in_slots.to(tl.float32), axis=0))
    base = tl.where(row_top == -float("inf"), 0.0, row_top)
    tl.store(top + row, row_top)
    tl.store(mass + row, tl.sum(lane_mass * tl.exp(lane_top - base), axis=0))


@triton.jit
def _scaled_exp(
    logits: tl.tensor,
    top: tl.tensor,
    factor: tl.tensor,
    num_columns: tl.tensor,
    row_stride: tl.tensor,
    block: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < num_columns
    place = logits + row * row_stride + column
    z = tl.load(place, mask=inside, other=-float("inf")).to(tl.float32)
    value = tl.load(factor + row) * tl.exp(z - tl.load(top + row))
    tl.store(place, value.to(logits.dtype.element_ty), mask=inside)


@triton.jit
def _scale(values: tl.tensor, factor: tl.tensor, count: tl.tensor, block: tl.constexpr) -> None:
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        value = tl.load(values + at, mask=at < count).to(tl.float32) * by
        tl.store(values + at, value.to(values.dtype.element_ty), mask=at < count)


@triton.jit
def _finite_logsumexp(row: tl.tensor, more: tl.tensor) -> tl.tensor:
    """Of [R, M] and one entry [R] more; 0 for a row of -inf."""
    top = tl.maximum(tl.max(row, axis=1), more)
    base = tl.where(top == -float("inf"), 0.0, top)
    total = tl.sum(tl.exp(row - base[:, None]), axis=1) + tl.exp(more - base)
    return tl.where(total == 0.0, 0.0, base + tl.log(total))


@triton.jit
def _compare(log_p: tl.tensor, log_q: tl.tensor, divergence: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """What each outcome adds to the divergence, and its derivative by log_q."""
    p = tl.exp(log_p)
    q = tl.exp(log_q)
    if divergence == "forward_kl":
        value = tl.where(p != 0.0, p * (log_p - log_q), 0.0)
        slope = -p
    elif divergence == "reverse_kl":
        value = tl.where(q != 0.0, q * (log_q - log_p), 0.0)
        slope = value + q
    else:
        top = tl.maximum(log_p, log_q)
        base = tl.where(top == -float("inf"), 0.0, top)
        log_mean = base + tl.log((tl.exp(log_p - base) + tl.exp(log_q - base)) * 0.5)
        slope = tl.where(q != 0.0, q * (log_q - log_mean), 0.0) * 0.5
        value = slope + tl.where(p != 0.0, p * (log_p - log_mean), 0.0) * 0.5
    return value, slope


@triton.jit
def _compare_slots(
    gathered: tl.tensor,
    top: tl.tensor,
    outside: tl.tensor,
    log_p: tl.tensor,
    residual: tl.tensor,
    listened: tl.tensor,
    clm: tl.tensor,
    fusion: tl.tensor,
    values: tl.tensor,
    factor: tl.tensor,
    num_rows: tl.tensor,
    num_slots: tl.tensor,
    vocab_size: tl.tensor,
    clm_weight: tl.tensor,
    divergence: tl.constexpr,
    tail: tl.constexpr,
    least_mass: tl.constexpr,
    least_residual: tl.constexpr,
    row_block: tl.constexpr,
    slot_block: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * row_block + tl.arange(0, row_block)
    slot = tl.arange(0, slot_block)
    is_row = row < num_rows
    is_slot = is_row[:, None] & (slot < num_slots)[None, :]
    is_gold = (slot == 0)[None, :]
    place = row[:, None] * num_slots + slot[None, :]
    z = tl.load(gathered + place, mask=is_slot, other=-float("inf")).to(tl.float32)
    lp = tl.load(log_p + place, mask=is_slot, other=-float("inf"))
    row_top = tl.load(top + row, mask=is_row, other=0.0)
    row_outside = tl.load(outside + row, mask=is_row, other=1.0)
    heard = tl.load(listened + row, mask=is_row, other=0) != 0
    inside = (lp > -float("inf")) & (lp < float("inf"))
    gold_inside = tl.sum((inside & is_gold).to(tl.int32), axis=1) > 0

    masses = tl.exp(z - row_top[:, None])
    rest = row_outside + tl.where(gold_inside, 0.0, tl.sum(tl.where(is_gold, masses, 0.0), axis=1))
    total = rest + tl.sum(tl.where(inside, masses, 0.0), axis=1)
    log_q = z - (row_top + tl.log(total))[:, None]
    nats = -tl.sum(tl.where(is_gold, log_q, 0.0), axis=1)
    rest_q = rest / total
    rest_q = tl.where(rest_q < least_mass, least_mass, rest_q)

    lq = tl.where(inside, log_q, -float("inf"))
    rest_lp = tl.full((row_block,), -float("inf"), tl.float32)
    rest_lq = tl.full((row_block,), -float("inf"), tl.float32)
    if tail == "bucket":
        has_rest = heard & (tl.sum(inside.to(tl.int32), axis=1) < vocab_size)
        rest_lp = tl.load(residual + row, mask=is_row, other=-float("inf"))
        if divergence == "reverse_kl":
            rest_lp = tl.where(rest_lp < least_residual, least_residual, rest_lp)
        rest_lp = tl.where(has_rest, rest_lp, -float("inf"))
        rest_lq = tl.where(has_rest, tl.log(rest_q), -float("inf"))
    if tail != "drop":
        norm = _finite_logsumexp(lp, rest_lp)
        lp = lp - norm[:, None]
        rest_lp = rest_lp - norm
    is_restricted: tl.constexpr = tail == "renormalise" and divergence != "forward_kl"
    if is_restricted:
        lq = lq - _finite_logsumexp(lq, rest_lq)[:, None]
    value, slope = _compare(lp, lq, divergence)
    difference = tl.sum(value, axis=1)
    rest_slope = tl.zeros((row_block,), tl.float32)
    if is_restricted:
        slope = slope - tl.exp(lq) * tl.sum(slope, axis=1)[:, None]
    if tail == "bucket":
        rest_value, rest_slope = _compare(rest_lp, rest_lq, divergence)
        difference += rest_value

    q = tl.exp(log_q)
    share = tl.where(heard, 1.0 - clm_weight, 0.0)
    dense = (1.0 - share) - share * (tl.sum(slope, axis=1) + rest_slope)
    sparse = dense + share * (rest_slope / rest_q)
    of_slots = q * dense[:, None] + share[:, None] * slope
    inside_gold = tl.sum(tl.where(is_gold, of_slots, 0.0), axis=1)
    outside_gold = tl.sum(tl.where(is_gold, q, 0.0), axis=1) * sparse
    at_gold = tl.where(gold_inside, inside_gold, outside_gold) - (1.0 - share)
    of_slots = tl.where(inside & ~is_gold, of_slots, at_gold[:, None])
    tl.store(values + place, of_slots.to(values.dtype.element_ty), mask=is_slot)
    tl.store(clm + row, nats, mask=is_row)
    tl.store(fusion + row, tl.where(heard, difference, 0.0), mask=is_row)
    tl.store(factor + row, sparse / total, mask=is_row)
