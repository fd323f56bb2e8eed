"""What one step measured, summed over micro-batches and ranks, as the figures that people read.

Every sum sits in one vector, so that a step needs one small all-reduce for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusellm_ray.fusion.fuse import advantage
from fusellm_ray.fusion.loss import ObjectiveOutput
from fusellm_ray.target.batches import MicroBatch

_SCALARS = ("loss", "tokens", "bytes", "clm", "fusion", "fused", "wait_s", "compute_cpu_s", "ranks")
_PER_TEACHER = ("valid", "dropped", "residual", "aligned_nats", "aligned_bytes", "own_nats", "own_bytes")
_PER_DOMAIN = ("won", "fused_by_domain", "ahead_nats", "ahead_bytes")


class StepStatistics:
    """Sums of one step.

    Args:
        teachers: names, in the order of the run's config.
        domains: names of the corpus's sources, likewise.
        device: where sums are kept: the batches', as each number that is brought to the host makes a GPU wait.
        has_one_hot: as `AlignmentConfig.has_one_hot`; how far teachers are ahead is not measured then.
    """

    def __init__(
        self,
        teachers: Sequence[str],
        domains: Sequence[str],
        device: torch.device | str = "cpu",
        *,
        has_one_hot: bool = False,
    ) -> None:
        self._has_one_hot = has_one_hot
        self._teachers = list(teachers)
        self._domains = list(domains)
        num_teachers, num_domains = len(teachers), len(domains)
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(_SCALARS, ())
        shapes |= dict.fromkeys(_PER_TEACHER, (num_teachers,))
        shapes |= dict.fromkeys(_PER_DOMAIN, (num_teachers, num_domains))
        self._shapes = shapes
        self._vector = torch.zeros(sum(map(math.prod, shapes.values())), dtype=torch.float64, device=device)
        self._sums = self._by_name(self._vector)

    def add(self, batch: MicroBatch, output: ObjectiveOutput) -> None:
        """Count one micro-batch and what the objective said of it."""
        self._count("loss", output.loss.detach())
        self._count("tokens", batch.gold.numel())
        self._count("bytes", batch.gold_bytes.sum())
        self._count("clm", output.clm.sum())
        if batch.fused is None:
            return
        listened = output.listened
        self._count("fusion", output.fusion.sum())
        self._count("fused", listened.sum())
        domain = batch.domain[batch.segment]
        num_domains = len(self._domains)
        by_domain = torch.zeros(len(self._teachers), num_domains, dtype=torch.float64, device=domain.device)
        heard = listened.double().expand(len(self._teachers), -1)
        self._count("won", by_domain.index_add(1, domain, batch.fused.weights * heard))
        self._count("fused_by_domain", by_domain.index_add(1, domain, heard))
        for name, values in _teacher_sums(batch).items():
            self._count(name, values)
        if self._has_one_hot:
            return
        ahead_nats, ahead_bytes = advantage(
            [part.candidates for part in batch.teachers],
            output.clm,
            segment=batch.segment,
            gold_bytes=batch.gold_bytes,
            num_segments=batch.domain.numel(),
        )
        self._count("ahead_nats", by_domain.index_add(1, batch.domain, ahead_nats.double()))
        self._count("ahead_bytes", by_domain.index_add(1, batch.domain, ahead_bytes.double()))

    def add_wait(self, seconds: float) -> None:
        """Count how long this rank waited for its batch."""
        self._count("wait_s", seconds)
        self._count("ranks", 1)

    def add_compute(self, cpu_seconds: float) -> None:
        """Count what forward and backward of a micro-batch took of this rank's thread."""
        self._count("compute_cpu_s", cpu_seconds)

    def reduce(self) -> None:
        """Sum over all ranks."""
        if dist.get_world_size() > 1:
            dist.all_reduce(self._vector)

    def figures(self) -> dict[str, float]:
        """The figures of the step; a figure without anything to measure is left out."""
        host = self._by_name(self._vector.cpu())
        sums: dict[str, Any] = {name: values.tolist() for name, values in host.items()}
        figures: dict[str, float] = {
            "loss/clm": _ratio(sums["clm"], sums["tokens"]),
            "loss/fusion": _ratio(sums["fusion"], sums["fused"]),
            "loss/bits_per_byte": _ratio(sums["clm"] / math.log(2), sums["bytes"]),
            "tokens": sums["tokens"],
            "fusion/listened_share": _ratio(sums["fused"], sums["tokens"]),
            "time/wait_s": _ratio(sums["wait_s"], sums["ranks"]),
            "time/compute_cpu_s": sums["compute_cpu_s"],
        }
        for k, teacher in enumerate(self._teachers):
            at = f"teacher/{teacher}"
            figures[f"{at}/win_share"] = _ratio(sum(sums["won"][k]), sums["fused"])
            dropped = sums["dropped"][k]
            if dropped:
                figures[f"{at}/dropped_tokens"] = dropped
            figures[f"{at}/coverage"] = _ratio(sums["valid"][k], sums["tokens"] - dropped)
            figures[f"{at}/residual"] = _ratio(sums["residual"][k], sums["valid"][k])
            figures[f"{at}/fidelity"] = _ratio(
                _ratio(sums["aligned_nats"][k], sums["aligned_bytes"][k]),
                _ratio(sums["own_nats"][k], sums["own_bytes"][k]),
            )
            for d, domain in enumerate(self._domains):
                figures[f"{at}/win_share/{domain}"] = _ratio(sums["won"][k][d], sums["fused_by_domain"][k][d])
                figures[f"{at}/advantage/{domain}"] = _ratio(
                    sums["ahead_nats"][k][d], sums["ahead_bytes"][k][d]
                )
        # The loss stays even if it is NaN: that is what the step looks at.
        measured = {name: value for name, value in figures.items() if not math.isnan(value)}
        return {"loss": sums["loss"]} | measured

    def _by_name(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of its parts."""
        parts = vector.split([math.prod(shape) for shape in self._shapes.values()])
        return {name: part.view(self._shapes[name]) for name, part in zip(self._shapes, parts, strict=True)}

    def _count(self, name: str, value: Tensor | float) -> None:
        self._sums[name] += value


def _teacher_sums(batch: MicroBatch) -> dict[str, Tensor]:
    # No selection by a mask: how much it leaves is a number that a GPU would have to tell.
    candidates = [part.candidates for part in batch.teachers]
    valid = torch.stack([c.valid for c in candidates])
    residual = torch.stack([c.residual for c in candidates]).exp()
    gold = torch.stack([c.gold for c in candidates])
    known = gold.isfinite()
    return {
        "valid": valid.sum(1),
        "dropped": torch.stack(
            [
                valid.new_full((), batch.gold.numel() * part.is_dropped, dtype=torch.int64)
                for part in batch.teachers
            ]
        ),
        "residual": residual.where(valid, 0.0).sum(1),
        "aligned_nats": -gold.where(known, 0.0).sum(1),
        "aligned_bytes": (batch.gold_bytes * known).sum(1),
        "own_nats": torch.stack([part.own_nats.sum() for part in batch.teachers]),
        "own_bytes": torch.stack([part.own_bytes.sum() for part in batch.teachers]),
    }


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan
