"""What becomes of a step when a teacher is lost: the batch, its figures, and what is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fusellm_ray.alignment.project import Aligned
from fusellm_ray.config import FusionConfig, ObjectiveConfig, TeacherConfig
from fusellm_ray.corpus.rows import Row, Segment
from fusellm_ray.fusion.loss import objective
from fusellm_ray.observe.losses import TeacherLosses
from fusellm_ray.target.batches import MicroBatch, make_micro_batch
from fusellm_ray.target.statistics import StepStatistics

TEACHERS = [TeacherConfig(name=name, model=str(Path("none")), top_k=2) for name in ("a", "b")]
N = 4


def answer(gold: float) -> list[Aligned]:
    """One segment of N positions: two candidates of a quarter of the rest each."""
    rest = 1 - np.exp(gold)
    return [
        Aligned(
            ids=np.tile(np.array([5, 6], np.int32), (N, 1)),
            logprobs=np.full((N, 2), np.log(rest / 4), np.float32),
            gold=np.full(N, gold, np.float32),
            residual=np.full(N, np.log(rest / 2), np.float32),
            valid=np.ones(N, np.bool_),
            teacher_nats=-N * gold,
            teacher_tokens=N,
            teacher_bytes=N,
        )
    ]


def micro_batch(*answers: list[Aligned] | None, **fusion: Any) -> MicroBatch:
    ids = np.arange(N + 1, dtype=np.int32)
    segment = Segment(b"abcde", ids, ids + 1, False, "d", "d:0")
    return make_micro_batch(
        [Row((segment,))],
        answers,
        row_tokens=8,
        pad_id=0,
        domains={"d": 0},
        fusion=FusionConfig(**fusion),
        teachers=TEACHERS[: len(answers)],
    )


@pytest.mark.parametrize("unit", ["nats_per_byte", "nats_per_token"])
@pytest.mark.parametrize("rule", ["min_ce", "avg_ce", "mean", "weighted"])
def test_a_batch_without_a_teacher_is_fused_as_if_there_were_none(rule: str, unit: str) -> None:
    alone = micro_batch(answer(-1.0), rule=rule, unit=unit).fused
    left = micro_batch(answer(-1.0), None, rule=rule, unit=unit).fused
    assert alone is not None
    assert left is not None
    assert left.valid.all()
    torch.testing.assert_close(left.gold, alone.gold)
    torch.testing.assert_close(left.logprobs[:, :2], alone.logprobs)
    torch.testing.assert_close(left.weights, torch.tensor([[1.0] * N, [0.0] * N]))


def test_tokens_without_any_teacher_are_trained_on_clm_only() -> None:
    batch = micro_batch(None, None)
    assert batch.fused is not None
    assert not batch.fused.valid.any()
    torch.manual_seed(0)
    hidden, head = torch.randn(N, 3), torch.randn(8, 3)
    settings = {"config": ObjectiveConfig(clm_weight=0.3), "denominator": 1.0}
    lost = objective(hidden, head, None, batch.gold, batch.fused, **settings)
    plain = objective(hidden, head, None, batch.gold, None, **settings)
    torch.testing.assert_close(lost.loss, plain.loss)
    assert not lost.listened.any()


def test_dropped_tokens_are_counted_and_do_not_count_as_uncovered() -> None:
    statistics = StepStatistics(["a", "b"], ["d"])
    for answers in ((answer(-1.0), answer(-2.0)), (answer(-1.0), None)):
        batch = micro_batch(*answers)
        output = objective(
            torch.zeros(N, 3),
            torch.zeros(8, 3),
            None,
            batch.gold,
            batch.fused,
            config=ObjectiveConfig(),
            denominator=1.0,
        )
        statistics.add(batch, output)
    figures = statistics.figures()
    assert figures["teacher/b/dropped_tokens"] == N
    assert "teacher/a/dropped_tokens" not in figures
    assert figures["teacher/a/coverage"] == figures["teacher/b/coverage"] == 1


def step(number: int, **dropped: int) -> dict[str, Any]:
    return {"event": "step", "step": number} | {
        f"teacher/{name}/dropped_tokens": float(tokens) for name, tokens in dropped.items()
    }


def test_losses_and_returns_are_said_once_and_tokens_are_added_up() -> None:
    losses = TeacherLosses(["a", "b"])
    assert losses.notes(step(1)) == []
    assert ["teacher a is LOST; 10 tokens" in note for note in losses.notes(step(2, a=10))] == [True]
    assert losses.notes(step(3, a=20)) == []
    loss, alarm = losses.notes(step(4, a=20, b=20))
    assert "teacher b is LOST" in loss
    assert "ALL teachers are lost" in alarm
    assert losses.notes(step(5, a=20, b=20)) == []
    assert [note.split(": ")[1] for note in losses.notes(step(6))] == [
        "teacher a is back; 70 tokens went without it",
        "teacher b is back; 40 tokens went without it",
    ]
    assert losses.dropped_tokens == {"a": 70, "b": 40}


START = {"event": "start", "step": 0}


def test_a_step_that_a_restart_repeats_counts_once() -> None:
    for restart in ([], [START | {"step": 1}]):  # a record may be lost on its way to the driver
        losses = TeacherLosses(["a", "b"])
        for record in (step(1, a=10), step(2, a=20), step(3), *restart, step(2, a=5), step(3)):
            losses.notes(record)
        assert losses.dropped_tokens == {"a": 15}


def test_a_loss_whose_steps_a_restart_takes_again_is_forgotten() -> None:
    losses = TeacherLosses(["a", "b"])
    for record in (START, step(1, a=10), START):
        losses.notes(record)
    assert losses.notes(step(1)) == []
    assert losses.dropped_tokens == {}


def test_a_loss_whose_step_comes_again_without_a_start_is_told_as_over() -> None:
    losses = TeacherLosses(["a", "b"])
    losses.notes(step(1, a=10))
    assert losses.notes(step(1)) == ["step 1: teacher a is back; 0 tokens went without it"]
