"""The models of the study *Domains*, at the smallest size."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from fusellm_ray.config import ModelConfig
from fusellm_ray.corpus.tokens import ByteTokenizer
from fusellm_ray.evaluate.merge import merge_models
from fusellm_ray.perplexity import by_domain, evaluate_model, held_out_documents
from fusellm_ray.quickstart.domains import Domains, DomainsPlan, build_domains
from fusellm_ray.quickstart.text import DOMAINS, Sizes
from fusellm_ray.study import load_study

STUDY = Path(__file__).parent.parent / "configs" / "studies" / "domains.yaml"


def small_plan() -> DomainsPlan:
    full = DomainsPlan()
    base = replace(
        full.base,
        vocab_size=512,
        steps=30,
        hidden_size=64,
        batch_rows=2,
        row_tokens=64,
        tokenizer_bytes=60_000,
    )
    return DomainsPlan(sizes=Sizes(150_000, 30_000, 12_000), base=base, expert_steps=80)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Domains:
    return build_domains(tmp_path_factory.mktemp("cache"), on_progress=lambda *_: None, plan=small_plan())


def test_experts_continue_the_base_and_are_ahead_of_it_in_their_own_domain(made: Domains, tmp_path: Path):
    base = load_study(STUDY).config()
    sources = [
        source.model_copy(update={"path": str(made.text(source.name, "heldout"))})
        for source in base.evaluation.sources
    ]
    assert [source.name for source in sources] == list(DOMAINS)
    documents = held_out_documents(sources, 6_000)
    before = by_domain(evaluate_model(ModelConfig(model=str(made.base)), documents))
    for domain in DOMAINS:
        expert = str(made.expert(domain))
        assert ByteTokenizer.load(expert).fingerprint == ByteTokenizer.load(str(made.base)).fingerprint
        after = by_domain(evaluate_model(ModelConfig(model=expert), documents))
        assert after[domain].bits_per_byte < before[domain].bits_per_byte - 0.1
    experts = [str(made.expert(domain)) for domain in DOMAINS]
    merged = merge_models(
        "linear",
        [ModelConfig(model=expert) for expert in experts],
        tmp_path / "merged",
        base=ModelConfig(model=str(made.base)),
    )
    assert AutoModelForCausalLM.from_pretrained(merged).num_parameters() > 0


def test_no_document_is_in_two_parts_and_the_cache_is_used(made: Domains):
    for domain in DOMAINS:
        parts = [
            {json.loads(line)["name"].rsplit(":", 1)[0] for line in made.text(domain, part).open()}
            for part in ("expert", "train", "heldout")
        ]
        assert all(parts)
        assert not parts[0] & parts[1]
        assert not (parts[0] | parts[1]) & parts[2]
    told: list[str] = []
    again = build_domains(
        made.folder.parent, on_progress=lambda stage, *_: told.append(stage), plan=small_plan()
    )
    assert again == made
    assert not told
    assert (made.folder.parent / "latest").resolve() == made.folder.resolve()
