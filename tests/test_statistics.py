"""A step's figures."""

import math

import pytest
import torch

from fusellm_ray.fusion.fuse import Candidates, Fused
from fusellm_ray.fusion.loss import ObjectiveOutput
from fusellm_ray.target.batches import MicroBatch, TeacherPart
from fusellm_ray.target.statistics import StepStatistics


def batch() -> MicroBatch:
    """Four positions of two segments, of domains 0 and 1; teacher 1 is silent at the last position."""
    gold = torch.tensor([[-1.0, -2.0, -3.0, -4.0], [-0.5, -0.5, -0.5, -torch.inf]])
    candidates = [
        Candidates(
            ids=torch.zeros(4, 1, dtype=torch.int64),
            logprobs=torch.full((4, 1), -torch.inf),
            gold=own,
            residual=torch.log1p(-own.exp()),
            valid=own.isfinite(),
        )
        for own in gold
    ]
    weights = torch.tensor([[0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 0.0]])
    chosen = weights.argmax(0)
    own = torch.stack([-gold[0], -gold[1].clamp(min=-1)])
    parts = tuple(
        TeacherPart(c, own[k].view(2, 2).sum(1).double(), torch.full((2,), 2.0), torch.full((2,), 6.0))
        for k, c in enumerate(candidates)
    )
    return MicroBatch(
        input_ids=torch.zeros(1, 6, dtype=torch.int64),
        position_ids=torch.zeros(1, 6, dtype=torch.int64),
        positions=torch.arange(4),
        gold=torch.zeros(4, dtype=torch.int64),
        gold_bytes=torch.full((4,), 3.0),
        segment=torch.tensor([0, 0, 1, 1]),
        domain=torch.tensor([0, 1]),
        teachers=parts,
        fused=Fused(
            candidates[0].ids,
            candidates[0].logprobs,
            gold[chosen, torch.arange(4)],
            candidates[0].residual,
            torch.ones(4, dtype=torch.bool),
            weights,
        ),
    )


def figures(loss: float = 2.0) -> dict[str, float]:
    statistics = StepStatistics(["a", "b"], ["x", "y"])
    clm = torch.tensor([1.0, 1.0, 2.0, 2.0])
    listened = torch.tensor([False, True, True, True])
    statistics.add(batch(), ObjectiveOutput(torch.tensor(loss), clm, 0.5 * listened, listened))
    statistics.add_wait(0.25)
    return statistics.figures()


def test_figures_are_ratios_of_sums():
    seen = figures()
    assert seen["tokens"] == 4
    assert seen["loss/clm"] == pytest.approx(6 / 4)
    assert seen["loss/bits_per_byte"] == pytest.approx(6 / math.log(2) / 12)
    assert seen["loss/fusion"] == pytest.approx(0.5)
    assert seen["fusion/listened_share"] == pytest.approx(3 / 4)
    assert seen["teacher/a/win_share"] == pytest.approx(1 / 3)
    assert seen["teacher/b/win_share"] == pytest.approx(2 / 3)
    assert seen["teacher/b/win_share/y"] == pytest.approx(1 / 2)
    assert seen["teacher/b/residual"] == pytest.approx(1 - math.exp(-0.5))
    assert seen["teacher/a/fidelity"] == pytest.approx(1)
    assert seen["teacher/b/fidelity"] == pytest.approx((1.5 / 9) / (2.5 / 12))
    assert seen["teacher/a/coverage"] == 1
    assert seen["teacher/b/coverage"] == pytest.approx(3 / 4)
    assert seen["time/wait_s"] == pytest.approx(0.25)


def test_the_advantage_is_the_targets_nats_minus_the_teachers_per_byte_of_the_domain():
    seen = figures()
    assert seen["teacher/a/advantage/x"] == pytest.approx((2 - 3) / 6)
    assert seen["teacher/a/advantage/y"] == pytest.approx((4 - 7) / 6)
    assert seen["teacher/b/advantage/x"] == pytest.approx((2 - 1) / 6)
    assert seen["teacher/b/advantage/y"] == pytest.approx((2 - 0.5) / 3)  # where b knows the gold token


def test_under_one_hot_stand_ins_no_advantage_is_claimed():
    statistics = StepStatistics(["a", "b"], ["x", "y"], has_one_hot=True)
    every = torch.ones(4)
    statistics.add(batch(), ObjectiveOutput(torch.tensor(2.0), every, every, every.bool()))
    seen = statistics.figures()
    assert seen["teacher/b/coverage"] == pytest.approx(3 / 4)
    assert not [name for name in seen if "advantage" in name]


def test_a_figure_without_anything_to_measure_is_left_out_but_a_loss_that_is_no_number_stays():
    assert math.isnan(figures(loss=math.nan)["loss"])
    nothing = StepStatistics(["a"], ["x"]).figures()
    assert "teacher/a/win_share" not in nothing
    assert "loss/clm" not in nothing
