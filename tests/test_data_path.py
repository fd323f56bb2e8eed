"""One document, followed through every stage of the data path; each stage against a reference of a few lines."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM

from fusellm_ray.alignment.project import Aligned, Aligner
from fusellm_ray.config import (
    AlignmentConfig,
    CorpusConfig,
    FusionConfig,
    ModelConfig,
    ObjectiveConfig,
    SourceConfig,
    TargetConfig,
    TeacherConfig,
    TrainingConfig,
)
from fusellm_ray.corpus.rows import Row, Segment, ShardReader
from fusellm_ray.corpus.source import Corpus
from fusellm_ray.corpus.tokens import ByteTokenizer
from fusellm_ray.fusion.loss import objective
from fusellm_ray.models import HeadedModel, load_causal_lm
from fusellm_ray.perplexity import bits_per_byte, held_out_documents, load_model
from fusellm_ray.stream.frame import decode_frame, decode_request, encode_frame, encode_request
from fusellm_ray.target.batches import MicroBatch, make_micro_batch
from fusellm_ray.target.checkpoint import export_model, training_tensors, write_checkpoint
from fusellm_ray.target.model import clip_gradients, learning_rate, make_optimizer, set_learning_rate
from fusellm_ray.teachers.engine import Scores, make_engine
from tests.runs import TARGET, TEACHERS, model_folder

TEXT = "def naïve(x):\n\treturn {'café': x, 'größe': [1, 22, 333]}  # 今天 😀\n\nThe class of objects.\n"
ROW_TOKENS = 128
TRAINING = TrainingConfig(steps=10, lr=1e-2, warmup_ratio=0.2, clip_norm=0.5)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, tokenizer_folders: dict[str, Path]) -> SimpleNamespace:
    """What every stage made of the document."""
    folder = tmp_path_factory.mktemp("path")
    (folder / "one.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    source = SourceConfig(name="d", path=str(folder / "one.jsonl"))
    corpus = Corpus.open(CorpusConfig(sources=[source]), seed=0)
    target_folder = model_folder(TARGET[0], tokenizer_folders[TARGET[1]], folder / "target", seed=9)
    target = ByteTokenizer.load(str(target_folder))
    row = ShardReader(corpus, target, 0, 1, ROW_TOKENS).next_row()
    segment = row.segments[0]

    stages = SimpleNamespace(
        source=source, row=row, segment=segment, target=target, teachers={}, target_folder=target_folder
    )
    for seed, (name, (architecture, kind)) in enumerate(TEACHERS.items()):
        model = model_folder(architecture, tokenizer_folders[kind], folder / name, seed=seed)
        tokenizer = ByteTokenizer.load(str(model))
        config = TeacherConfig(name=name, model=str(model), top_k=tokenizer.vocab_size)
        engine = make_engine(config)
        tokens = tokenizer.sequence(segment.text.decode(), segment.ends_document)
        (scores,) = asyncio.run(engine.score([tokens.ids], config.top_k))
        asyncio.run(engine.stop())
        aligner = Aligner(tokenizer, target, AlignmentConfig(), config.top_k)
        aligned = aligner.align(
            segment.text,
            segment.ids,
            segment.ends,
            tokens.ids,
            tokens.ends,
            scores.top_ids,
            scores.top_logprobs,
            scores.gold_logprobs,
        )
        frame = encode_frame([aligned], teacher=name, fingerprint="f", vocab_size=target.vocab_size)
        (received,) = decode_frame(
            frame,
            teacher=name,
            fingerprint="f",
            vocab_size=target.vocab_size,
            top_k=config.top_k,
            num_positions=[segment.num_positions],
        )
        stages.teachers[name] = SimpleNamespace(
            config=config,
            tokenizer=tokenizer,
            tokens=tokens,
            scores=scores,
            aligned=aligned,
            received=received,
        )
    stages.batch = make_micro_batch(
        [Row((segment,))],
        [[teacher.received] for teacher in stages.teachers.values()],
        row_tokens=ROW_TOKENS,
        pad_id=target.eos_id or 0,
        domains={"d": 0},
        fusion=FusionConfig(),
        teachers=[teacher.config for teacher in stages.teachers.values()],
    )
    return stages


@pytest.fixture(scope="module")
def stepped(path: SimpleNamespace) -> SimpleNamespace:
    """The target after one step on the document, and what the step was made of."""
    batch: MicroBatch = path.batch
    model = HeadedModel(load_causal_lm(ModelConfig(model=str(path.target_folder)), dtype=torch.float32))
    optimizer = make_optimizer(model, TRAINING)

    def head(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        hidden = hidden.flatten(0, 1)[batch.positions]
        config = ObjectiveConfig(clm_weight=0.3)
        return objective(
            hidden, weight, bias, batch.gold, batch.fused, config=config, denominator=len(batch.gold)
        ).loss

    model(batch.input_ids, batch.position_ids, head).backward()
    before = {name: p.detach().double() for name, p in model.causal_lm.named_parameters()}
    gradients = {name: p.grad.double() for name, p in model.causal_lm.named_parameters()}
    norm = clip_gradients(model, TRAINING.clip_norm)
    set_learning_rate(optimizer, learning_rate(0, TRAINING))
    optimizer.step()
    return SimpleNamespace(model=model, optimizer=optimizer, before=before, gradients=gradients, norm=norm)


@pytest.fixture(scope="module")
def exported(
    path: SimpleNamespace, stepped: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The checkpoint of that step as a model's folder."""
    folder = tmp_path_factory.mktemp("exported")
    (folder / "step").mkdir()
    write_checkpoint(folder / "step", training_tensors(stepped.model, stepped.optimizer), {"step": 1})
    return export_model(folder / "step", TargetConfig(model=str(path.target_folder)), folder / "out")


