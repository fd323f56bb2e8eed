"""K teachers' distributions at the same positions become one.

What enters: each teacher's aligned top-k, already in the target's vocabulary, for a batch of positions. What
leaves: one distribution a position of the same form, and the weight each teacher had in it. Called by a
trainer rank for every micro-batch, before `fusion.loss`; cheap enough for one core beside the training step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from fusellm_ray.config import FusionConfig
from fusellm_ray.errors import AlignmentError, ConfigError


@dataclass(frozen=True, slots=True)
class Candidates:
    """Next-token distributions at N positions: k candidates, the gold token, and what is left, in nats.

    Where `valid`, exp(logprobs).sum(1) + exp(gold) + exp(residual) = 1. A slot of `ids` whose logprob is -inf
    is unused, whatever its id. The gold token is never among the used `ids`; where its logprob is not
    known, gold is -inf and its mass is part of the residual.
    """

    ids: Tensor
    """int64 [N, k]"""
    logprobs: Tensor
    """float32 [N, k]"""
    gold: Tensor
    """float32 [N]; may be known where the distribution is not `valid`"""
    residual: Tensor
    """float32 [N]: log of the mass outside ids and gold; -inf where none is left"""
    valid: Tensor
    """bool [N]"""

    def __post_init__(self) -> None:
        num_positions = self.valid.shape[0]
        if self.ids.ndim != 2 or self.ids.shape != self.logprobs.shape:
            raise AlignmentError(
                f"candidates: ids are {tuple(self.ids.shape)} and logprobs {tuple(self.logprobs.shape)}; "
                "both must be [positions, candidates]"
            )
        for name in ("ids", "gold", "residual"):
            if getattr(self, name).shape[0] != num_positions:
                raise AlignmentError(
                    f"candidates: {name} has {getattr(self, name).shape[0]} positions, valid has "
                    f"{num_positions}; both must cover the same positions"
                )

    @property
    def num_positions(self) -> int:
        return self.valid.shape[0]

    @property
    def top_k(self) -> int:
        return self.ids.shape[1]

    @classmethod
    def missing(cls, num_positions: int, top_k: int = 1, device: torch.device | str = "cpu") -> Candidates:
        """A teacher that says nothing."""
        nothing = torch.full((num_positions,), -torch.inf, device=device)
        return cls(
            ids=torch.zeros((num_positions, top_k), dtype=torch.int64, device=device),
            logprobs=torch.full((num_positions, top_k), -torch.inf, device=device),
            gold=nothing,
            residual=nothing.clone(),
            valid=torch.zeros(num_positions, dtype=torch.bool, device=device),
        )

    def to(self, device: torch.device | str) -> Self:
        return type(self)(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass(frozen=True, slots=True)
class Fused(Candidates):
    """The fused distributions, and who is in them."""

    weights: Tensor
    """float32 [K, N]: each teacher's weight, one-hot under min_ce; sums to 1 where valid, 0 elsewhere.
    Summed over positions and divided by the valid ones: the win share, or mean weight, of a teacher."""


def fuse(
    teachers: Sequence[Candidates],
    *,
    config: FusionConfig,
    segment: Tensor,
    row: Tensor,
    gold_bytes: Tensor,
    weights: Sequence[float] | None = None,
    own_nats: Tensor | None = None,
    own_tokens: Tensor | None = None,
    own_bytes: Tensor | None = None,
) -> Fused:
    """One distribution out of K teachers' at each position.

    A position is fused over the teachers that are valid there; where none is, the result is not valid.
    Under min_ce and avg_ce those teachers are compared over the position's token, segment or row, on the gold
    tokens that all of *them* know (if there is none: each on what it knows; one that knows none ranks last).
    So a teacher without a distribution at a position changes nothing there. At granularity `token` the unit
    nats_per_token is per target token: of one position a teacher has no tokens of its own to count.

    The order of the teachers does not matter. If min_ce finds two exactly equal, it takes the one with the
    least residual mass over the token, segment or row, and only if that is equal too, the first.

    Args:
        teachers: K of them, each N positions; k may differ.
        segment: int [N], index into the S segments of the batch; negative for padding.
        row: int [N], index of the packed row; read at granularity `row`.
        gold_bytes: int [N], bytes of the gold token, 0 for EOS.
        weights: K positive numbers, for rule `weighted`.
        own_nats, own_tokens: [K, S], nats each teacher pays for its own tokens of a segment, and how many
            these are; for unit `nats_per_token` at granularity `segment` or `row`.
        own_bytes: [K, S], of these tokens. If given, unit `nats_per_byte` is of them, too, and not of the gold tokens:
            for alignments under which some of those are one-hot stand-ins, which cost no nats.

    Raises:
        AlignmentError: teachers' positions differ from the batch's.
        ConfigError: no teachers, or an argument that the rule or the unit needs is absent.
    """
    own_size = own_tokens if config.unit == "nats_per_token" else own_bytes
    _check(teachers, config, segment, weights, own_nats, own_size)
    valid = torch.stack([t.valid for t in teachers])
    if config.rule == "min_ce":
        scores, ties = _cross_entropies(teachers, config, segment, row, gold_bytes, own_nats, own_size)
        return _select(teachers, _least(scores, ties, valid))
    if config.rule == "avg_ce":
        scores, _ = _cross_entropies(teachers, config, segment, row, gold_bytes, own_nats, own_size)
        logits = (-scores).exp() if config.paper_weights else -scores / config.temperature
        # Finite, so that teachers without any known cross-entropy share equally where they are alone.
        logits = logits.clamp(min=-1e30).masked_fill(~valid, -torch.inf)
        mixing = logits.softmax(0).masked_fill(~valid, 0.0)
    else:
        static = (
            torch.ones(len(teachers)) if config.rule == "mean" else torch.tensor(weights, dtype=torch.float32)
        )
        mixing = static.to(valid.device)[:, None] * valid
        mixing = mixing / mixing.sum(0).clamp(min=torch.finfo(torch.float32).tiny)
    return _mix(teachers, mixing)


def advantage(
    teachers: Sequence[Candidates],
    target_nats: Tensor,
    *,
    segment: Tensor,
    gold_bytes: Tensor,
    num_segments: int,
) -> tuple[Tensor, Tensor]:
    """How far each teacher is ahead of the target, as it is now, on the gold tokens the teacher knows.

    Args:
        target_nats: float [N], the target's cross-entropy at each position (`ObjectiveOutput.clm`); read
            where `segment` is not negative and the teacher knows the gold token.

    Returns:
        (nats, bytes), both float32 [K, S]: target's nats minus the teacher's over a segment, and the bytes
        of those gold tokens. Sum both over a domain and divide: nats per byte, positive where the teacher is
        ahead.
    """
    gold = torch.stack([t.gold for t in teachers])
    known = gold.isfinite() & (segment >= 0)
    ahead = torch.where(known, target_nats + gold, 0.0)
    group = segment.clamp(min=0)
    return _by_group(ahead, group, num_segments), _by_group(known * gold_bytes.float(), group, num_segments)


# ------------------------------------------------------------------------------ comparing teachers


def _cross_entropies(
    teachers: Sequence[Candidates],
    config: FusionConfig,
    segment: Tensor,
    row: Tensor,
    gold_bytes: Tensor,
    own_nats: Tensor | None,
    own_size: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(cross-entropy, residual mass) of each teacher over what a position is compared on, both [K, N].

    Of its own tokens, by their number or bytes, where `own_size` is given (read at granularity `segment` and `row`);
    else of the gold tokens. +inf where a teacher knows none there.
    """
    gold = torch.stack([t.gold for t in teachers]).float()
    left = torch.stack([torch.where(t.valid, t.residual, 0.0) for t in teachers]).float().exp()
    num_bytes = gold_bytes.float()
    if config.granularity == "token":
        return (-gold if config.unit == "nats_per_token" else -gold / num_bytes.clamp(min=1.0)), left

    # Padding (segment -1) shares a group with nothing: it gets one of its own, the last.
    index = segment if config.granularity == "segment" else row
    num_groups = int(index.max()) + 2 if index.numel() else 1
    group = torch.where(segment >= 0, index, num_groups - 1).long()
    ties = _by_group(left, group, num_groups)[:, group]
    if own_size is not None:
        assert own_nats is not None
        nats, size = own_nats.float(), own_size.float()
        if config.granularity == "row":
            rows = torch.full((nats.shape[1],), num_groups - 1, dtype=torch.long, device=group.device)
            inside = segment >= 0
            rows[segment[inside].long()] = group[inside]
            nats, size = _by_group(nats, rows, num_groups), _by_group(size, rows, num_groups)
        else:
            extra = num_groups - nats.shape[1]
            nats, size = (F.pad(sums, (0, max(extra, 0))) for sums in (nats, size))
        scores = torch.where(size > 0, nats / size.clamp(min=1.0), torch.inf)
        return scores[:, group], ties

    known = gold.isfinite()
    nats = torch.where(known, -gold, 0.0)
    scores = torch.full_like(gold, torch.inf)
    valid = torch.stack([t.valid for t in teachers])
    # Teachers that are compared at a position are compared on common ground. Few patterns of validity occur.
    pattern = (valid.long() << torch.arange(len(teachers), device=valid.device)[:, None]).sum(0)
    for bits in pattern.unique().tolist():
        members = [k for k in range(len(teachers)) if bits >> k & 1]
        if not members:
            continue
        common = known[members].all(0)
        shared = _by_group(common.float(), group, num_groups) > 0
        counted = torch.where(shared[group], common, known[members])
        size = _by_group(counted * num_bytes, group, num_groups).clamp(min=1.0)
        score = _by_group(nats[members] * counted, group, num_groups) / size
        score = torch.where(_by_group(counted.float(), group, num_groups) > 0, score, torch.inf)
        here = pattern == bits
        for k, of_groups in zip(members, score, strict=True):
            scores[k] = torch.where(here, of_groups[group], scores[k])
    return scores, ties


def _by_group(values: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Sums over the positions of each group: [..., N] to [..., num_groups]."""
    return values.new_zeros((*values.shape[:-1], num_groups)).index_add_(-1, group, values)


def _least(scores: Tensor, ties: Tensor, valid: Tensor) -> Tensor:
    """One-hot float32 [K, N] of the best-ranked valid teacher; all 0 where none is valid."""
    # Finite, so that a valid teacher of unknown cross-entropy still comes before an invalid one.
    scores = scores.clamp(max=torch.finfo(scores.dtype).max).masked_fill(~valid, torch.inf)
    best = scores == scores.amin(0)
    chosen = torch.where(best, ties, torch.inf).min(0).indices  # the first; argmin takes many times as long
    return F.one_hot(chosen, len(scores)).T * valid.any(0).float()


# ------------------------------------------------------------------------------ combining teachers


def _select(teachers: Sequence[Candidates], weights: Tensor) -> Fused:
    """The distribution of the one teacher whose weight is 1."""
    top_k = max(t.top_k for t in teachers)
    out = Candidates.missing(weights.shape[1], top_k, weights.device)
    for teacher, weight in zip(teachers, weights, strict=True):
        won = (weight > 0).nonzero().squeeze(1)
        out.ids[won, : teacher.top_k] = teacher.ids[won]
        out.logprobs[won, : teacher.top_k] = teacher.logprobs[won].float()
        out.gold[won] = teacher.gold[won].float()
        out.residual[won] = teacher.residual[won].float()
    return Fused(out.ids, out.logprobs, out.gold, out.residual, weights.sum(0) > 0, weights)


def _mix(teachers: Sequence[Candidates], weights: Tensor) -> Fused:
    """The weighted mean of the distributions, over the union of their candidates."""
    ids = torch.cat([t.ids for t in teachers], dim=1)
    # where, not a product: a weight of 0 must also silence a teacher that holds nan where it is not valid.
    parts = [
        torch.where(weight[:, None] > 0, weight[:, None] * t.logprobs.float().exp(), 0.0)
        for t, weight in zip(teachers, weights, strict=True)
    ]
    mass = torch.cat(parts, dim=1)
    gold, residual = (
        sum(
            torch.where(weight > 0, weight * getattr(t, name).float().exp(), 0.0)
            for t, weight in zip(teachers, weights, strict=True)
        )
        for name in ("gold", "residual")
    )
    ids, order = ids.sort(dim=1, stable=True)
    mass = mass.gather(1, order)
    fresh = torch.ones_like(ids, dtype=torch.bool)
    fresh[:, 1:] = ids[:, 1:] != ids[:, :-1]
    slot = fresh.cumsum(1) - 1
    mass = torch.zeros_like(mass).scatter_add_(1, slot, mass)
    ids = torch.zeros_like(ids).scatter_(1, slot, ids)
    mass, order = mass.sort(dim=1, descending=True, stable=True)
    ids = ids.gather(1, order)
    assert isinstance(gold, Tensor)
    assert isinstance(residual, Tensor)
    return Fused(ids, mass.log(), gold.log(), residual.log(), weights.sum(0) > 0, weights)


def _check(
    teachers: Sequence[Candidates],
    config: FusionConfig,
    segment: Tensor,
    weights: Sequence[float] | None,
    own_nats: Tensor | None,
    own_size: Tensor | None,
) -> None:
    if not teachers or config.rule == "none":
        raise ConfigError(
            f"fuse: {len(teachers)} teachers under fusion.rule={config.rule}; without teachers, give the "
            "objective no fused distributions at all"
        )
    for index, teacher in enumerate(teachers):
        if teacher.num_positions != segment.shape[0]:
            raise AlignmentError(
                f"fuse: teacher {index} has {teacher.num_positions} positions, the batch {segment.shape[0]}; "
                "align it to the rows of this batch"
            )
    if config.rule == "weighted" and (weights is None or len(weights) != len(teachers) or min(weights) <= 0):
        raise ConfigError(f"fuse: fusion.rule=weighted needs {len(teachers)} positive weights, got {weights}")
    is_per_token = config.unit == "nats_per_token"
    by_own_tokens = (is_per_token or own_size is not None) and config.granularity != "token"
    if config.rule in ("min_ce", "avg_ce") and by_own_tokens:
        for name, sums in (("own_nats", own_nats), ("own_tokens" if is_per_token else "own_bytes", own_size)):
            if sums is None or sums.ndim != 2 or sums.shape[0] != len(teachers):
                seen = "none" if sums is None else tuple(sums.shape)
                raise ConfigError(
                    f"fuse: fusion.unit={config.unit} needs {name} as [{len(teachers)} teachers, segments], "
                    f"got {seen}"
                )
