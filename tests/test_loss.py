"""The fused objective: against a dense float64 reference, its numerics, its gates, its errors."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fusellm_ray.config import ObjectiveConfig
from fusellm_ray.errors import AlignmentError
from fusellm_ray.fusion.fuse import Candidates
from fusellm_ray.fusion.loss import IGNORE_INDEX, ObjectiveOutput, _WeightGradient, objective

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
TAILS = ("bucket", "renormalise", "drop")
V, D, K = 37, 8, 5


def make_batch(n: int, seed: int = 0, dtype: torch.dtype = torch.float64, vocab_size: int = V):
    """(hidden, weight, bias, gold, fused); positions ignored or without teachers, slots unused."""
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, D, generator=rng, dtype=torch.float64)
    weight = torch.randn(vocab_size, D, generator=rng, dtype=torch.float64)
    bias = torch.randn(vocab_size, generator=rng, dtype=torch.float64)
    gold = torch.randint(vocab_size, (n,), generator=rng)
    full = torch.randn(n, vocab_size, generator=rng, dtype=torch.float64).mul(2).log_softmax(1)
    fused = truncate(full, gold, K)
    fused.valid[torch.rand(n, generator=rng) < 0.3] = False
    unused = torch.rand(n, generator=rng) < 0.3
    fused.logprobs[unused, -2:] = -torch.inf
    fused.ids[unused, -2:] = 0
    unknown = torch.rand(n, generator=rng) < 0.2
    fused.gold[unknown] = -torch.inf
    kept = fused.logprobs.exp().sum(1) + fused.gold.exp()
    fused.residual[:] = torch.log1p(-kept)
    gold = gold.masked_fill(torch.rand(n, generator=rng) < 0.2, IGNORE_INDEX)
    inputs = (tensor.to(dtype).requires_grad_() for tensor in (hidden, weight, bias))
    return *inputs, gold, fused


def truncate(full: Tensor, gold: Tensor, top_k: int) -> Candidates:
    """Full log distributions [n, V] as a teacher sends them."""
    without_gold = full.scatter(1, gold[:, None], -torch.inf)
    top = without_gold.topk(top_k, dim=1)
    rest = without_gold.scatter(1, top.indices, -torch.inf)
    return Candidates(
        ids=top.indices,
        logprobs=top.values.float(),
        gold=full.gather(1, gold[:, None]).squeeze(1).float(),
        residual=rest.logsumexp(1).float(),
        valid=torch.ones(len(gold), dtype=torch.bool),
    )


def reference(hidden, weight, bias, gold, fused, config, denominator) -> Tensor:
    """Section 7, position by position, through full logits and autograd."""
    total = hidden.new_zeros(())
    for i in range(len(gold)):
        if gold[i] == IGNORE_INDEX:
            continue
        log_q = (weight @ hidden[i] + (0 if bias is None else bias)).log_softmax(0)
        clm = -log_q[gold[i]]
        if not fused.valid[i]:
            total = total + clm
            continue
        known = {
            int(v): float(p) for v, p in zip(fused.ids[i], fused.logprobs[i], strict=True) if p > -math.inf
        }
        known |= {int(gold[i]): float(fused.gold[i])} if fused.gold[i] > -math.inf else {}
        support = list(known)
        p = torch.tensor(list(known.values()), dtype=hidden.dtype).exp()
        q = log_q.exp()[support]
        outside = log_q.exp()[[v for v in range(len(weight)) if v not in known]]
        if config.tail == "bucket" and len(outside):
            p = torch.cat([p, fused.residual[i].to(p).exp().view(1)])
            q = torch.cat([q, outside.sum().view(1)])
        if config.tail != "drop":
            p = p / p.sum()
        if config.tail == "renormalise" and config.divergence != "forward_kl":
            q = q / q.sum()
        mean = (p + q) / 2
        value = {
            "forward_kl": (p * (p / q).log()).sum(),
            "reverse_kl": (q * (q / p).log()).sum(),
            "jsd": (p * (p / mean).log()).sum() / 2 + (q * (q / mean).log()).sum() / 2,
        }[config.divergence]
        total = total + config.clm_weight * clm + (1 - config.clm_weight) * value
    return total / denominator


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize("clm_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("divergence", "tail"), itertools.product(DIVERGENCES, TAILS))
def test_loss_and_gradients_equal_the_dense_reference(divergence: str, tail: str, clm_weight: float):
    *inputs, gold, fused = make_batch(23)
    config = ObjectiveConfig(clm_weight=clm_weight, divergence=divergence, tail=tail, chunk_tokens=7)
    ours = objective(*inputs, gold, fused, config=config, denominator=11.0).loss
    expected = reference(*inputs, gold, fused, config, 11.0)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    for mine, theirs in zip(gradients(ours, *inputs), gradients(expected, *inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("divergence", "tail"), itertools.product(DIVERGENCES, TAILS))
def test_float32_stays_within_1e_5_of_float64(divergence: str, tail: str):
    *inputs, gold, fused = make_batch(40, seed=1)
    config = ObjectiveConfig(clm_weight=0.5, divergence=divergence, tail=tail)
    expected = reference(*inputs, gold, fused, config, 40.0)
    single = [x.detach().float().requires_grad_() for x in inputs]
    ours = objective(*single, gold, fused, config=config, denominator=40.0).loss
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(gradients(ours, *single), gradients(expected, *inputs), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("divergence", "tail"), itertools.product(DIVERGENCES, TAILS))
def test_the_gradient_is_the_slope_of_the_loss(divergence: str, tail: str):
    *inputs, gold, fused = make_batch(9, seed=2)
    config = ObjectiveConfig(clm_weight=0.2, divergence=divergence, tail=tail, chunk_tokens=4)
    rng = torch.Generator().manual_seed(0)
    steps = [1e-5 * torch.randn(x.shape, generator=rng, dtype=x.dtype) for x in inputs]

    def loss(sign: float) -> Tensor:
        moved = [x + sign * step for x, step in zip(inputs, steps, strict=True)]
        return objective(*moved, gold, fused, config=config, denominator=2.0).loss

    grads = gradients(loss(0.0), *inputs)
    expected = sum((grad * step).sum() for grad, step in zip(grads, steps, strict=True))
    torch.testing.assert_close((loss(1.0) - loss(-1.0)) / 2, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_all_of_the_vocabulary_as_candidates_equals_the_dense_divergence(divergence: str):
    hidden, weight, bias, *_ = make_batch(9, seed=3)
    gold = torch.arange(9)
    full = torch.randn(9, V, dtype=torch.float64).log_softmax(1)
    log_q = (hidden @ weight.T + bias).log_softmax(1)
    p, q = full.exp(), log_q.exp()
    mean = (p + q) / 2
    dense = {
        "forward_kl": p * (full - log_q),
        "reverse_kl": q * (log_q - full),
        "jsd": (p * (p / mean).log() + q * (q / mean).log()) / 2,
    }[divergence].sum()
    for tail in TAILS:
        config = ObjectiveConfig(clm_weight=0.0, divergence=divergence, tail=tail)
        fused = truncate(full, gold, V - 1)
        fused.residual[:] = math.log(1e-3)  # rounding's; the target has nowhere to put it
        ours = objective(hidden, weight, bias, gold, fused, config=config, denominator=1.0).loss
        torch.testing.assert_close(ours, dense, rtol=1e-6, atol=1e-6)
        theirs = torch.autograd.grad(dense, hidden, retain_graph=True)[0]
        torch.testing.assert_close(torch.autograd.grad(ours, hidden)[0], theirs, rtol=1e-5, atol=1e-6)


def test_renormalised_forward_kl_is_sparse_soft_label_cross_entropy_but_for_the_entropy():
    hidden, weight, bias, gold, fused = make_batch(15, seed=4)
    gold = gold.clamp(min=0)
    fused = truncate(torch.randn(15, V, dtype=torch.float64).log_softmax(1), gold, K)
    config = ObjectiveConfig(clm_weight=0.9, tail="renormalise")
    ours = objective(hidden, weight, bias, gold, fused, config=config, denominator=15.0).loss
    p = torch.cat([fused.gold[:, None], fused.logprobs], 1).double().softmax(1)
    soft = torch.zeros(15, V, dtype=torch.float64).scatter_(
        1, torch.cat([gold[:, None], fused.ids], 1), 0.1 * p
    )
    soft.scatter_add_(1, gold[:, None], torch.full((15, 1), 0.9, dtype=torch.float64))
    logits = hidden @ weight.T + bias
    entropy = 0.1 * (p * p.log()).sum(1)
    expected = (logits.logsumexp(1) - (soft * logits).sum(1) + entropy).mean()
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_splitting_a_batch_differently_gives_the_same_loss_and_gradients():
    *inputs, gold, fused = make_batch(48, seed=5)
    inputs = [x.detach().float().requires_grad_() for x in inputs]
    found = []
    for parts, chunk_tokens in ((1, 1024), (1, 5), (4, 1024), (48, 3)):
        config = ObjectiveConfig(clm_weight=0.5, chunk_tokens=chunk_tokens)
        size = 48 // parts
        total = [torch.zeros_like(x) for x in inputs]
        loss = 0.0
        for start in range(0, 48, size):
            here = slice(start, start + size)
            piece = Candidates(
                *(getattr(fused, name)[here] for name in ("ids", "logprobs", "gold", "residual", "valid"))
            )
            output = objective(
                inputs[0][here], *inputs[1:], gold[here], piece, config=config, denominator=48.0
            )
            loss += output.loss.item()
            for grad, mine in zip(total, gradients(output.loss, *inputs), strict=True):
                grad += mine
        found.append((loss, total))
    for loss, total in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        torch.testing.assert_close(total, found[0][1], rtol=1e-5, atol=1e-7)


def test_no_teachers_is_mean_cross_entropy():
    hidden, weight, bias, gold, _ = make_batch(20, seed=6)
    output = objective(hidden, weight, bias, gold, None, config=ObjectiveConfig(), denominator=20.0)
    expected = torch.nn.functional.cross_entropy(
        hidden @ weight.T + bias, gold, ignore_index=IGNORE_INDEX, reduction="sum"
    )
    torch.testing.assert_close(output.loss, expected / 20)
    torch.testing.assert_close(output.clm.sum(), expected.detach())
    assert not output.listened.any()
    assert not output.fusion.any()


@pytest.mark.parametrize("n", [0, 6])
def test_nothing_to_predict_is_loss_0_with_gradients_0(n: int):
    hidden, weight, bias, gold, fused = make_batch(n)
    gold = torch.full_like(gold, IGNORE_INDEX)
    for gate in (None, torch.zeros(n, dtype=torch.int64)):
        loss = objective(
            hidden, weight, bias, gold, fused, config=ObjectiveConfig(), denominator=1.0, gate_segment=gate
        ).loss
        assert loss.item() == 0.0
        for grad, value in zip(gradients(loss, hidden, weight, bias), (hidden, weight, bias), strict=True):
            assert grad.shape == value.shape
            assert not grad.any()


def test_ignored_positions_get_no_gradient_and_may_hold_anything():
    hidden, weight, bias, gold, fused = make_batch(20, seed=7)
    ignored = gold == IGNORE_INDEX
    with torch.no_grad():
        hidden[ignored] = torch.nan
    fused.logprobs[ignored] = torch.nan
    loss = objective(hidden, weight, bias, gold, fused, config=ObjectiveConfig(), denominator=20.0).loss
    grads = gradients(loss, hidden, weight, bias)
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][ignored].any()


def test_a_frozen_head_gets_no_gradient_and_hidden_gets_the_same():
    hidden, weight, _, gold, fused = make_batch(12, seed=9)
    trained = objective(hidden, weight, None, gold, fused, config=ObjectiveConfig(), denominator=12.0).loss
    expected = gradients(trained, hidden)[0]
    frozen = weight.detach()
    loss = objective(hidden, frozen, None, gold, fused, config=ObjectiveConfig(), denominator=12.0).loss
    loss.backward()
    torch.testing.assert_close(hidden.grad, expected)
    assert frozen.grad is None


def test_evaluation_without_gradients_gives_the_same_loss():
    *inputs, gold, fused = make_batch(12, seed=10)
    config = ObjectiveConfig()
    with torch.no_grad():
        silent = objective(*inputs, gold, fused, config=config, denominator=12.0)
    assert not silent.loss.requires_grad
    torch.testing.assert_close(
        silent.loss, objective(*inputs, gold, fused, config=config, denominator=12.0).loss.detach()
    )


def test_backward_scales_by_what_is_upstream_and_works_once():
    *inputs, gold, fused = make_batch(12, seed=11)
    config = ObjectiveConfig()
    plain = gradients(objective(*inputs, gold, fused, config=config, denominator=12.0).loss, *inputs)
    loss = objective(*inputs, gold, fused, config=config, denominator=12.0).loss
    scaled = torch.autograd.grad(loss * 3.0, inputs, retain_graph=True)
    for one, three in zip(plain, scaled, strict=True):
        torch.testing.assert_close(three, one * 3)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


def test_a_tied_head_sums_its_two_gradients():
    _, weight, _, gold, fused = make_batch(12, seed=12)
    tokens = torch.arange(12)
    config = ObjectiveConfig()
    loss = objective(weight[tokens], weight, None, gold, fused, config=config, denominator=12.0).loss
    mine = gradients(loss, weight)[0]
    theirs = gradients(reference(weight[tokens], weight, None, gold, fused, config, 12.0), weight)[0]
    torch.testing.assert_close(mine, theirs)


def test_bfloat16_inputs_have_float32_statistics():
    hidden, weight, bias, gold, fused = make_batch(64, seed=13)
    config = ObjectiveConfig(clm_weight=0.5, chunk_tokens=16)
    low = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight, bias)]
    exact = [x.detach().double().requires_grad_() for x in low]
    ours = objective(*low, gold, fused, config=config, denominator=64.0)
    expected = reference(*exact, gold, fused, config, 64.0)
    assert ours.loss.dtype == ours.clm.dtype == torch.float32
    assert ours.loss.item() == pytest.approx(expected.item(), rel=5e-3)
    for mine, theirs in zip(gradients(ours.loss, *low), gradients(expected, *exact), strict=True):
        assert mine.dtype == torch.bfloat16
        error = (mine.double() - theirs).norm() / theirs.norm()
        assert error < 0.01


def test_a_float32_head_under_bfloat16_hidden_states_keeps_float32_gradients():
    hidden, weight, _, gold, fused = make_batch(64, seed=14)
    head = weight.detach().float().requires_grad_()
    low = hidden.detach().bfloat16().requires_grad_()
    loss = objective(low, head, None, gold, fused, config=ObjectiveConfig(), denominator=64.0).loss
    mine, theirs = (
        gradients(loss, head)[0],
        gradients(reference(hidden, weight, None, gold, fused, ObjectiveConfig(), 64.0), weight)[0],
    )
    assert mine.dtype == torch.float32
    assert (mine.double() - theirs).norm() / theirs.norm() < 0.01


@pytest.mark.parametrize("vocab_size", [1, 2, 37])
def test_a_narrow_heads_gradient_is_the_float32_sum_rounded_once_and_takes_no_more_room(
    vocab_size: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("fusellm_ray.fusion.loss._HEAD_BLOCK", 2)
    rng = torch.Generator().manual_seed(0)
    weight = torch.zeros(vocab_size, 3, dtype=torch.bfloat16)
    chunks = [(torch.randn(4, vocab_size, generator=rng), torch.randn(4, 3, generator=rng)) for _ in range(3)]
    wide = _WeightGradient(weight.float(), torch.float32)
    narrow = _WeightGradient(weight, torch.float32)
    for left, right in chunks:
        wide.add(left, right, 0.1)
        narrow.add(left, right, 0.1)
    gradient = narrow.finish()
    assert (gradient.dtype, gradient.shape) == (weight.dtype, weight.shape)
    assert torch.equal(gradient, wide.finish().bfloat16())
    assert gradient.untyped_storage().nbytes() <= 2 * 3 * (vocab_size + 1)


# ------------------------------------------------------------------------------------ numerics


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_confident_target_keeps_the_gradient_of_its_tail(divergence: str):
    """The target puts 1 − 1e-10 on the support: 1 − Σq is 0 in float32, its tail's gradient is not."""
    logits = torch.cat([torch.tensor([4.0, 2.0]), torch.full((30,), -24.0)]).double()
    gold = torch.tensor([0])
    fused = Candidates(
        ids=torch.tensor([[1]]),
        logprobs=torch.tensor([[0.3]]).log(),
        gold=torch.tensor([0.5]).log(),
        residual=torch.tensor([0.2]).log(),
        valid=torch.tensor([True]),
    )
    config = ObjectiveConfig(clm_weight=0.0, divergence=divergence)
    exact = torch.diag(logits).requires_grad_()
    ones = torch.ones(1, len(logits), dtype=torch.float64)
    expected = reference(ones, exact, None, gold, fused, config, 1.0)
    single = torch.diag(logits.float()).requires_grad_()
    ours = objective(ones.float(), single, None, gold, fused, config=config, denominator=1.0).loss
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
    mine, theirs = (
        torch.autograd.grad(x, w)[0].diag().double() for x, w in ((ours, single), (expected, exact))
    )
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize(("divergence", "tail"), itertools.product(DIVERGENCES, TAILS))
@pytest.mark.parametrize("gap", [200.0, -200.0])
def test_extreme_logits_give_finite_losses_and_gradients(divergence: str, tail: str, gap: float):
    weight = torch.diag(torch.tensor([gap, 0.0, 0.0, 0.0, 0.0])).requires_grad_()
    hidden = torch.ones(2, 5, requires_grad=True)
    fused = Candidates(
        ids=torch.tensor([[1, 2], [1, 0]]),
        logprobs=torch.tensor([[-0.5, -3.0], [0.0, -torch.inf]]),
        gold=torch.tensor([-2.0, -torch.inf]),
        residual=torch.tensor([-3.0, -torch.inf]),
        valid=torch.tensor([True, True]),
    )
    config = ObjectiveConfig(clm_weight=0.5, divergence=divergence, tail=tail)
    output = objective(hidden, weight, None, torch.tensor([0, 3]), fused, config=config, denominator=2.0)
    assert output.loss.isfinite()
    assert all(grad.isfinite().all() for grad in gradients(output.loss, hidden, weight))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_float16_masses_that_sum_to_more_than_one_leave_a_divergence_of_at_least_zero(
    divergence: str, tail: str
):
    torch.manual_seed(0)
    gold = torch.randint(V, (200,))
    full = (torch.randn(200, V, dtype=torch.float64) * 4).log_softmax(1)
    fused = truncate(full, gold, K)
    inflated = Candidates(
        ids=fused.ids,
        logprobs=(fused.logprobs + 1e-3).half().float(),
        gold=(fused.gold + 1e-3).half().float(),
        residual=fused.residual.half().float(),
        valid=fused.valid,
    )
    identity = torch.eye(V)
    config = ObjectiveConfig(clm_weight=0.0, divergence=divergence, tail=tail)
    output = objective(full.float(), identity, None, gold, inflated, config=config, denominator=1.0)
    # The target is the teacher: all that is left is rounding (and, renormalised, the paper's bias).
    assert (output.fusion > -1e-6).all()
    if tail == "bucket":
        assert output.fusion.max() < 1e-4


