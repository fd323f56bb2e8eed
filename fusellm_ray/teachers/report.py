"""What replicas and pools say of themselves; light to import, for pools and drivers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fusellm_ray.teachers.scaling import Decision

if TYPE_CHECKING:
    from fusellm_ray.alignment.project import Aligned
    from fusellm_ray.corpus.rows import Segment


@dataclass(frozen=True, slots=True)
class Description:
    """What a loaded replica is."""

    name: str
    fingerprint: str
    """Of all that its answers depend on besides the text; equal for all replicas of a teacher."""
    vocab_size: int
    target_vocab_size: int
    max_context: int
    top_k: int
    incarnation: str
    """Changes when the process does."""
    pid: int
    node: str
    """Its host's name."""
    identity: dict[str, Any]
    """What `fingerprint` is the hash of; see `scoring.teacher_identity`."""
    passage_logprobs: tuple[float, ...]
    """Gold logprobs of the self-test's passage in the target's tokens; -inf where it says nothing."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a replica is busy with."""

    incarnation: str
    queued_tokens: int
    """Target tokens of the requests it has accepted and not answered."""
    stalled_s: float
    """How long requests have been waiting without one being answered."""
    failures: int
    """Requests that failed since the engine last scored one."""
    positions: int
    """Target positions answered for, since its process started."""
    engine_s: float
    """Time its engine had something to do."""
    cache_hits: int
    """Segments that were asked for and not scored again ..."""
    cache_misses: int
    """... and those that were scored."""
    problem: str | None
    """Why its engine can score no more, None while it can."""


@dataclass(slots=True)
class ReplicaStats:
    """Sums since the process started."""

    requests: int = 0
    answered: int = 0
    """Target positions in the answers, from the cache or not."""
    cache_hits: int = 0
    """Segments that were asked for and not scored again."""
    cache_misses: int = 0
    segments: int = 0
    """... that were scored: all below is about them."""
    tokens: int = 0
    """Teacher tokens scored."""
    positions: int = 0
    """Target positions scored."""
    covered: int = 0
    """... of these, with a distribution."""
    engine_s: float = 0.0
    """Wall time during which the engine had at least one request."""
    align_s: float = 0.0
    cpu_s: float = 0.0
    model_cpu_s: float = 0.0
    """... of which in the model; NaN where the engine is a process of its own."""
    frame_bytes: int = 0
    residual: float = 0.0
    """Sum over covered positions of the mass outside the candidates and the gold token."""
    aligned_nats: float = 0.0
    """Of gold at positions where it is known ..."""
    aligned_bytes: int = 0
    """... which predict this many bytes."""
    teacher_nats: float = 0.0
    """The teacher's own, on its own tokens ..."""
    teacher_bytes: int = 0
    """... which cover this many bytes."""

    @property
    def coverage(self) -> float:
        """Share of the target's positions that have a distribution."""
        return self.covered / max(1, self.positions)

    @property
    def fidelity(self) -> float:
        """Aligned nats per byte over the teacher's own: 1 is a perfect projection."""
        if not self.aligned_bytes or not self.teacher_nats:
            return float("nan")
        return (self.aligned_nats / self.aligned_bytes) / (self.teacher_nats / self.teacher_bytes)

    def record(self, segment: Segment, aligned: Aligned) -> None:
        self.positions += len(aligned.gold)
        self.covered += int(aligned.valid.sum())
        self.residual += float(np.exp(aligned.residual[aligned.valid]).sum())
        known = np.isfinite(aligned.gold)
        self.aligned_nats -= float(aligned.gold[known].sum())
        self.aligned_bytes += int(np.diff(segment.ends)[known].sum())
        self.teacher_nats += aligned.teacher_nats
        self.teacher_bytes += aligned.teacher_bytes


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """How a pool stands."""

    name: str
    wanted: int
    most: int
    """Replicas it may grow to."""
    ready: int
    tokens_per_s: float
    """Target positions answered for in a second, all replicas together, while they were last looked at."""
    cache_hit_share: float
    """Segments that were answered without being scored again, of all."""
    settings: dict[str, Any]
    """What its answers depend on; see `identity.answer_settings`."""
    asks: dict[str, float]
    """Resources of one replica."""
    labels: dict[str, str]
    """... and the labels of its node."""
    hang_s: float
    """A replica that holds requests and has answered none for so long is restarted."""
    problems: tuple[str, ...]
    """What keeps replicas from being up, as far as known."""
    description: Description | None
    """Of the first replica that was ready."""
    decisions: tuple[Decision, ...] = ()
    """Latest changes of the number of replicas, oldest first."""
    queued_tokens: int = 0
    """Target tokens asked for and not answered."""
    restarts: int = 0
    """Times a replica that was up had to be brought up again."""