def test_the_first_segment_is_the_document_in_target_tokens(path: SimpleNamespace):
    segment: Segment = path.segment
    assert segment.text.decode() == TEXT
    assert segment.ends_document
    own = path.target.encode(TEXT)
    assert segment.ids.tolist() == [path.target.bos_id, *own.ids, path.target.eos_id]
    assert segment.ends.tolist() == [0, *own.ends, len(TEXT.encode())]


def test_the_request_carries_the_segment_unchanged(path: SimpleNamespace):
    (received,) = decode_request(encode_request([path.segment]), vocab_size=path.target.vocab_size)
    assert received.text == path.segment.text
    assert received.ids.tolist() == path.segment.ids.tolist()
    assert received.ends.tolist() == path.segment.ends.tolist()


@pytest.mark.parametrize("name", TEACHERS)
def test_scores_are_the_models_own_log_softmax(path: SimpleNamespace, name: str):
    teacher = path.teachers[name]
    model = AutoModelForCausalLM.from_pretrained(teacher.config.model).double()
    ids = torch.from_numpy(teacher.tokens.ids).long()
    with torch.no_grad():
        expected = log_softmax(model(ids[None]).logits[0, :-1], dim=-1)
    scores: Scores = teacher.scores
    seen = torch.empty_like(expected).scatter_(
        1, torch.from_numpy(scores.top_ids).long(), torch.from_numpy(scores.top_logprobs).double()
    )
    torch.testing.assert_close(seen, expected, atol=1e-4, rtol=0)
    gold = expected.gather(1, ids[1:, None])[:, 0]
    np.testing.assert_allclose(scores.gold_logprobs, gold.numpy(), atol=1e-4)


@pytest.mark.parametrize("name", TEACHERS)
def test_aligned_gold_nats_telescope_to_the_teachers_own(path: SimpleNamespace, name: str):
    teacher = path.teachers[name]
    aligned: Aligned = teacher.aligned
    # A teacher without BOS does not predict its first token: the sum begins at the end of that token.
    predicted_from = 0 if teacher.tokenizer.bos_id is not None else int(teacher.tokens.ends[0])
    starts = path.segment.ends[:-1]
    counted = starts >= predicted_from
    assert predicted_from in starts
    assert -aligned.gold[counted].sum() == pytest.approx(-teacher.scores.gold_logprobs.sum(), abs=1e-3)
    assert aligned.teacher_nats == pytest.approx(-teacher.scores.gold_logprobs.sum(), abs=1e-3)