def test_the_bucket_divergence_of_a_target_equal_to_its_teacher_is_0():
    torch.manual_seed(1)
    gold = torch.randint(V, (50,))
    full = torch.randn(50, V, dtype=torch.float64).log_softmax(1).requires_grad_()
    fused = truncate(full.detach(), gold, K)
    for divergence in DIVERGENCES:
        config = ObjectiveConfig(clm_weight=0.0, divergence=divergence)
        identity = torch.eye(V, dtype=torch.float64)
        output = objective(full, identity, None, gold, fused, config=config, denominator=1.0)
        assert output.fusion.abs().max() < 1e-6
        assert gradients(output.loss, full)[0].abs().max() < 1e-6


def test_a_valid_position_without_any_candidate_is_clm():
    hidden, weight, bias, _, _ = make_batch(3)
    fused = Candidates.missing(3, 4)
    fused.valid[:] = True
    fused.residual[:] = 0.0
    output = objective(
        hidden, weight, bias, torch.tensor([0, 1, 2]), fused, config=ObjectiveConfig(), denominator=3.0
    )
    assert not output.listened.any()
    torch.testing.assert_close(output.loss, output.clm.mean())


# ----------------------------------------------------------------------------------- live gate


@pytest.mark.parametrize("chunk_tokens", [1, 4, 7, 1024])
def test_the_live_gate_closes_on_segments_where_the_target_is_better(chunk_tokens: int):
    *inputs, gold, fused = make_batch(60, seed=15)
    segment = torch.arange(60) // 7
    hidden, weight, bias = inputs
    target = (hidden @ weight.T + bias).log_softmax(1).detach()
    closed = torch.zeros(60, dtype=torch.bool)
    for s in segment.unique():
        here = [
            i
            for i in range(60)
            if segment[i] == s and gold[i] != IGNORE_INDEX and fused.valid[i] and fused.gold[i] > -math.inf
        ]
        ahead = sum(float(fused.gold[i] - target[i, gold[i]]) for i in here)
        closed[segment == s] = ahead < 0
    assert closed.any()
    assert not closed.all()
    config = ObjectiveConfig(clm_weight=0.1, chunk_tokens=chunk_tokens)
    gated = objective(*inputs, gold, fused, config=config, denominator=60.0, gate_segment=segment)
    masked_out = replace(fused, valid=fused.valid & ~closed)
    masked = objective(*inputs, gold, masked_out, config=config, denominator=60.0)
    torch.testing.assert_close(gated.loss, masked.loss)
    torch.testing.assert_close(gated.listened, masked.listened)
    torch.testing.assert_close(gated.fusion, masked.fusion)
    for one, other in zip(gradients(gated.loss, *inputs), gradients(masked.loss, *inputs), strict=True):
        torch.testing.assert_close(one, other)


