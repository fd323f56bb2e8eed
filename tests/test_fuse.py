"""Fusion of K teachers against plain Python references, and its invariances."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fusellm_ray.config import FusionConfig
from fusellm_ray.errors import AlignmentError, ConfigError
from fusellm_ray.fusion.fuse import Candidates, Fused, advantage, fuse

V, N, S = 29, 60, 6
RULES = ("min_ce", "avg_ce", "mean", "weighted")
GRANULARITIES = ("token", "segment", "row")
UNITS = ("nats_per_byte", "nats_per_token")


def make_teacher(seed: int, top_k: int = 4, gold: Tensor | None = None) -> Candidates:
    """A random teacher, silent at some positions, and at some of these without a gold logprob either."""
    rng = torch.Generator().manual_seed(seed)
    gold = make_batch()["gold"] if gold is None else gold
    full = torch.randn(N, V, generator=rng).mul(2).log_softmax(1)
    top = full.scatter(1, gold[:, None], -torch.inf).topk(top_k, dim=1)
    at_gold = full.gather(1, gold[:, None]).squeeze(1)
    valid = torch.rand(N, generator=rng) < 0.8
    unknown = ~valid & (torch.rand(N, generator=rng) < 0.5)
    return Candidates(
        ids=top.indices,
        logprobs=top.values,
        gold=at_gold.masked_fill(unknown, -torch.inf),
        residual=torch.log1p(-top.values.exp().sum(1) - at_gold.exp()),
        valid=valid,
    )


def make_batch() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(99)
    segment = torch.arange(N) // 11
    segment[-5:] = -1
    return {
        "gold": torch.randint(V, (N,), generator=rng),
        "segment": segment,
        "row": torch.arange(N) // 33,
        "gold_bytes": torch.randint(0, 7, (N,), generator=rng),
    }


def fuse_batch(teachers: list[Candidates], config: FusionConfig, order: list[int] | None = None) -> Fused:
    batch = make_batch()
    del batch["gold"]
    order = list(range(len(teachers))) if order is None else order
    rng = torch.Generator().manual_seed(5)
    nats = torch.rand(8, S, generator=rng) * 40
    tokens = torch.randint(1, 30, (8, S), generator=rng)
    weights = [0.5, 2.0, 1.0, 0.25]
    return fuse(
        [teachers[k] for k in order],
        config=config,
        weights=[weights[k] for k in order],
        own_nats=nats[order],
        own_tokens=tokens[order],
        **batch,
    )


def dense(parts: Candidates) -> Tensor:
    """Probabilities [N, V + 2] of every token, of gold and of the residual; 0 where not valid."""
    out = torch.zeros(len(parts.valid), V + 2, dtype=torch.float64)
    out.scatter_add_(1, parts.ids, parts.logprobs.double().exp())
    out[:, V], out[:, V + 1] = parts.gold.double().exp(), parts.residual.double().exp()
    return out * parts.valid[:, None]


def assert_same(one: Fused, other: Fused) -> None:
    torch.testing.assert_close(one.valid, other.valid)
    torch.testing.assert_close(dense(one), dense(other), rtol=1e-5, atol=1e-7)


def reference_weights(teachers: list[Candidates], rule: str, granularity: str) -> Tensor:
    """Weights [K, N] by nats per byte, position by position."""
    batch = make_batch()
    out = torch.zeros(len(teachers), N, dtype=torch.float64)
    for i in range(N):
        members = [k for k, t in enumerate(teachers) if t.valid[i]]
        group = {"token": torch.arange(N), "segment": batch["segment"], "row": batch["row"]}[granularity]
        here = [
            j
            for j in range(N)
            if group[j] == group[i] and (batch["segment"][j] < 0) == (batch["segment"][i] < 0)
        ]
        common = [j for j in here if all(teachers[k].gold[j] > -math.inf for k in members)]
        size = max(sum(int(batch["gold_bytes"][j]) for j in common), 1)
        ce = {k: -sum(float(teachers[k].gold[j]) for j in common) / size for k in members}
        if members and rule == "min_ce":
            out[min(members, key=lambda k: ce[k]), i] = 1.0
        elif members:
            out[members, i] = torch.tensor([-ce[k] for k in members], dtype=torch.float64).softmax(0)
    return out


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("rule", ["min_ce", "avg_ce"])
def test_per_byte_comparisons_weigh_as_the_reference_does(rule: str, granularity: str):
    teachers = [make_teacher(seed) for seed in range(3)]
    fused = fuse_batch(teachers, FusionConfig(rule=rule, granularity=granularity))
    torch.testing.assert_close(
        fused.weights.double(), reference_weights(teachers, rule, granularity), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("granularity", ["segment", "row"])
def test_per_token_comparisons_use_the_teachers_own_nats(granularity: str):
    teachers = [replace(make_teacher(seed), valid=torch.ones(N, dtype=torch.bool)) for seed in range(2)]
    nats = torch.tensor([[10.0] * S, [12.0] * S])
    tokens = torch.tensor([[10] * S, [10] * S])
    nats[1, 2], tokens[0, 3] = (
        1.0,
        5,
    )  # Segment 2: the second is better. Segment 3: the first is twice as bad.
    tokens[1, 5] = 1000
    batch = make_batch()
    del batch["gold"]
    config = FusionConfig(rule="min_ce", granularity=granularity, unit="nats_per_token")
    fused = fuse(teachers, config=config, own_nats=nats, own_tokens=tokens, **batch)
    chosen = fused.weights.argmax(0)
    for s in range(5):
        # Rows hold segments 0 to 2 and 3 to 4 (5 is padding): 30/30 against 25/30, 20/15 against 24/20.
        expected = {"segment": [0, 0, 1, 1, 0], "row": [1, 1, 1, 1, 1]}[granularity][s]
        assert (chosen[batch["segment"] == s] == expected).all()


@pytest.mark.parametrize("granularity", ["segment", "row"])
def test_one_hot_stand_ins_do_not_make_a_teacher_the_best(granularity: str):
    worse, better = (replace(make_teacher(seed), valid=torch.ones(N, dtype=torch.bool)) for seed in range(2))
    free = torch.full((N,), -torch.inf)
    worse = replace(
        worse, logprobs=free[:, None].expand_as(worse.logprobs), gold=torch.zeros(N), residual=free
    )
    nats = torch.tensor([[12.0] * S, [10.0] * S])
    batch = make_batch()
    del batch["gold"]
    config = FusionConfig(rule="min_ce", granularity=granularity)
    fused = fuse([worse, better], config=config, own_nats=nats, own_bytes=torch.full((2, S), 9), **batch)
    assert (fused.weights.argmax(0)[batch["segment"] >= 0] == 1).all()
    assert (fuse([worse, better], config=config, **batch).weights.argmax(0)[batch["segment"] >= 0] == 0).all()


@pytest.mark.parametrize(("rule", "granularity", "unit"), itertools.product(RULES, GRANULARITIES, UNITS))
def test_permuting_teachers_changes_nothing(rule: str, granularity: str, unit: str):
    teachers = [make_teacher(0, 4), make_teacher(1, 6), make_teacher(2, 3)]
    config = FusionConfig(rule=rule, granularity=granularity, unit=unit)
    expected = fuse_batch(teachers, config)
    for order in itertools.permutations(range(3)):
        permuted = fuse_batch(teachers, config, list(order))
        assert_same(permuted, expected)
        torch.testing.assert_close(permuted.weights, expected.weights[list(order)])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_permuting_teachers_of_equal_cross_entropy_changes_nothing(granularity: str):
    first = replace(make_teacher(0), valid=torch.ones(N, dtype=torch.bool))
    lost = 0.25 * first.logprobs[:, -1].exp()
    second = replace(
        first,
        logprobs=torch.cat([first.logprobs[:, :-1], (first.logprobs[:, -1].exp() - lost).log()[:, None]], 1),
        residual=(first.residual.exp() + lost).log(),
    )
    config = FusionConfig(granularity=granularity)
    for order in ([0, 1], [1, 0]):
        fused = fuse_batch([first, second], config, order)
        assert fused.weights[order.index(0)].all()


@pytest.mark.parametrize(("rule", "granularity"), itertools.product(RULES, GRANULARITIES))
def test_a_teacher_changes_nothing_where_it_has_no_distribution(rule: str, granularity: str):
    teachers = [make_teacher(seed) for seed in range(3)]
    config = FusionConfig(rule=rule, granularity=granularity)
    pair, trio = fuse_batch(teachers[:2], config), fuse_batch(teachers, config)
    silent = ~teachers[2].valid
    assert silent.any()
    torch.testing.assert_close(dense(trio)[silent], dense(pair)[silent], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(trio.weights[:2, silent], pair.weights[:, silent])


@pytest.mark.parametrize(("rule", "granularity", "unit"), itertools.product(RULES, GRANULARITIES, UNITS))
def test_weights_and_masses_sum_to_one_where_any_teacher_is_valid(rule: str, granularity: str, unit: str):
    teachers = [make_teacher(seed) for seed in range(2)]
    fused = fuse_batch(teachers, FusionConfig(rule=rule, granularity=granularity, unit=unit))
    torch.testing.assert_close(fused.valid, teachers[0].valid | teachers[1].valid)
    assert not fused.valid.all()
    torch.testing.assert_close(fused.weights.sum(0), fused.valid.float())
    torch.testing.assert_close(dense(fused).sum(1), fused.valid.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_one_teacher_is_knowledge_distillation(rule: str):
    teacher = make_teacher(0)
    fused = fuse_batch([teacher], FusionConfig(rule=rule))
    torch.testing.assert_close(fused.valid, teacher.valid)
    torch.testing.assert_close(dense(fused), dense(teacher), rtol=1e-6, atol=1e-8)


def test_min_ce_gives_one_teachers_distribution_unchanged():
    teachers = [make_teacher(0, 4), make_teacher(1, 6)]
    fused = fuse_batch(teachers, FusionConfig(rule="min_ce"))
    for k, teacher in enumerate(teachers):
        won = fused.weights[k] == 1
        assert won.any()
        assert torch.equal(fused.ids[won, : teacher.top_k], teacher.ids[won])
        assert torch.equal(fused.logprobs[won, : teacher.top_k], teacher.logprobs[won])
        assert torch.equal(fused.residual[won], teacher.residual[won])


@pytest.mark.parametrize(("rule", "static"), [("mean", [1.0, 1.0, 1.0]), ("weighted", [0.5, 2.0, 1.0])])
def test_static_mixtures_are_weighted_means_over_the_valid_teachers(rule: str, static: list[float]):
    teachers = [make_teacher(0, 4), make_teacher(1, 6), make_teacher(2, 3)]
    fused = fuse_batch(teachers, FusionConfig(rule=rule))
    weights = torch.tensor(static, dtype=torch.float64)[:, None] * torch.stack([t.valid for t in teachers])
    weights = weights / weights.sum(0).clamp(min=1e-9)
    expected = sum(weight[:, None] * dense(t) for t, weight in zip(teachers, weights, strict=True))
    torch.testing.assert_close(dense(fused), expected, rtol=1e-5, atol=1e-8)


def test_a_mixture_names_each_candidate_once_never_gold_and_in_order():
    teachers = [make_teacher(seed, 6) for seed in range(3)]
    fused = fuse_batch(teachers, FusionConfig(rule="mean"))
    gold = make_batch()["gold"]
    for ids, logprobs, at_gold in zip(fused.ids, fused.logprobs, gold, strict=True):
        used = ids[logprobs > -math.inf].tolist()
        assert len(used) == len(set(used))
        assert int(at_gold) not in used
        assert logprobs.tolist() == sorted(logprobs.tolist(), reverse=True)


def test_the_papers_avg_ce_weighs_by_softmax_of_exp_of_minus_ce():
    teachers = [replace(make_teacher(seed), valid=torch.ones(N, dtype=torch.bool)) for seed in range(2)]
    config = FusionConfig(rule="avg_ce", granularity="token", unit="nats_per_token", paper_weights=True)
    ce = -torch.stack([t.gold for t in teachers])
    known = ce.isfinite().all(0)
    fused = fuse_batch(teachers, config)
    torch.testing.assert_close(fused.weights[:, known], (-ce).exp().softmax(0)[:, known])


def test_temperature_sharpens_avg_ce_towards_min_ce():
    teachers = [make_teacher(seed) for seed in range(2)]
    sharp = fuse_batch(teachers, FusionConfig(rule="avg_ce", temperature=1e-6))
    assert_same(sharp, fuse_batch(teachers, FusionConfig(rule="min_ce")))


@pytest.mark.parametrize("rule", RULES)
def test_teachers_that_know_no_gold_are_still_listened_to(rule: str):
    blind = replace(make_teacher(0), gold=torch.full((N,), -torch.inf))
    seeing = make_teacher(1)
    fused = fuse_batch([blind, seeing], FusionConfig(rule=rule))
    torch.testing.assert_close(fused.valid, blind.valid | seeing.valid)
    alone = blind.valid & ~seeing.valid
    assert fused.weights[0, alone].eq(1).all()
    if rule == "min_ce":
        assert fused.weights[1, seeing.valid].eq(1).all()


@pytest.mark.parametrize("rule", RULES)
def test_what_a_teacher_holds_where_it_is_not_valid_is_not_read(rule: str):
    teachers = [make_teacher(seed) for seed in range(2)]
    silent = ~teachers[1].valid
    poisoned = replace(
        teachers[1],
        logprobs=teachers[1].logprobs.masked_fill(silent[:, None], torch.nan),
        residual=teachers[1].residual.masked_fill(silent, torch.nan),
    )
    config = FusionConfig(rule=rule)
    assert_same(fuse_batch([teachers[0], poisoned], config), fuse_batch(teachers, config))


@pytest.mark.parametrize("rule", RULES)
def test_no_positions_fuse_to_no_positions(rule: str):
    empty = torch.zeros(0, dtype=torch.int64)
    fused = fuse(
        [Candidates.missing(0, 3), Candidates.missing(0, 5)],
        config=FusionConfig(rule=rule),
        segment=empty,
        row=empty,
        gold_bytes=empty,
        weights=[1.0, 1.0],
    )
    assert fused.num_positions == 0
    assert fused.weights.shape == (2, 0)


def test_advantage_is_the_targets_nats_minus_the_teachers_over_what_the_teacher_knows():
    teachers = [make_teacher(seed) for seed in range(2)]
    batch = make_batch()
    target = torch.rand(N) * 5
    nats, size = advantage(
        teachers, target, segment=batch["segment"], gold_bytes=batch["gold_bytes"], num_segments=S
    )
    for k, s in itertools.product(range(2), range(S)):
        here = [i for i in range(N) if batch["segment"][i] == s and teachers[k].gold[i] > -math.inf]
        expected = sum(float(target[i] + teachers[k].gold[i]) for i in here)
        assert nats[k, s].item() == pytest.approx(expected, abs=1e-4)
        assert size[k, s].item() == sum(int(batch["gold_bytes"][i]) for i in here)


def test_moving_fused_distributions_keeps_the_weights():
    fused = fuse_batch([make_teacher(0), make_teacher(1)], FusionConfig(rule="mean"))
    moved = fused.to("cpu")
    assert isinstance(moved, Fused)
    assert_same(moved, fused)
    assert torch.equal(moved.weights, fused.weights)


def test_errors_say_what_is_missing():
    batch = make_batch()
    del batch["gold"]
    teacher = make_teacher(0)
    with pytest.raises(ConfigError, match=r"0 teachers under fusion\.rule=min_ce"):
        fuse([], config=FusionConfig(), **batch)
    with pytest.raises(ConfigError, match=r"under fusion\.rule=none"):
        fuse([teacher], config=FusionConfig(rule="none"), **batch)
    with pytest.raises(ConfigError, match="needs own_nats"):
        fuse([teacher], config=FusionConfig(unit="nats_per_token"), **batch)
    with pytest.raises(ConfigError, match="needs 1 positive weights"):
        fuse([teacher], config=FusionConfig(rule="weighted"), weights=[0.0], **batch)
    with pytest.raises(AlignmentError, match="teacher 1 has 7 positions"):
        fuse([teacher, Candidates.missing(7)], config=FusionConfig(), **batch)
    with pytest.raises(AlignmentError, match="gold has 2 positions"):
        replace(teacher, gold=torch.zeros(2))
