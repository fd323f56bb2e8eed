"""What lies between the head's products: from a chunk's logits to its losses and their gradient.

The divergence sees k + 1 gathered entries of the target's distribution Q (the candidates and gold) and, for
`tail: bucket`, the mass outside of them; what it adds to the gradient of the other V - k - 1 entries is one
factor a position. So every divergence and every tail makes the same passes over the logits as plain CLM.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fusellm_ray.config import ObjectiveConfig
from fusellm_ray.fusion.fuse import Candidates
from fusellm_ray.fusion.passes import has_kernels, outside_mass, spread

_LEAST_MASS = 1e-30
"""Target mass outside the candidates is taken as no less: it underflows there, and its logarithm must not."""
_LEAST_TEACHER_MASS = 1e-7
"""Least residual of a teacher under reverse KL (infinite otherwise): what float32 tells from 0 in 1 − Σp."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The n positions that have gold: what the loss compares the target with."""

    gold: Tensor
    """int64 [n]"""
    slots: Tensor
    """int64 [n, 1 + k]: gold, then the candidates; unused slots repeat gold"""
    log_p: Tensor
    """[n, 1 + k] fused logprobs; -inf: the slot is not in the support S"""
    residual: Tensor
    """[n]"""
    listened: Tensor
    """bool [n]"""
    segment: Tensor | None
    """int64 [n], ascending: the live gate is on"""

    @classmethod
    def of(
        cls,
        gold: Tensor,
        fused: Candidates | None,
        gate_segment: Tensor | None,
        position: Tensor | None,
    ) -> Batch:
        """At `position`, int64 [n], of the N given; None: at all of them."""

        def here(values: Tensor) -> Tensor:
            return values if position is None else values[position]

        gold = here(gold)
        if fused is None:
            nothing = torch.full((len(gold), 1), -torch.inf, device=gold.device)
            listened = torch.zeros(len(gold), dtype=torch.bool, device=gold.device)
            return cls(gold, gold[:, None], nothing, nothing[:, 0], listened, None)
        log_p = torch.cat([here(fused.gold)[:, None], here(fused.logprobs)], dim=1).float()
        listened = here(fused.valid) & log_p.isfinite().any(1)
        log_p = log_p.masked_fill(~listened[:, None], -torch.inf)
        residual = here(fused.residual).float().masked_fill(~listened, -torch.inf)
        slots = torch.cat([gold[:, None], here(fused.ids)], dim=1)
        slots = torch.where(log_p.isfinite(), slots, gold[:, None])
        segment = None if gate_segment is None else here(gate_segment)
        return cls(gold, slots, log_p, residual, listened, segment)

    def __getitem__(self, part: slice) -> Batch:
        return Batch(
            gold=self.gold[part],
            slots=self.slots[part],
            log_p=self.log_p[part],
            residual=self.residual[part],
            listened=self.listened[part],
            segment=None if self.segment is None else self.segment[part],
        )

    def __len__(self) -> int:
        return len(self.gold)


