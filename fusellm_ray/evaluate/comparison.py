"""What a study found: each arm's bits per byte over seeds, and how far it is from the arm all are compared with."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from fusellm_ray.evaluate.bootstrap import LEVEL, MEAN, Interval, PairedBootstrap
from fusellm_ray.evaluate.table import Grid, difference_grid, interval_json, mean_bits_per_byte, show_interval
from fusellm_ray.perplexity import DocumentScore, by_domain


@dataclass(frozen=True)
class Comparison:
    """The scores of a study's arms on the same documents.

    Two kinds of chance are kept apart: `spread` is over seeds, intervals are over documents, of each arm's nats
    averaged over its seeds.
    """

    name: str
    against: str
    scores: Mapping[str, Mapping[int, Sequence[DocumentScore]]]
    """Arm → seed → documents."""
    details: Mapping[str, Mapping[str, Any]]
    """Arm → what else is to be kept about it."""
    num_resamples: int
    fixed: frozenset[str] = frozenset()
    """Arms that draw nothing at random: their one seed stands for all."""
    failures: Mapping[str, str] = field(default_factory=dict)
    """What could not be made → why."""

    @cached_property
    def bits(self) -> dict[str, dict[int, dict[str, float]]]:
        """Arm → seed → domain or `MEAN` → bits per byte."""
        bits: dict[str, dict[int, dict[str, float]]] = {}
        for arm, by_seed in self.scores.items():
            bits[arm] = {}
            for seed, documents in by_seed.items():
                domains = by_domain(documents)
                own = {name: score.bits_per_byte for name, score in domains.items()}
                bits[arm][seed] = own | {MEAN: mean_bits_per_byte(domains)}
        return bits

    @cached_property
    def differences(self) -> dict[str, dict[str, Interval]]:
        """Arm → domain or `MEAN` → difference from `against`, over the seeds that both have."""
        arms = {arm: self.shared_seeds(arm) for arm in self.scores if arm != self.against}
        bootstraps = {
            seeds: PairedBootstrap(
                {
                    arm: _average(self._of_seeds(arm, seeds))
                    for arm in self.scores
                    if arm == self.against or arms[arm] == seeds
                },
                num_resamples=self.num_resamples,
            )
            for seeds in set(arms.values())
            if seeds
        }
        return {arm: bootstraps[seeds].difference(arm, self.against) for arm, seeds in arms.items() if seeds}

    def shared_seeds(self, arm: str) -> tuple[int, ...]:
        """Seeds on which an arm can be compared with `against`."""
        own, other = self.scores[arm].keys(), self.scores.get(self.against, {}).keys()
        if arm in self.fixed:
            return tuple(sorted(other))
        if self.against in self.fixed and other:
            return tuple(sorted(own))
        return tuple(sorted(own & other))

    def _of_seeds(self, arm: str, seeds: Sequence[int]) -> list[Sequence[DocumentScore]]:
        own = self.scores[arm]
        return list(own.values()) if arm in self.fixed else [own[seed] for seed in seeds]

    def mean(self, arm: str, domain: str) -> float:
        return statistics.fmean(by[domain] for by in self.bits[arm].values())

    def spread(self, arm: str, domain: str) -> float | None:
        """Standard deviation over seeds; None with fewer than two."""
        values = [by[domain] for by in self.bits[arm].values()]
        return statistics.stdev(values) if len(values) > 1 else None

    def by_seed(self, arm: str) -> dict[int, float]:
        """Seed → difference of the means from `against`, for seeds that both have."""
        other = self.bits.get(self.against, {})
        return {seed: by[MEAN] - other[seed][MEAN] for seed, by in self.bits[arm].items() if seed in other}

    def grid(self) -> Grid:
        """A row an arm: each domain's bits per byte, mean ± spread, and the difference of the mean."""
        domains = self._domains
        rows = []
        for arm in self.bits:
            cells = [f"{self.mean(arm, domain):.4f}" for domain in domains]
            spread = self.spread(arm, MEAN)
            cells[-1] += "" if spread is None else f" ± {spread:.4f}"
            difference = ""
            if arm in self.differences:
                difference = show_interval(self.differences[arm][MEAN])
            if self._is_uneven:
                cells[-1] += f", n = {len(self.bits[arm])}"
                difference += f", n = {len(self.shared_seeds(arm))}" if difference else ""
            rows.append([arm, *cells, difference])
        best = frozenset(
            (min(range(len(rows)), key=lambda i, d=d: self.mean(rows[i][0], d)), j)  # type: ignore[misc]
            for j, d in enumerate(domains, 1)
        )
        return Grid(self._title(), ["arm", *domains, f"mean − {self.against}"], rows, best)

    def markdown(self) -> str:
        parts = [f"# {self.name}\n", self.grid().markdown()]
        if self.differences:
            parts.append(difference_grid(self.differences, self.against).markdown())
        if self.failures:
            lines = [f"- {what}: {why}\n" for what, why in self.failures.items()]
            parts.append("Failed, and missing above:\n\n" + "".join(lines))
        return "\n".join(parts)

    def as_json(self) -> dict[str, Any]:
        """What `evaluate --json` writes, of each arm's mean over seeds; `models` says more about each arm."""
        models: dict[str, Any] = {}
        for arm in self.bits:
            mean = {domain: self.mean(arm, domain) for domain in self._domains}
            models[arm] = {
                "mean": mean.pop(MEAN),
                "domains": {domain: {"bits_per_byte": value} for domain, value in mean.items()},
                "spread": {domain: self.spread(arm, domain) for domain in self._domains},
                "seeds": {str(seed): by for seed, by in self.bits[arm].items()},
                "difference_by_seed": {str(seed): value for seed, value in self.by_seed(arm).items()},
                **self.details[arm],
            }
        return {
            "study": self.name,
            "models": models,
            "against": self.against,
            "differences": {
                arm: {domain: interval_json(interval) for domain, interval in own.items()}
                for arm, own in self.differences.items()
            },
            "bootstrap": {"resamples": self.num_resamples, "seed": 0, "level": LEVEL},
            "failures": dict(self.failures),
        }

    @property
    def _domains(self) -> list[str]:
        """`MEAN` is the last."""
        return list(next(iter(next(iter(self.bits.values())).values())))

    @property
    def _is_uneven(self) -> bool:
        """Not every arm has all the seeds that others have."""
        drawn = [tuple(by_seed) for arm, by_seed in self.scores.items() if arm not in self.fixed]
        return len(set(drawn)) > 1

    def _title(self) -> str:
        seeds = f"{max(len(by_seed) for by_seed in self.scores.values())} seed(s)"
        if self._is_uneven:
            seeds = "n seeds, differences over the n that both have"
        return (
            f"bits per byte on held-out text (lower is better); mean of {seeds}, ± their standard deviation; "
            f"{LEVEL:.0%} paired bootstrap interval over documents"
        )


def _average(seeds: Sequence[Sequence[DocumentScore]]) -> list[DocumentScore]:
    """Each document's nats averaged over seeds."""
    return [
        replace(same[0], nats=math.fsum(score.nats for score in same) / len(same))
        for same in zip(*seeds, strict=True)
    ]
