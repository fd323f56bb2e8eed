"""Bits per byte are those of each document read alone, however documents are packed, cut and shared out."""

import json
import math

import pytest
import torch

from fusellm_ray.config import ModelConfig, SourceConfig, TargetConfig
from fusellm_ray.corpus.source import Document
from fusellm_ray.corpus.tokens import ByteTokenizer
from fusellm_ray.errors import CorpusError
from fusellm_ray.models import HeadedModel, load_causal_lm
from fusellm_ray.perplexity import (
    DomainScore,
    bits_per_byte,
    by_domain,
    evaluate_model,
    held_out_documents,
    score_documents,
    sum_over_ranks,
)
from fusellm_ray.target.model import build_target
from tests.models import tiny_model
from tests.ranks import run_ranks
from tests.tokenizers import build

TEXTS = [
    ("prose", "The cat sat on the naïve café’s mat, and 今天天气很好 was all it said.\n" * 3),
    ("code", "def f(x):\n    return {k: v for k, v in x.items() if v is not None}\n"),
    ("prose", "x"),
    ("code", "import json\n\n\nclass A:\n\tpass  # 😀\n" * 4),
    ("prose", ""),
]
DOCUMENTS = [Document(text, domain, f"{domain}:{i}") for i, (domain, text) in enumerate(TEXTS)]


@pytest.fixture(scope="module", params=["bytelevel", "llama"])
def folder(request, tmp_path_factory):
    """A model with a tokenizer that adds no BOS, and one with a tokenizer that does."""
    path = tmp_path_factory.mktemp(request.param)
    build(request.param, path)
    return str(tiny_model("llama", 1200, path))


def load(folder):
    model = load_causal_lm(ModelConfig(model=folder), dtype=torch.float32)
    return HeadedModel(model), ByteTokenizer.load(folder, vocab_size=1200)


