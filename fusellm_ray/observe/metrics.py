"""What Prometheus sees of a run, through Ray's metrics port of each node (`ray_` comes before every name).

    rank      fusellm_rank_*                 each rank its own
    rank 0    fusellm_loss, …_teacher_*      figures of a step and of evaluations, the same on all ranks
    replica   fusellm_teacher_scored_tokens… what it answered
    pool      fusellm_teacher_replicas…      how it stands

What a step has no figure for keeps its last value: a dropped teacher's win share falls to 0, its other figures stay.
Teachers may serve many runs, so what replicas and pools count has no run: of two runs on one cluster that each start a
teacher of one name, it is the sum.

Where several processes of a teacher count the same, sum over them: each has series of its own (Ray adds WorkerId).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

_LATENCY_S = [0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]

# name: (what it is, tags besides those of the process)
_STEP_GAUGES = {
    "step": ("Optimiser steps done", ()),
    "steps": ("Optimiser steps of the whole run", ()),
    "tokens_per_s": ("Target tokens trained on per second, over all ranks", ()),
    "loss": ("Nats: the objective (total), and its parts per token (clm, fusion)", ("part",)),
    "grad_norm": ("Norm of the gradient before clipping", ()),
    "skipped_steps": ("Steps skipped for a loss or gradient that is no number", ()),
    "bits_per_byte": ("Of the target on held-out text", ("domain",)),
    "teacher_win_share": ("Share of listened positions that the teacher's distribution won", ("teacher",)),
    "teacher_domain_win_share": ("... of one domain", ("teacher", "domain")),
    "teacher_advantage": ("Nats per byte that the teacher is ahead of the target", ("teacher", "domain")),
    "teacher_coverage": ("Share of target positions with a distribution", ("teacher",)),
    "teacher_fidelity": ("Aligned nats per byte over the teacher's own: 1 is perfect", ("teacher",)),
    "teacher_residual": ("Mean mass outside the top-k and the gold token", ("teacher",)),
}
_TOP_LEVEL = ("step", "steps", "grad_norm", "skipped_steps")


def gauges_of(event: str, figures: Mapping[str, Any]) -> list[tuple[str, dict[str, str], float]]:
    """A record of metrics.jsonl as (gauge, tags, value); figures without a gauge are left out."""
    found: list[tuple[str, dict[str, str], float]] = []
    for key, value in figures.items():
        match [event, *key.split("/")]:
            case ["step", name] if name in _TOP_LEVEL:
                found.append((name, {}, value))
            case ["step", "loss"]:
                found.append(("loss", {"part": "total"}, value))
            case ["step", "loss", ("clm" | "fusion") as part]:
                found.append(("loss", {"part": part}, value))
            case ["step", "perf", "tokens_per_s"]:
                found.append(("tokens_per_s", {}, value))
            case ["step", "teacher", teacher, ("win_share" | "coverage" | "fidelity" | "residual") as name]:
                found.append((f"teacher_{name}", {"teacher": teacher}, value))
            case ["step", "teacher", teacher, "win_share", domain]:
                found.append(("teacher_domain_win_share", {"teacher": teacher, "domain": domain}, value))
            case ["step", "teacher", teacher, "advantage", domain]:
                found.append(("teacher_advantage", {"teacher": teacher, "domain": domain}, value))
            case ["evaluation", "bits_per_byte", domain]:
                found.append(("bits_per_byte", {"domain": domain}, value))
    return found


class RankMetrics:
    """Of a trainer rank.

    Args:
        run: its name.
        rank: its index; rank 0 exports what is the same on all of them, too.
    """

    def __init__(self, run: str, rank: int) -> None:
        own = {"run": run, "rank": str(rank)}
        keys = ("run", "rank")
        self._wait = Gauge("fusellm_rank_wait_share", "Share of a step spent waiting for teachers", keys)
        self._speed = Gauge("fusellm_rank_tokens_per_s", "Target tokens the rank trained on per second", keys)
        for gauge in (self._wait, self._speed):
            gauge.set_default_tags(own)
        self._shared = {
            name: Gauge(f"fusellm_{name}", text, ("run", *tags)).set_default_tags({"run": run})
            for name, (text, tags) in _STEP_GAUGES.items()
        }

    def step(self, *, wait_share: float, tokens_per_s: float) -> None:
        """What this rank measured of its own step."""
        self._wait.set(wait_share)
        self._speed.set(tokens_per_s)

    def record(self, event: str, figures: Mapping[str, Any]) -> None:
        """What a record of the run says; called on rank 0 only."""
        for name, tags, value in gauges_of(event, figures):
            self._shared[name].set(float(value), tags)


class ReplicaMetrics:
    """Of a teacher's replica; its counters follow the sums of `ReplicaStats`."""

    def __init__(self, teacher: str) -> None:
        own, keys = {"teacher": teacher}, ("teacher",)
        self._counters = {
            "positions": Counter("fusellm_teacher_scored_tokens", "Target positions answered for", keys),
            "frame_bytes": Counter("fusellm_teacher_frame_bytes", "Bytes of frames sent to ranks", keys),
        }
        self._latency = Histogram(
            "fusellm_teacher_latency_s", "From a request's arrival to its answer", _LATENCY_S, keys
        )
        for metric in (*self._counters.values(), self._latency):
            metric.set_default_tags(own)
        self._counted = dict.fromkeys(self._counters, 0)

    def answered(self, seconds: float) -> None:
        self._latency.observe(seconds)

    def follow(self, **sums: int) -> None:
        """Bring the counters to these sums since the process started."""
        for name, total in sums.items():
            if total > self._counted[name]:
                self._counters[name].inc(total - self._counted[name])
                self._counted[name] = total


class PoolMetrics:
    """Of a teacher's pool."""

    def __init__(self, teacher: str) -> None:
        own = {"teacher": teacher}
        self._replicas = Gauge("fusellm_teacher_replicas", "Replicas by state", ("teacher", "state"))
        self._queued = Gauge(
            "fusellm_teacher_queued_tokens", "Target tokens asked for and not answered", ("teacher",)
        )
        # A gauge, as its zero must be seen: Ray's counters have no series before their first increment.
        self._restarts = Gauge(
            "fusellm_teacher_restarts", "Times a replica that was up had to be brought up again", ("teacher",)
        )
        for metric in (self._replicas, self._queued, self._restarts):
            metric.set_default_tags(own)

    def show(self, *, ready: int, starting: int, queued_tokens: int, restarts: int) -> None:
        self._replicas.set(ready, {"state": "ready"})
        self._replicas.set(starting, {"state": "starting"})
        self._queued.set(queued_tokens)
        self._restarts.set(restarts)