def differentiate(logits: Tensor, chunk: Batch, config: ObjectiveConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Replace logits [C, V] by the gradient of the positions' losses; give (clm, fusion, listened), each [C].

    All that lies between the head's products is here. Only `fusion.passes` touches all V entries.
    """
    gathered, top, outside = outside_mass(logits, chunk.slots)
    if chunk.segment is not None:
        _, total = _masses(gathered, top, outside, chunk.log_p.isfinite())
        clm = top + total.log() - gathered[:, 0]
        chunk = replace(chunk, listened=chunk.listened & ~is_overtaken(clm, chunk))
    compare = _compare_slots_at_once if has_kernels(logits) else _compare_slots
    clm, fusion, values, factor = compare(gathered, top, outside, chunk, logits.shape[1], config)
    spread(logits, top, factor)
    logits.scatter_(1, chunk.slots, values)
    return clm, fusion, chunk.listened


def _compare_slots_at_once(
    gathered: Tensor, top: Tensor, outside: Tensor, chunk: Batch, vocab_size: int, config: ObjectiveConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_compare_slots` as a kernel."""
    from fusellm_ray.fusion import kernels

    return kernels.compare_slots(
        gathered,
        top,
        outside,
        chunk.log_p,
        chunk.residual,
        chunk.listened,
        divergence=config.divergence,
        tail=config.tail,
        clm_weight=config.clm_weight,
        vocab_size=vocab_size,
        least_mass=_LEAST_MASS,
        least_teacher_mass=_LEAST_TEACHER_MASS,
    )


def _compare_slots(
    gathered: Tensor, top: Tensor, outside: Tensor, chunk: Batch, vocab_size: int, config: ObjectiveConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the slots, and the mass outside of them, say of each position; after `passes.outside_mass`.

    Returns:
        (clm [C], fusion [C], the gradient by the slots' logits [C, 1 + k], and the factor [C] by which
        exp(logits − top) becomes the gradient outside of them)
    """
    inside = chunk.log_p.isfinite()
    tail, total = _masses(gathered, top, outside, inside)
    log_q = gathered - (top + total.log())[:, None]
    log_tail = (tail / total).clamp(min=_LEAST_MASS).log()
    fusion, slope, tail_slope = _divergence(chunk, log_q, log_tail, inside, vocab_size, config)

    # d log q_u / dz_v = [u = v] − q_v, and log of the tail's mass: [v outside] q_v / tail − q_v.
    q = log_q.exp()
    share = chunk.listened.to(q.dtype) * (1.0 - config.clm_weight)
    dense = (1.0 - share) - share * (slope.sum(1) + tail_slope)
    sparse = dense + share * (tail_slope / log_tail.exp())
    values = q * dense[:, None] + share[:, None] * slope
    at_gold = torch.where(inside[:, 0], values[:, 0], q[:, 0] * sparse) - (1.0 - share)
    # Unused slots repeat gold, so whichever of the equal indices is written last, it writes the same.
    values = torch.where(inside, values, at_gold[:, None])
    values[:, 0] = at_gold
    return -log_q[:, 0], torch.where(chunk.listened, fusion, 0.0), values, sparse / total


def _masses(gathered: Tensor, top: Tensor, outside: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Mass outside the support and in all, both [C], relative to exp(top).

    Summing what is outside, not subtracting what is inside from 1, keeps a confident target's tail, and with
    it its gradient, accurate.
    """
    masses = (gathered - top[:, None]).exp()
    tail = outside + masses[:, 0].masked_fill(inside[:, 0], 0.0)
    return tail, tail + masses.masked_fill(~inside, 0.0).sum(1)


def _divergence(
    chunk: Batch, log_q: Tensor, log_tail: Tensor, inside: Tensor, vocab_size: int, config: ObjectiveConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """(value [C], its derivative by log q of each slot [C, 1 + k], and by the log of the tail's mass [C])."""
    log_p = chunk.log_p.to(log_q.dtype)
    log_q = log_q.masked_fill(~inside, -torch.inf)
    if config.tail == "bucket":
        has_tail = chunk.listened & (inside.sum(1) < vocab_size)
        residual = chunk.residual.to(log_q.dtype)
        if config.divergence == "reverse_kl":
            residual = residual.clamp(min=math.log(_LEAST_TEACHER_MASS))
        log_p = torch.cat([log_p, residual.masked_fill(~has_tail, -torch.inf)[:, None]], dim=1)
        log_q = torch.cat([log_q, log_tail.masked_fill(~has_tail, -torch.inf)[:, None]], dim=1)
    if config.tail != "drop":
        log_p = log_p - _finite_logsumexp(log_p)
    is_restricted = config.tail == "renormalise" and config.divergence != "forward_kl"
    if is_restricted:
        log_q = log_q - _finite_logsumexp(log_q)
    value, slope = _compare(log_p, log_q, config.divergence)
    if is_restricted:
        slope = slope - log_q.exp() * slope.sum(1, keepdim=True)
    if config.tail == "bucket":
        return value, slope[:, :-1], slope[:, -1]
    return value, slope, torch.zeros_like(value)


def _compare(
    log_p: Tensor, log_q: Tensor, divergence: Literal["forward_kl", "reverse_kl", "jsd"]
) -> tuple[Tensor, Tensor]:
    """The divergence of each row and its derivative by log_q, entries of log_q taken as independent."""
    p, q = log_p.exp(), log_q.exp()
    # Outcomes without mass are -inf: their terms are 0, not nan. A nan that came in stays one.
    if divergence == "forward_kl":
        return torch.where(p != 0, p * (log_p - log_q), 0.0).sum(1), -p
    if divergence == "reverse_kl":
        terms = torch.where(q != 0, q * (log_q - log_p), 0.0)
        return terms.sum(1), terms + q
    log_mean = torch.logaddexp(log_p, log_q) - math.log(2.0)
    from_q = torch.where(q != 0, q * (log_q - log_mean), 0.0) / 2
    from_p = torch.where(p != 0, p * (log_p - log_mean), 0.0) / 2
    return (from_p + from_q).sum(1), from_q


def _finite_logsumexp(values: Tensor) -> Tensor:
    """[C, m] to [C, 1]; 0 for a row of -inf, which then stays one."""
    total = values.logsumexp(1, keepdim=True)
    return total.masked_fill(total == -torch.inf, 0.0)


def is_overtaken(clm: Tensor, chunk: Batch) -> Tensor:
    """bool [C]: over the position's segment the target's cross-entropy is below the fused distribution's."""
    assert chunk.segment is not None
    fused_gold = chunk.log_p[:, 0].to(clm.dtype)
    ahead = torch.where(chunk.listened & fused_gold.isfinite(), clm + fused_gold, 0.0)
    segments, local = chunk.segment.unique_consecutive(return_inverse=True)
    return (ahead.new_zeros(len(segments)).index_add_(0, local, ahead) < 0)[local]