def reference(folder, row_tokens):
    """Document by document, window by window, from the plain model's logits."""
    model, tokenizer = load(folder)
    nats, num_bytes = {"prose": 0.0, "code": 0.0}, {"prose": 0, "code": 0}
    for document in DOCUMENTS:
        ids, ends = (
            x.tolist() for x in (lambda t: (t.ids, t.ends))(tokenizer.sequence(document.text, False))
        )
        for i in range(1, len(ids)):
            context = ids[(i - 1) // (row_tokens - 1) * (row_tokens - 1) : i]
            if tokenizer.bos_id is not None and i >= row_tokens:  # later windows begin with BOS, too
                new = row_tokens - 2
                context = [tokenizer.bos_id, *ids[row_tokens - 1 + (i - row_tokens) // new * new : i]]
            with torch.no_grad():
                logits = model.causal_lm(input_ids=torch.tensor([context])).logits[0, -1]
            nats[document.domain] -= logits.log_softmax(-1)[ids[i]].item()
            num_bytes[document.domain] += ends[i] - ends[i - 1]
    return nats, num_bytes


@pytest.mark.parametrize(("row_tokens", "batch_rows"), [(128, 1), (128, 3), (20, 2)])
def test_sums_are_those_of_each_document_alone(row_tokens, batch_rows, folder):
    scores = bits_per_byte(*load(folder), DOCUMENTS, row_tokens=row_tokens, batch_rows=batch_rows)
    nats, num_bytes = reference(folder, row_tokens)
    for domain, score in scores.items():
        assert score.nats == pytest.approx(nats[domain], rel=1e-5)
        assert score.bytes == num_bytes[domain]
        assert score.bits_per_byte == pytest.approx(nats[domain] / math.log(2) / num_bytes[domain], rel=1e-5)


def test_every_byte_is_scored_but_a_first_token_that_nothing_precedes(folder):
    model, tokenizer = load(folder)
    scores = bits_per_byte(model, tokenizer, DOCUMENTS, row_tokens=16, batch_rows=2)
    for domain, score in scores.items():
        encodings = [tokenizer.encode(d.text) for d in DOCUMENTS if d.domain == domain]
        unread = 0 if tokenizer.bos_id is not None else sum(int(e.ends[0]) for e in encodings if len(e.ends))
        assert score.bytes == sum(int(e.ends[-1]) for e in encodings if len(e.ends)) - unread


@pytest.mark.parametrize("batch_rows", [1, 3])
def test_documents_scored_one_by_one_add_up_to_their_domains(batch_rows, folder):
    model, tokenizer = load(folder)
    scores = score_documents(model, tokenizer, DOCUMENTS, row_tokens=20, batch_rows=batch_rows)
    assert [(s.domain, s.name) for s in scores] == [(d.domain, d.name) for d in DOCUMENTS]
    whole = bits_per_byte(model, tokenizer, DOCUMENTS, row_tokens=20, batch_rows=1)
    for domain, total in by_domain(scores).items():
        assert total.nats == pytest.approx(whole[domain].nats, rel=1e-6)
        assert (total.bytes, total.tokens) == (whole[domain].bytes, whole[domain].tokens)
    alone = score_documents(model, tokenizer, [DOCUMENTS[3]], row_tokens=20, batch_rows=1)[0]
    assert scores[3].nats == pytest.approx(alone.nats, rel=1e-5)
    assert scores[4].bytes == 0


def test_shards_add_up_to_the_whole(folder):
    model, tokenizer = load(folder)
    whole = bits_per_byte(model, tokenizer, DOCUMENTS, row_tokens=20, batch_rows=2)
    for num_shards in (2, 3, 40):
        parts = [
            bits_per_byte(
                model, tokenizer, DOCUMENTS, row_tokens=20, batch_rows=2, shard=shard, num_shards=num_shards
            )
            for shard in range(num_shards)
        ]
        for domain, score in whole.items():
            total = sum((part[domain] for part in parts), DomainScore(0.0, 0, 0, 0))
            assert total.nats == pytest.approx(score.nats, rel=1e-9)
            assert (total.bytes, total.tokens, total.documents) == (
                score.bytes,
                score.tokens,
                score.documents,
            )


def score_on_ranks(mesh, folder):
    model = build_target(TargetConfig(model=folder), mesh)
    tokenizer = ByteTokenizer.load(folder, vocab_size=1200)
    part = bits_per_byte(
        model,
        tokenizer,
        DOCUMENTS,
        row_tokens=64,
        batch_rows=1,
        shard=mesh.get_rank(),
        num_shards=mesh.size(),
    )
    return {domain: score.nats for domain, score in sum_over_ranks(part).items()}


def test_two_ranks_with_a_sharded_model_score_what_one_process_scores(folder):
    alone = bits_per_byte(*load(folder), DOCUMENTS, row_tokens=64, batch_rows=1)
    one, two = run_ranks(2, score_on_ranks, folder)
    assert one == two
    assert one == pytest.approx({domain: score.nats for domain, score in alone.items()}, rel=1e-6)


def test_a_model_folder_is_scored_within_its_context(folder):
    long = [Document(TEXTS[0][1] * 20, "long", "long:1")]  # the context is 128 tokens
    score = by_domain(evaluate_model(ModelConfig(model=folder), long, row_tokens=100_000))["long"]
    assert score.tokens > 1000
    assert score.documents == 1
    assert 1 < score.bits_per_byte < 20


def test_without_text_there_is_no_score(folder):
    with pytest.raises(CorpusError, match="no held-out text"):
        bits_per_byte(*load(folder), [Document("", "empty", "empty:1")], row_tokens=16, batch_rows=1)


def test_held_out_text_is_the_first_bytes_of_each_source_cut_at_a_character(tmp_path):
    for name in ("a", "b"):
        lines = [json.dumps({"text": f"{name}{i} ééé"}) for i in range(5)]  # 9 bytes each
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    sources = [SourceConfig(name=name, path=str(tmp_path / f"{name}.jsonl")) for name in ("a", "b")]
    documents = held_out_documents(sources, max_bytes=13)
    assert [(d.domain, d.text) for d in documents] == [
        ("a", "a0 ééé"),
        ("a", "a1 "),
        ("b", "b0 ééé"),
        ("b", "b1 "),
    ]
    everything = held_out_documents(sources, max_bytes=10_000)
    assert [d.text for d in everything if d.domain == "b"] == [f"b{i} ééé" for i in range(5)]
