"""The objective, fused with the language model head: CLM plus a divergence to the fused distribution.

    loss_p = λ · CE_p + (1 − λ) · D(P_p ‖ Q_p)   P: fused teachers, Q: target; CE_p alone where there is no P

Neither [N, V] logits nor [N, V] teacher distributions exist. Positions go through the head in chunks; the
gradient by a chunk's logits is known in closed form as soon as its softmax is (`fusion.divergence`), so both
products with it, for the hidden states and for the head, are made at once, while the chunk is there, and
backward only scales. Three products with the head and a few passes over the logits: what plain CLM costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fusellm_ray.config import ObjectiveConfig
from fusellm_ray.errors import AlignmentError
from fusellm_ray.fusion import passes
from fusellm_ray.fusion.divergence import Batch, differentiate, is_overtaken
from fusellm_ray.fusion.fuse import Candidates

IGNORE_INDEX = -100

_HEAD_BLOCK = 16384
"""Rows of the head's gradient that are made at once where it must be cast before it is added up."""


@dataclass(frozen=True, slots=True)
class ObjectiveOutput:
    """The loss, and what each position adds to it (nats, unweighted, detached; 0 where a term is absent)."""

    loss: Tensor
    """float32 scalar, differentiable: Σ over positions / denominator"""
    clm: Tensor
    """float32 [N]: cross-entropy to gold; 0 at IGNORE_INDEX"""
    fusion: Tensor
    """float32 [N]: divergence from the fused distribution, where `listened`"""
    listened: Tensor
    """bool [N]: the position has a fused distribution, and no gate closed on it"""


def objective(
    hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    gold: Tensor,
    fused: Candidates | None,
    *,
    config: ObjectiveConfig,
    denominator: float,
    clm_only: Tensor | None = None,
    gate_segment: Tensor | None = None,
) -> ObjectiveOutput:
    """The loss of a batch of positions, with its gradients for hidden states and head already computed.

    Positions with IGNORE_INDEX cost nothing. Positions without a fused distribution, or gated, are CLM with
    weight 1. Softmax and sums are float32 whatever the inputs' type (the products with the head are made in
    the type of `hidden`). Backward works once, and hands over the gradients that forward made.

    P and Q by `config.tail`, where S is the used candidates and gold:

    - `bucket`: both on S and one more outcome, everything else. Exact mass on both sides, so D ≥ 0.
    - `renormalise`: P restricted to S, renormalised. Forward KL compares it with Q over the whole vocabulary,
      as in the paper: loss = logsumexp(z) − Σ w z. Reverse KL and JSD restrict and renormalise Q likewise.
    - `drop`: the terms of S only, P and Q as they are. Such a truncated divergence is biased, and forward
      and reverse KL may become negative.

    P is normalised (bucket: with its residual), so masses that float16 rounded to 1 ± 1e-3 in all do no
    harm. Forward KL is Σ P log(P/Q), reverse KL Σ Q log(Q/P), JSD the mean of both to (P + Q)/2.

    Args:
        hidden: float [N, d], the head's input.
        head_weight: float [V, d], unsharded; its gradient is added up in float32.
        head_bias: float [V] or None.
        gold: int64 [N], the next token, or IGNORE_INDEX.
        fused: distributions at the same N positions; None for CLM alone.
        denominator: positions with gold over all ranks and micro-batches of the step, so that splitting a
            batch differently changes nothing.
        clm_only: bool [N], where not to listen to the teachers.
        gate_segment: int [N]; if given, the live gate: all positions of a segment on which the target's own
            cross-entropy is lower than the fused distribution's (over the gold tokens both know) become CLM
            only. Free where a segment fits into `config.chunk_tokens`, as chunks then end on segment borders;
            a longer one pays the product with the head once more (4 instead of 3).

    Raises:
        AlignmentError: shapes that do not belong together, or token ids outside the head's vocabulary.
    """
    assert denominator > 0, "the step's number of positions with gold"
    _check(hidden, head_weight, gold, fused)
    position = (gold != IGNORE_INDEX).nonzero().squeeze(1)
    if gate_segment is not None and fused is not None:
        position = position[gate_segment[position].argsort(stable=True)]
    batch = Batch.of(position, gold, fused, clm_only, gate_segment)
    loss, clm, fusion, listened = _HeadObjective.apply(
        hidden, head_weight, head_bias, batch, config, 1.0 / denominator, torch.is_grad_enabled()
    )
    return ObjectiveOutput(loss, clm, fusion, listened)


