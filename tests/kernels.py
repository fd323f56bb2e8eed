"""The Triton kernels of the objective, on a GPU or in Triton's interpreter; `test_kernels` runs these tests."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from fusellm_ray.config import ObjectiveConfig
from fusellm_ray.fusion import divergence, passes
from fusellm_ray.fusion.loss import IGNORE_INDEX, objective
from tests.test_loss import DIVERGENCES, TAILS, gradients, make_batch, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (passes, divergence):
        monkeypatch.setattr(module, "has_kernels", lambda logits: logits.dtype != torch.float64)


@pytest.mark.parametrize("vocab_size", [37, 9001])
@pytest.mark.parametrize(("kind", "tail"), itertools.product(DIVERGENCES, TAILS))
def test_the_objective_with_kernels_equals_the_dense_reference(kind: str, tail: str, vocab_size: int):
    *inputs, gold, fused = make_batch(30, seed=3, vocab_size=vocab_size)
    config = ObjectiveConfig(clm_weight=0.3, divergence=kind, tail=tail, chunk_tokens=7)
    expected = reference(*inputs, gold, fused, config, 11.0)
    narrow = [tensor.detach().float().to(DEVICE).requires_grad_() for tensor in inputs]
    ours = objective(
        *narrow, gold.to(DEVICE), fused.to(torch.device(DEVICE)), config=config, denominator=11.0
    ).loss
    torch.testing.assert_close(ours.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(gradients(ours, *narrow), gradients(expected, *inputs), strict=True):
        torch.testing.assert_close(mine.cpu().double(), theirs, rtol=1e-4, atol=1e-5)


def test_without_teachers_it_is_cross_entropy():
    hidden, weight, _, gold, _ = make_batch(30, seed=4, vocab_size=9001)
    narrow = [x.detach().float().to(DEVICE).requires_grad_() for x in (hidden, weight)]
    ours = objective(
        *narrow, None, gold.to(DEVICE), None, config=ObjectiveConfig(chunk_tokens=7), denominator=30.0
    ).loss
    expected = (
        torch.nn.functional.cross_entropy(hidden @ weight.T, gold, ignore_index=IGNORE_INDEX, reduction="sum")
        / 30
    )
    torch.testing.assert_close(ours.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(gradients(ours, *narrow), gradients(expected, hidden, weight), strict=True):
        torch.testing.assert_close(mine.cpu().double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("segment_tokens", [None, 7, 40])
def test_in_bfloat16_the_objective_with_kernels_stays_near_the_reference(segment_tokens: int | None):
    """Segments for the live gate, shorter and longer than a chunk."""
    hidden, weight, _, gold, fused = make_batch(60, seed=13, vocab_size=9001)
    narrow = [x.detach().bfloat16().to(DEVICE).requires_grad_() for x in (hidden, weight)]
    exact = [x.detach().double().cpu().requires_grad_() for x in narrow]
    segment = torch.arange(60) // segment_tokens if segment_tokens else None
    config = ObjectiveConfig(clm_weight=0.5, chunk_tokens=16)

    def run(inputs, device):
        here = None if segment is None else segment.to(device)
        return objective(
            *inputs,
            None,
            gold.to(device),
            fused.to(device),
            config=config,
            denominator=60.0,
            gate_segment=here,
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "has_kernels", lambda logits: False)
        patch.setattr(divergence, "has_kernels", lambda logits: False)
        expected = run(exact, "cpu")
    ours = run(narrow, DEVICE)
    assert ours.listened.any()
    assert torch.equal(ours.listened.cpu(), expected.listened)
    assert not ours.fusion[~ours.listened].any()
    torch.testing.assert_close(ours.fusion.cpu().double(), expected.fusion, rtol=0.1, atol=0.05)
    torch.testing.assert_close(ours.loss.cpu().double(), expected.loss, rtol=5e-3, atol=0.0)
    for mine, theirs in zip(gradients(ours.loss, *narrow), gradients(expected.loss, *exact), strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.cpu().double() - theirs).norm() / theirs.norm() < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_gradients_are_scaled_by_what_is_upstream(factor: float, dtype: torch.dtype):
    values = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    scaled = values.clone()
    passes.scale_(scaled, torch.tensor(factor, device=DEVICE))
    assert torch.equal(scaled, values * factor)


def make_slots(rows: int, top_k: int, vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(gathered, top, outside) as `outside_mass` leaves them, and the chunk: targets confident in gold and against it,
    slots unused, gold unknown, teachers without residual, positions closed."""
    rng = torch.Generator().manual_seed(rows)
    ids = torch.stack([torch.randperm(vocab_size, generator=rng)[: 1 + top_k] for _ in range(rows)])
    logits = 3 * torch.randn(rows, vocab_size, generator=rng)
    logits[0, ids[0, 0]], logits[1 % rows, ids[1 % rows, 0]] = 200.0, -200.0
    log_p = torch.randn(rows, 2 + top_k, generator=rng).mul(2).log_softmax(1)
    log_p[torch.rand(log_p.shape, generator=rng) < 0.2] = -torch.inf
    log_p[:, 0][torch.rand(rows, generator=rng) < 0.3] = -torch.inf
    residual = log_p[:, -1].clone()
    log_p = log_p[:, :-1].contiguous()
    if vocab_size == 1 + top_k:
        log_p.masked_fill_(log_p == -torch.inf, -3.0)
    listened = (torch.rand(rows, generator=rng) < 0.7) & log_p.isfinite().any(1)
    slots = torch.where(log_p.isfinite(), ids, ids[:, :1])
    chunk = divergence.Batch(ids[:, 0], slots, log_p, residual, listened, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "has_kernels", lambda logits: False)
        return *passes.outside_mass(logits.to(dtype).float(), slots), chunk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "top_k", "vocab_size"), [(1, 4, 50), (9, 0, 9), (40, 16, 300), (6, 4, 5), (5, 300, 999)]
)
@pytest.mark.parametrize(("kind", "tail"), itertools.product(DIVERGENCES, TAILS))
def test_comparing_slots_at_once_is_comparing_them(
    kind: str, tail: str, rows: int, top_k: int, vocab_size: int, dtype: torch.dtype
):
    gathered, top, outside, chunk = make_slots(rows, top_k, vocab_size, dtype)
    config = ObjectiveConfig(clm_weight=0.3, divergence=kind, tail=tail)
    expected = divergence._compare_slots(gathered, top, outside, chunk, vocab_size, config)
    there = dataclasses.replace(
        chunk, **{name: getattr(chunk, name).to(DEVICE) for name in ("log_p", "residual", "listened")}
    )
    ours = divergence._compare_slots_at_once(
        gathered.to(DEVICE, dtype), top.to(DEVICE), outside.to(DEVICE), there, vocab_size, config
    )
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}
    for mine, theirs in zip(ours, expected, strict=True):
        near = tolerance[mine.dtype]
        torch.testing.assert_close(mine.cpu().float(), theirs, rtol=near, atol=min(near, 1e-4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_passes_with_kernels_equal_those_of_pytorch(dtype: torch.dtype):
    rng = torch.Generator().manual_seed(0)
    logits = (20 * torch.randn(5, 5000, generator=rng)).to(dtype)
    logits[1, 100:] = -torch.inf
    logits[2] = -300.0
    logits[3, 4999] = 200.0
    slots = torch.randint(5000, (5, 9), generator=rng)
    slots[3, 0] = 4999
    factor = torch.rand(5, generator=rng)
    kept = torch.ones(5, 5000, dtype=torch.bool).scatter_(1, slots, False)
    top = logits.double().amax(1)
    expected = (logits.double() - top[:, None]).exp() * kept

    in_slots = logits.gather(1, slots)
    written = logits.to(DEVICE)
    gathered, got_top, got_mass = passes.outside_mass(written, slots.to(DEVICE))
    assert torch.equal(gathered.cpu(), in_slots)
    passes.spread(written, got_top, factor.to(DEVICE))
    assert torch.equal(got_top.cpu().double(), top)
    torch.testing.assert_close(got_mass.cpu().double(), expected.sum(1), rtol=1e-5, atol=1e-30)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7  # the interpreter truncates
    torch.testing.assert_close(
        written.cpu().double(), expected * factor[:, None].double(), rtol=tolerance, atol=1e-30
    )


def test_all_of_the_vocabulary_in_slots_leaves_nothing_outside():
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    _, top, mass = passes.outside_mass(logits, torch.arange(4, device=DEVICE).expand(3, -1))
    passes.spread(logits, top, torch.ones(3, device=DEVICE))
    assert (top.isfinite().all(), mass.sum(), logits.sum()) == (True, 0, 0)