def first_token(target: ByteTokenizer, data: bytes) -> bytes | None:
    """Of what the target writes for these bytes in mid-text, after a line's end or else "!"."""
    try:
        text = data.decode()
    except UnicodeDecodeError:  # no text: the longest token that they begin with
        return max((part for part in target.token_bytes if part and data.startswith(part)), key=len)
    encodings = [target.encode(before + text) for before in "\n!"]
    tokens = next(encoding for encoding in encodings if 1 in encoding.ends)
    return target.token_bytes[tokens.ids[tokens.ends > 1][0]]


@pytest.mark.parametrize("name", TEACHERS)
def test_aligned_mass_is_one_and_lies_where_the_bytes_say(path: SimpleNamespace, name: str):
    teacher = path.teachers[name]
    aligned: Aligned = teacher.aligned
    mass = np.exp(aligned.logprobs.astype(float)).sum(1) + np.exp(aligned.gold.astype(float))
    mass += np.exp(aligned.residual.astype(float))
    np.testing.assert_allclose(mass[aligned.valid], 1, atol=1e-4)

    # A boundary in mid-text that both share: each teacher token goes to the target token with its bytes, else to the
    # first token of the target's encoding of them.
    shared = set(path.segment.ends[1:-2].tolist()) & set(teacher.tokens.ends[1:-2].tolist())
    boundary = min(shared - {0})
    p = int(np.flatnonzero(path.segment.ends == boundary)[-1])
    q = int(np.flatnonzero(teacher.tokens.ends == boundary)[-1])
    spelt = set(path.target.token_bytes)
    gold = path.target.token_bytes[path.segment.ids[p + 1]]
    ends_inside = teacher.tokens.ends[q + 1] > path.segment.ends[p + 1]
    expected: Counter[bytes | None] = Counter()
    for token, logprob in zip(teacher.scores.top_ids[q], teacher.scores.top_logprobs[q], strict=True):
        data, mass = teacher.tokenizer.token_bytes[token], math.exp(logprob)
        if data is None or (ends_inside and data.startswith(gold)):
            continue  # of the latter the gold token has the mass
        if token == teacher.tokens.ids[q + 1]:
            mass -= math.exp(aligned.gold[p])
        expected[data if data in spelt else first_token(path.target, data)] += mass
    seen: Counter[bytes | None] = Counter()
    for token, logprob in zip(aligned.ids[p], aligned.logprobs[p], strict=True):
        seen[path.target.token_bytes[token]] += math.exp(logprob)
    parts = (expected | seen).keys() - {gold, None}  # what goes to EOS has no bytes
    assert max(expected[part] for part in parts) > 1e-3
    for part in parts:
        assert seen[part] == pytest.approx(expected[part], abs=1e-6)


@pytest.mark.parametrize("name", TEACHERS)
def test_the_frame_keeps_half_precision_of_everything(path: SimpleNamespace, name: str):
    sent, received = path.teachers[name].aligned, path.teachers[name].received
    np.testing.assert_array_equal(received.valid, sent.valid)
    for field in ("logprobs", "gold", "residual"):
        mass_sent = np.exp(getattr(sent, field)[sent.valid].astype(float))
        mass_received = np.exp(getattr(received, field)[sent.valid].astype(float))
        np.testing.assert_allclose(mass_received, mass_sent, atol=2e-3)


def test_fusion_takes_the_teacher_that_needs_fewer_nats_for_the_bytes(path: SimpleNamespace):
    golds = [teacher.received.gold.astype(float) for teacher in path.teachers.values()]
    common = np.isfinite(golds[0]) & np.isfinite(golds[1])
    best = int(np.argmin([-gold[common].sum() for gold in golds]))
    batch: MicroBatch = path.batch
    assert batch.fused is not None
    valid = batch.fused.valid.numpy()
    both = np.logical_and.reduce([teacher.received.valid for teacher in path.teachers.values()])
    assert both.any()
    assert (batch.fused.weights[best].numpy()[both] == 1).all()
    received = list(path.teachers.values())[best].received
    np.testing.assert_allclose(batch.fused.gold.numpy()[both & valid], received.gold[both & valid], atol=1e-6)