class _HeadObjective(torch.autograd.Function):
    """Head and loss in one: gradients are made in forward, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        batch: Batch,
        config: ObjectiveConfig,
        scale: float,
        needs_gradients: bool,
    ) -> tuple[Tensor, ...]:
        wanted = [needs_gradients and needed for needed in ctx.needs_input_grad[:3]]
        with torch.autocast(hidden.device.type, enabled=False):
            total, parts, gradients = _differentiate_all(hidden, weight, bias, batch, config, scale, wanted)
        # Chunks' buffers are gone by here: a cast of the head's gradient needs as much again.
        ctx.gradients = tuple(
            gradient if gradient is None or like is None else gradient.to(like.dtype)
            for gradient, like in zip(gradients, (hidden, weight, bias), strict=True)
        )
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*parts)
        return total, *parts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "the objective's gradients were handed over already: call backward once a forward"
            )
        grad_loss = grads[0]
        if grad_loss is None:
            return (None,) * 7
        # Asking the value would make a GPU wait; there, scaling is cheap.
        if grad_loss.is_cuda or grad_loss.item() != 1.0:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(grad_loss)
        return (*gradients, None, None, None, None)


def _differentiate_all(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    batch: Batch,
    config: ObjectiveConfig,
    scale: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """(loss, (clm, fusion, listened), `wanted` gradients of hidden, weight and bias), chunk by chunk.

    The head's gradients are in the type they are summed in.
    """
    plan = _plan(batch, config.chunk_tokens)
    largest = max((piece.stop - piece.start for pieces in plan for piece in pieces), default=0)
    head = _Head(hidden, weight, bias, largest)
    for_hidden, for_weight, for_bias = wanted
    grad_hidden = torch.zeros_like(hidden) if for_hidden else None
    grad_weight = weight.new_empty(weight.shape, dtype=head.dtype) if for_weight else None
    grad_bias = weight.new_zeros(len(weight), dtype=head.dtype) if for_bias else None
    clm, fusion = (hidden.new_zeros(len(hidden), dtype=head.dtype) for _ in range(2))
    listened = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    is_first = True
    for chunk in _chunks(batch, plan, hidden, head):
        rows = hidden[chunk.position]
        logits = head.logits(rows)
        parts = differentiate(logits, chunk, config)
        clm[chunk.position], fusion[chunk.position], listened[chunk.position] = parts
        total += _weighted(*parts, config).sum(dtype=torch.float64)
        gradient = head.operand(logits)
        if grad_hidden is not None:
            grad_hidden[chunk.position] = (gradient @ head.weight).mul_(scale)
        if grad_weight is not None:
            _add_product(grad_weight, gradient.t(), rows, scale, overwrite=is_first)
        if grad_bias is not None:
            grad_bias.add_(logits.sum(0), alpha=scale)
        is_first = False
    if grad_weight is not None and is_first:
        grad_weight.zero_()
    return (total * scale).to(head.dtype), (clm, fusion, listened), (grad_hidden, grad_weight, grad_bias)


class _Head:
    """The product with the head, into a buffer that all chunks share."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk_tokens: int) -> None:
        self.weight = weight.to(hidden.dtype)
        self.bias = bias
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        """Of logits and statistics."""
        shape = (chunk_tokens, len(weight))
        self._product = hidden.new_empty(shape)
        stays = hidden.dtype == self.dtype or (passes.has_kernels(hidden) and bias is None)
        self._logits = self._product if stays else hidden.new_empty(shape, dtype=self.dtype)

    def logits(self, rows: Tensor) -> Tensor:
        """[C, d] to [C, V]; overwritten by the next call."""
        product, logits = self._product[: len(rows)], self._logits[: len(rows)]
        torch.mm(rows, self.weight.t(), out=product)
        if product.dtype != logits.dtype:
            logits.copy_(product)
        return logits if self.bias is None else logits.add_(self.bias)

    def operand(self, logits: Tensor) -> Tensor:
        """A gradient that was written over `logits`, in the type that matrix products are made in."""
        if self._product.dtype == logits.dtype:
            return logits
        return self._product[: len(logits)].copy_(logits)


