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
"""Rows of the head's gradient that are made at once where they must be cast."""


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
        gate_segment: int [N]; if given, the live gate: all positions of a segment on which the target's own
            cross-entropy is lower than the fused distribution's (over the gold tokens both know) become CLM
            only. Free where a segment fits into `config.chunk_tokens`, as chunks then end on segment borders;
            a longer one pays the product with the head once more (4 instead of 3).

    Raises:
        AlignmentError: shapes that do not belong together, or token ids outside the head's vocabulary.
    """
    assert denominator > 0, "the step's number of positions with gold"
    _check_shapes(hidden, head_weight, gold, fused)
    num_gold = _check_ids(gold, fused, len(head_weight))
    position = None if num_gold == len(gold) else (gold != IGNORE_INDEX).nonzero().squeeze(1)
    if gate_segment is not None and fused is not None:
        segment = gate_segment if position is None else gate_segment[position]
        order = segment.argsort(stable=True)
        position = order if position is None else position[order]
    batch = Batch.of(gold, fused, gate_segment, position)
    loss, clm, fusion, listened = _HeadObjective.apply(
        hidden, head_weight, head_bias, batch, position, config, 1.0 / denominator, torch.is_grad_enabled()
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
        position: Tensor | None,
        config: ObjectiveConfig,
        scale: float,
        needs_gradients: bool,
    ) -> tuple[Tensor, ...]:
        wanted = [needs_gradients and needed for needed in ctx.needs_input_grad[:3]]
        rows = hidden if position is None else hidden[position]
        with torch.autocast(hidden.device.type, enabled=False):
            (clm, fusion, listened), sums = _differentiate_all(
                rows, weight, bias, batch, config, scale, wanted
            )
        # Chunks' buffers are gone by here, and make room.
        grad_hidden = None if sums.rows is None else sums.rows.mul_(scale)
        grad_weight = None if sums.weight is None else sums.weight.finish()
        grad_bias = None if sums.bias is None or bias is None else sums.bias.to(bias.dtype)
        total = _weighted(clm, fusion, listened, config).sum(dtype=torch.float64)
        loss = (total * scale).to(clm.dtype)
        if position is not None:
            clm, fusion, listened = (_placed(part, position, len(hidden)) for part in (clm, fusion, listened))
            grad_hidden = None if grad_hidden is None else _placed(grad_hidden, position, len(hidden))
        ctx.gradients = (grad_hidden, grad_weight, grad_bias)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(clm, fusion, listened)
        return loss, clm, fusion, listened

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "the objective's gradients were handed over already: call backward once a forward"
            )
        grad_loss = grads[0]
        if grad_loss is None:
            return (None,) * 8
        for gradient in gradients:
            if gradient is not None:
                passes.scale_(gradient, grad_loss)
        return (*gradients, None, None, None, None, None)


def _differentiate_all(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    batch: Batch,
    config: ObjectiveConfig,
    scale: float,
    wanted: Sequence[bool],
) -> tuple[tuple[Tensor, Tensor, Tensor], _Sums]:
    """((clm, fusion, listened), what was added up for the `wanted` of rows, weight and bias), chunk by chunk."""
    plan = _plan(batch, config.chunk_tokens)
    largest = max((piece.stop - piece.start for pieces in plan for piece in pieces), default=0)
    head = _Head(rows, weight, bias, largest)
    for_rows, for_weight, for_bias = wanted
    sums = _Sums(
        rows=torch.empty_like(rows) if for_rows else None,
        weight=_WeightGradient(weight, head.dtype) if for_weight else None,
        bias=weight.new_zeros(len(weight), dtype=head.dtype) if for_bias else None,
    )
    clm, fusion = (rows.new_empty(len(rows), dtype=head.dtype) for _ in range(2))
    listened = torch.empty_like(batch.listened)
    for piece, chunk in _chunks(batch, plan, rows, head):
        logits = head.logits(rows[piece])
        clm[piece], fusion[piece], listened[piece] = differentiate(logits, chunk, config)
        gradient = head.operand(logits)
        if sums.rows is not None:
            torch.mm(gradient, head.weight, out=sums.rows[piece])
        if sums.weight is not None:
            sums.weight.add(gradient, rows[piece], scale)
        if sums.bias is not None:
            sums.bias.add_(logits.sum(0), alpha=scale)
    return (clm, fusion, listened), sums


@dataclass(frozen=True, slots=True)
class _Sums:
    """Gradients as the chunks leave them; None: not wanted."""

    rows: Tensor | None
    """[n, d], yet to be scaled"""
    weight: _WeightGradient | None
    bias: Tensor | None
    """[V], float32 or wider"""


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


class _WeightGradient:
    """The gradient of the head's weight [V, d]: products of all chunks, added up in float32 or wider.

    Where the weight is narrower, in two halves: the first half's sum takes the room that the whole does in the
    weight's type, and becomes it, so that there never is a second copy of the gradient.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self._like = weight
        is_narrow = 2 * weight.element_size() <= dtype.itemsize
        sizes = [-(-len(weight) // 2), len(weight) // 2] if is_narrow else [len(weight)]
        self._parts = [weight.new_empty((size, weight.shape[1]), dtype=dtype) for size in sizes]
        self._is_empty = True

    def add(self, left: Tensor, right: Tensor, scale: float) -> None:
        """+= scale · leftᵀ @ right, of [C, V] and [C, d]."""
        for part, columns in zip(
            self._parts, left.split([len(part) for part in self._parts], 1), strict=True
        ):
            _add_product(part, columns.t(), right, scale, overwrite=self._is_empty)
        self._is_empty = False

    def finish(self) -> Tensor:
        """The sum in the weight's type; there is nothing to add to any more."""
        parts, self._parts = self._parts, []
        if self._is_empty:
            return torch.zeros_like(self._like)
        return parts[0].to(self._like.dtype) if len(parts) == 1 else _joined(parts[0], parts[1], self._like)


def _joined(first: Tensor, second: Tensor, like: Tensor) -> Tensor:
    """Both, in the type and shape of `like`, in the storage of the first."""
    whole = first.view(like.dtype).flatten()[: like.numel()].view_as(like)
    done = min(_HEAD_BLOCK, len(first))
    whole[:done] = first[:done].to(like.dtype)
    while done < len(first):  # what is written lies before what is read: it takes half the room at most
        stop = min(2 * done, len(first))
        whole[done:stop] = first[done:stop]
        done = stop
    whole[len(first) :] = second
    return whole


def _add_product(total: Tensor, left: Tensor, right: Tensor, scale: float, *, overwrite: bool) -> None:
    """total += scale · left @ right, the sum over chunks in total's type."""
    beta = 0.0 if overwrite else 1.0
    if total.dtype == right.dtype:
        total.addmm_(left, right, beta=beta, alpha=scale)
    elif total.is_cuda and total.dtype == torch.float32:
        torch.addmm(total, left, right, beta=beta, alpha=scale, out_dtype=total.dtype, out=total)
    else:
        if overwrite:
            total.zero_()
        for start in range(0, len(total), _HEAD_BLOCK):
            block = slice(start, start + _HEAD_BLOCK)
            total[block].add_(left[block] @ right, alpha=scale)


def _placed(values: Tensor, position: Tensor, size: int) -> Tensor:
    """[n, ...] to [size, ...], 0 elsewhere."""
    return values.new_zeros((size, *values.shape[1:])).index_copy_(0, position, values)


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


def _chunks(
    batch: Batch, plan: Sequence[Sequence[slice]], rows: Tensor, head: _Head
) -> Iterator[tuple[slice, Batch]]:
    for pieces in plan:
        if len(pieces) == 1:
            yield pieces[0], batch[pieces[0]]
            continue
        clm = torch.cat([_gold_nats(batch[piece], rows[piece], head) for piece in pieces])
        start = pieces[0].start
        whole = batch[start : pieces[-1].stop]
        judged = replace(whole, listened=whole.listened & ~is_overtaken(clm, whole), segment=None)
        for piece in pieces:
            yield piece, judged[piece.start - start : piece.stop - start]


def _gold_nats(chunk: Batch, rows: Tensor, head: _Head) -> Tensor:
    """The target's cross-entropy [C], for a product with the head."""
    at_gold, top, outside = passes.outside_mass(head.logits(rows), chunk.gold[:, None])
    return top + (outside + (at_gold[:, 0] - top).exp()).log() - at_gold[:, 0]


def _check_shapes(hidden: Tensor, head_weight: Tensor, gold: Tensor, fused: Candidates | None) -> None:
    if hidden.ndim != 2 or head_weight.ndim != 2 or hidden.shape[1] != head_weight.shape[1]:
        raise AlignmentError(
            f"objective: hidden is {tuple(hidden.shape)} and the head {tuple(head_weight.shape)}; "
            "give [positions, d] and [vocabulary, d]"
        )
    if gold.shape != hidden.shape[:1]:
        raise AlignmentError(
            f"objective: gold is {tuple(gold.shape)} for {len(hidden)} positions; give one token id for each"
        )
    if fused is not None and fused.num_positions != len(hidden):
        raise AlignmentError(
            f"objective: fused distributions cover {fused.num_positions} positions, hidden {len(hidden)}; "
            "fuse the same batch"
        )


def _check_ids(gold: Tensor, fused: Candidates | None, vocab_size: int) -> int:
    """The number of positions that have gold; one question with all that is checked, as a GPU waits for each."""
    is_gold = gold != IGNORE_INDEX
    known = {"gold": torch.where(is_gold, gold, 0)} | ({} if fused is None else {"fused.ids": fused.ids})
    names = [name for name, ids in known.items() if ids.numel()]
    bounds = [bound for name in names for bound in known[name].aminmax()]
    num_gold, *found = torch.stack([is_gold.sum(), *bounds]).tolist()
    for name, low, high in zip(names, found[::2], found[1::2], strict=True):
        if low < 0 or high >= vocab_size:
            raise AlignmentError(
                f"objective: {name} holds {low if low < 0 else high}, outside the head's vocabulary of "
                f"{vocab_size}; project teachers to this target's tokenizer"
            )
    return num_gold