def test_the_loss_is_clm_and_kl_to_the_fused_distribution_with_its_bucket(path: SimpleNamespace):
    batch: MicroBatch = path.batch
    assert batch.fused is not None
    model = load_causal_lm(ModelConfig(model=str(path.target_folder)), dtype=torch.float32)
    with torch.no_grad():
        hidden = model.base_model(
            input_ids=batch.input_ids, position_ids=batch.position_ids
        ).last_hidden_state
        hidden = hidden.flatten(0, 1)[batch.positions]
        weight = model.get_output_embeddings().weight
        output = objective(
            hidden,
            weight,
            None,
            batch.gold,
            batch.fused,
            config=ObjectiveConfig(clm_weight=0.3),
            denominator=7.0,
        )
        logq = log_softmax((hidden @ weight.T).double(), dim=-1)

    total = 0.0
    for p, gold in enumerate(batch.gold.tolist()):
        clm = -logq[p, gold].item()
        if not batch.fused.valid[p]:
            total += clm
            continue
        support = {gold: math.exp(batch.fused.gold[p])}
        for token, logprob in zip(batch.fused.ids[p].tolist(), batch.fused.logprobs[p].tolist(), strict=True):
            if logprob > -math.inf:
                support[token] = support.get(token, 0.0) + math.exp(logprob)
        rest = math.exp(batch.fused.residual[p])
        scale = sum(support.values()) + rest
        kl = sum(m / scale * (math.log(m / scale) - logq[p, t].item()) for t, m in support.items() if m > 0)
        outside = 1 - sum(math.exp(logq[p, t].item()) for t in support)
        if rest > 0 and outside > 1e-9:
            kl += rest / scale * math.log(rest / scale / outside)
        total += 0.3 * clm + 0.7 * kl
    assert output.loss.item() == pytest.approx(total / 7.0, rel=1e-3)


def test_a_step_is_adamw_on_the_clipped_gradients(stepped: SimpleNamespace):
    (b1, b2), lr, eps = TRAINING.betas, TRAINING.lr / 2, 1e-8  # the first of two steps of warm-up
    norm = math.sqrt(sum((g**2).sum().item() for g in stepped.gradients.values()))
    assert stepped.norm == pytest.approx(norm, rel=1e-5)
    assert norm > TRAINING.clip_norm
    for name, parameter in stepped.model.causal_lm.named_parameters():
        gradient = stepped.gradients[name] * TRAINING.clip_norm / norm
        mean, square = (1 - b1) * gradient, (1 - b2) * gradient**2
        decay = TRAINING.weight_decay if parameter.dim() >= 2 else 0.0
        expected = stepped.before[name] * (1 - lr * decay)
        expected -= lr * (mean / (1 - b1)) / ((square / (1 - b2)).sqrt() + eps)
        torch.testing.assert_close(parameter.detach().double(), expected, atol=1e-6, rtol=1e-6)


def test_the_exported_checkpoint_holds_the_weights_after_the_step(stepped: SimpleNamespace, exported: Path):
    loaded = dict(AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).named_parameters())
    trained = dict(stepped.model.causal_lm.named_parameters())
    assert loaded.keys() == trained.keys()
    for name, parameter in trained.items():
        assert torch.equal(loaded[name], parameter)


def test_bits_per_byte_are_the_exported_models_nats_over_the_documents_bytes(
    path: SimpleNamespace, exported: Path
):
    documents = held_out_documents([path.source], max_bytes=10_000)
    model, tokenizer, context = load_model(ModelConfig(model=str(exported)))
    score = bits_per_byte(model, tokenizer, documents, row_tokens=context, batch_rows=1)["d"]
    ids = torch.from_numpy(path.segment.ids[:-1]).long()  # from BOS to the last byte: EOS is not counted
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(exported).double()(ids[None]).logits[0, :-1]
    nats = -log_softmax(logits, dim=-1).gather(1, ids[1:, None]).sum().item()
    assert score.bits_per_byte == pytest.approx(nats / len(TEXT.encode()) / math.log(2), rel=1e-5)