def test_the_live_gate_does_not_depend_on_the_order_of_positions():
    hidden, weight, bias, gold, fused = make_batch(40, seed=16)
    segment = torch.arange(40) // 9
    order = torch.randperm(40)
    shuffled = Candidates(
        *(getattr(fused, name)[order] for name in ("ids", "logprobs", "gold", "residual", "valid"))
    )
    config = ObjectiveConfig(chunk_tokens=5)
    one = objective(hidden, weight, bias, gold, fused, config=config, denominator=1.0, gate_segment=segment)
    other = objective(
        hidden[order],
        weight,
        bias,
        gold[order],
        shuffled,
        config=config,
        denominator=1.0,
        gate_segment=segment[order],
    )
    torch.testing.assert_close(one.loss, other.loss)
    torch.testing.assert_close(one.listened[order], other.listened)


# --------------------------------------------------------------------------------------- errors


def test_errors_say_what_does_not_fit():
    hidden, weight, bias, gold, fused = make_batch(5)
    config = ObjectiveConfig()
    with pytest.raises(AlignmentError, match=r"give \[positions, d\]"):
        objective(hidden[:, :-1], weight, bias, gold, fused, config=config, denominator=1.0)
    with pytest.raises(AlignmentError, match="one token id for each"):
        objective(hidden, weight, bias, gold[:-1], fused, config=config, denominator=1.0)
    with pytest.raises(AlignmentError, match="fuse the same batch"):
        objective(hidden[1:], weight, bias, gold[1:], fused, config=config, denominator=1.0)
    with pytest.raises(AlignmentError, match=f"holds {V}, outside the head's vocabulary of {V}"):
        objective(hidden, weight, bias, torch.full_like(gold, V), fused, config=config, denominator=1.0)
    fused.ids[0, 0] = -1
    with pytest.raises(AlignmentError, match=r"fused\.ids holds -1"):
        objective(hidden, weight, bias, gold, fused, config=config, denominator=1.0)


def test_output_is_a_plain_record():
    *inputs, gold, fused = make_batch(5)
    output = objective(*inputs, gold, fused, config=ObjectiveConfig(), denominator=1.0)
    assert isinstance(output, ObjectiveOutput)
    assert not any(part.requires_grad for part in (output.clm, output.fusion, output.listened))
