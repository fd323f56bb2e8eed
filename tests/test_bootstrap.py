"""Paired bootstrap intervals: against a plain reference, and their coverage where the truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fusellm_ray.evaluate.bootstrap import MEAN, PairedBootstrap, resample_ratios
from fusellm_ray.perplexity import DocumentScore


def documents(nats: np.ndarray, sizes: np.ndarray, domain: str = "a") -> list[DocumentScore]:
    return [
        DocumentScore(domain, f"{domain}:{i}", float(x), int(n), int(n))
        for i, (x, n) in enumerate(zip(nats, sizes, strict=True))
    ]


def test_draws_are_ratio_estimators_of_documents_drawn_with_replacement():
    rng = np.random.default_rng(0)
    nats, sizes = rng.uniform(1, 9, (2, 5)), rng.integers(2, 9, (2, 5))
    got = resample_ratios(nats, sizes, num_resamples=50, seed=3)
    times = np.random.default_rng(3).multinomial(5, [0.2] * 5, size=50)
    for draw in range(50):
        members = [i for i in range(5) for _ in range(times[draw, i])]
        assert len(members) == 5
        for model in range(2):
            expected = sum(nats[model, i] for i in members) / sum(sizes[model, i] for i in members)
            assert got[model, draw] == pytest.approx(expected / math.log(2))


def test_the_interval_is_the_quantiles_of_paired_differences():
    rng = np.random.default_rng(1)
    sizes = rng.integers(50, 500, 30)
    a, b = rng.uniform(0.5, 1.5, 30) * sizes, rng.uniform(0.5, 1.5, 30) * sizes
    bootstrap = PairedBootstrap({"a": documents(a, sizes), "b": documents(b, sizes)}, num_resamples=400)
    interval = bootstrap.difference("a", "b")["a"]
    ratios = resample_ratios([a, b], [sizes, sizes], num_resamples=400, seed=(0, 0))
    assert interval.difference == pytest.approx((a.sum() - b.sum()) / sizes.sum() / math.log(2))
    assert [interval.low, interval.high] == pytest.approx(
        np.quantile(ratios[0] - ratios[1], [0.025, 0.975]).tolist()
    )
    back = bootstrap.difference("b", "a")["a"]
    assert [back.difference, back.low, back.high] == pytest.approx(
        [-interval.difference, -interval.high, -interval.low]
    )


def test_the_true_difference_lies_inside_as_often_as_the_level_says():
    """500 held-out sets of 60 documents; the models' true difference is 0.02 nats a byte."""
    rng = np.random.default_rng(2)
    inside, widths, unpaired_widths = 0, [], []
    for _ in range(500):
        sizes = rng.integers(200, 4000, 60)
        hardness = rng.normal(1.0, 0.3, 60)
        a = (hardness + rng.normal(0.02, 0.05, 60)) * sizes
        b = hardness * sizes
        low, high = np.quantile(
            np.subtract(*resample_ratios([a, b], [sizes, sizes], num_resamples=400, seed=0)), [0.025, 0.975]
        )
        inside += low <= 0.02 / math.log(2) <= high
        widths.append(high - low)
        alone = resample_ratios([a], [sizes], num_resamples=400, seed=0)[0]
        unpaired_widths.append(np.subtract(*np.quantile(alone, [0.975, 0.025])))
    assert 0.92 <= inside / 500 <= 0.97
    assert np.mean(widths) < 0.25 * np.mean(unpaired_widths)  # what pairing is for


def test_the_mean_weighs_domains_equally_and_draws_within_each():
    rng = np.random.default_rng(4)
    models: dict[str, list[DocumentScore]] = {"x": [], "y": []}
    for domain, count in (("large", 100), ("small", 10)):
        sizes = rng.integers(100, 1000, count)
        for model in models:
            models[model] += documents(rng.uniform(0.9, 1.1, count) * sizes, sizes, domain)
    result = PairedBootstrap(models).difference("x", "y")
    assert list(result) == ["large", "small", MEAN]
    assert result[MEAN].difference == pytest.approx(
        (result["large"].difference + result["small"].difference) / 2
    )
    assert result[MEAN].high - result[MEAN].low < result["small"].high - result["small"].low


def test_too_few_documents_give_a_difference_and_no_interval():
    sizes = np.array([100] * 7)
    models = {"x": documents(sizes * 1.0, sizes), "y": documents(sizes * 1.1, sizes)}
    result = PairedBootstrap(models).difference("x", "y")["a"]
    assert result.difference == pytest.approx(-0.1 / math.log(2))
    assert math.isnan(result.low)
    assert not result.is_decided


def test_a_document_that_one_model_cannot_score_is_left_out_of_the_pair():
    sizes = np.array([100] * 9)
    x, y = documents(sizes * 1.0, sizes), documents(sizes * 1.1, sizes)
    y[3] = DocumentScore("a", "a:3", 0.0, 0, 0)
    x[3] = DocumentScore("a", "a:3", 900.0, 1, 1)
    assert PairedBootstrap({"x": x, "y": y}).difference("x", "y")["a"].difference == pytest.approx(
        -0.1 / math.log(2)
    )