def _add_product(total: Tensor, left: Tensor, right: Tensor, scale: float, *, overwrite: bool) -> None:
    """total += scale · left @ right, the sum over chunks in total's type."""
    if total.dtype == right.dtype:
        total.addmm_(left, right, beta=0.0 if overwrite else 1.0, alpha=scale)
        return
    if overwrite:
        total.zero_()
    for start in range(0, len(total), _HEAD_BLOCK):
        block = slice(start, start + _HEAD_BLOCK)
        total[block].add_(left[block] @ right, alpha=scale)


def _weighted(clm: Tensor, fusion: Tensor, listened: Tensor, config: ObjectiveConfig) -> Tensor:
    mixed = config.clm_weight * clm + (1.0 - config.clm_weight) * fusion
    return torch.where(listened, mixed, clm)


# ------------------------------------------------------------------------- chunks and the live gate


def _plan(batch: Batch, chunk_tokens: int) -> list[list[slice]]:
    """Chunks of at most chunk_tokens positions; several in a list are one segment, judged whole."""
    if batch.segment is None:
        return [[piece] for piece in _even(0, len(batch), chunk_tokens)]
    plan: list[list[slice]] = []
    start = stop = 0
    for length in batch.segment.unique_consecutive(return_counts=True)[1].tolist():
        if stop + length - start > chunk_tokens and stop > start:
            plan.append([slice(start, stop)])
            start = stop
        stop += length
        if length > chunk_tokens:
            plan.append(list(_even(start, stop, chunk_tokens)))
            start = stop
    if stop > start:
        plan.append([slice(start, stop)])
    return plan


def _even(start: int, stop: int, limit: int) -> Iterator[slice]:
    """A range in the fewest pieces of at most `limit`, about equal: a small last one would be slow."""
    num_pieces = -(-(stop - start) // limit)
    size = -(-(stop - start) // max(num_pieces, 1))
    for begin in range(start, stop, max(size, 1)):
        yield slice(begin, min(begin + size, stop))


def _chunks(batch: Batch, plan: Sequence[Sequence[slice]], hidden: Tensor, head: _Head) -> Iterator[Batch]:
    for pieces in plan:
        if len(pieces) == 1:
            yield batch[pieces[0]]
            continue
        clm = torch.cat([_gold_nats(batch[piece], hidden, head) for piece in pieces])
        start = pieces[0].start
        whole = batch[start : pieces[-1].stop]
        judged = replace(whole, listened=whole.listened & ~is_overtaken(clm, whole), segment=None)
        for piece in pieces:
            yield judged[piece.start - start : piece.stop - start]


def _gold_nats(chunk: Batch, hidden: Tensor, head: _Head) -> Tensor:
    """The target's cross-entropy [C], for a product with the head."""
    logits = head.logits(hidden[chunk.position])
    at_gold = logits.gather(1, chunk.gold[:, None]).squeeze(1).to(head.dtype)
    top, outside = passes.outside_mass(logits, chunk.gold[:, None])
    return top + (outside + (at_gold - top).exp()).log() - at_gold


def _check(hidden: Tensor, head_weight: Tensor, gold: Tensor, fused: Candidates | None) -> None:
    if hidden.ndim != 2 or head_weight.ndim != 2 or hidden.shape[1] != head_weight.shape[1]:
        raise AlignmentError(
            f"objective: hidden is {tuple(hidden.shape)} and the head {tuple(head_weight.shape)}; "
            "give [positions, d] and [vocabulary, d]"
        )
    if gold.shape != hidden.shape[:1]:
        raise AlignmentError(
            f"objective: gold is {tuple(gold.shape)} for {len(hidden)} positions; give one token id for each"
        )
    _check_ids("gold", gold[gold != IGNORE_INDEX], len(head_weight))
    if fused is None:
        return
    if fused.num_positions != len(hidden):
        raise AlignmentError(
            f"objective: fused distributions cover {fused.num_positions} positions, hidden {len(hidden)}; "
            "fuse the same batch"
        )
    _check_ids("fused.ids", fused.ids, len(head_weight))


def _check_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    if ids.numel() == 0:
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise AlignmentError(
            f"objective: {name} holds {low if low < 0 else high}, outside the head's vocabulary of "
            f"{vocab_size}; project teachers to this target's tokenizer"
        )
