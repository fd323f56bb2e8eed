"""The quickstart's text, tokenizers and models, with a zoo of the smallest size."""

from __future__ import annotations

import json
import multiprocessing
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusellm_ray.corpus.tokens import ByteTokenizer
from fusellm_ray.errors import CorpusError, ModelError
from fusellm_ray.quickstart import text
from fusellm_ray.quickstart.pretrain import Muon, pretrain, token_rows
from fusellm_ray.quickstart.text import DOMAINS, Sizes, Text
from fusellm_ray.quickstart.tokenizer import TokenizerKind, train_tokenizer
from fusellm_ray.quickstart.zoo import Plan, Recipe, Zoo, build_zoo

KINDS: tuple[TokenizerKind, ...] = ("byte_level", "sentencepiece", "unigram", "digits")
SAMPLE = [
    "def read(path):\n    with open(path) as file:\n        return file.read()  # all of it\n",
    "It is a truth universally acknowledged, that a reader in possession of a good file wants 1813 more.\n",
    "template <typename T>\nstruct Box {\n  explicit Box(T value) : value_(value) {}\n\n  T value_;\n};\n",
] * 20


def small(recipe: Recipe) -> Recipe:
    return replace(
        recipe, vocab_size=640, steps=6, hidden_size=64, batch_rows=2, row_tokens=64, tokenizer_bytes=60_000
    )


def small_plan() -> Plan:
    full = Plan()
    return Plan(
        sizes=Sizes(expert=150_000, train=30_000, heldout=12_000),
        experts={domain: small(recipe) for domain, recipe in full.experts.items()},
        target=small(full.target),
    )


@pytest.fixture(scope="module")
def splits() -> dict[str, text.Split]:
    return {domain: text.find_domain(domain, Sizes(150_000, 30_000, 12_000)) for domain in DOMAINS}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Zoo, list[list[tuple[str, float, str]]]]:
    """A zoo that two threads asked for at once, and what each was told."""
    cache = tmp_path_factory.mktemp("cache")
    told: list[list[tuple[str, float, str]]] = [[], []]
    zoos: list[Zoo] = []

    def build(mine: list[tuple[str, float, str]]) -> None:
        zoos.append(build_zoo(cache, on_progress=lambda *event: mine.append(event), plan=small_plan()))

    threads = [threading.Thread(target=build, args=(mine,)) for mine in told]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert zoos[0] == zoos[1]
    return zoos[0], told


# ---------------------------------------------------------------------------------- text


@pytest.mark.parametrize("domain", DOMAINS)
def test_parts_of_a_domain_share_no_file(splits: dict[str, text.Split], domain: str) -> None:
    split = splits[domain]
    files = [{t.name.rsplit(":", 1)[0] for t in part} for part in (split.train, split.expert, split.heldout)]
    assert all(files)
    assert not files[0] & files[1]
    assert not files[0] & files[2]
    assert not files[1] & files[2]


def test_held_out_lines_are_hardly_ever_in_the_training_text(splits: dict[str, text.Split]) -> None:
    for split in splits.values():
        seen = {line for t in (*split.train, *split.expert) for line in t.text.splitlines()}
        lines = [line for t in split.heldout for line in t.text.splitlines() if len(line.strip()) >= 20]
        assert sum(line in seen for line in lines) < 0.25 * len(lines)


def test_a_split_depends_on_the_seed_alone(splits: dict[str, text.Split]) -> None:
    sizes = Sizes(150_000, 30_000, 12_000)
    assert text.find_domain("cpp", sizes) == splits["cpp"]
    assert text.find_domain("cpp", sizes, seed=1).heldout != splits["cpp"].heldout


def test_too_little_text_is_an_error_that_says_where_it_looked() -> None:
    with pytest.raises(CorpusError, match=r"'cpp'.*torch/include.*needs"):
        text.find_domain("cpp", Sizes(expert=10**12))


def test_licence_at_the_head_is_left_out_and_other_comments_are_kept(tmp_path: Path) -> None:
    source = tmp_path / "a.h"
    source.write_text("// Copyright (c) someone\n// All rights reserved.\n\n// A box.\nstruct Box;\n")
    assert text._source(source, text._CPP_HEADER) == "// A box.\nstruct Box;\n"
    source.write_text("// A box.\nstruct Box;\n")
    assert text._source(source, text._CPP_HEADER) == "// A box.\nstruct Box;\n"


def test_prose_is_sentences_without_code_and_without_repeats() -> None:
    sentence = "This function returns the largest element of the sequence, or the default if it is empty."
    documentation = (
        f"{sentence}\n\n>>> largest([1, 2])\n2\n\n" + "x = {1: (2, 3)};" * 9 + f".\n\n{sentence}\n"
    )
    assert text._sentences([documentation.replace("of the sequence", "of\n    the sequence")]) == sentence


@given(st.text(alphabet="ab \né", max_size=4000))
def test_excerpts_put_together_are_the_text(whole: str) -> None:
    parts = list(text._excerpts("name", whole))
    assert "".join(part.text for part in parts) == whole
    assert all(part.text for part in parts)


def test_jsonl_gives_back_what_was_written(tmp_path: Path) -> None:
    texts = [Text("a", "é\n\u2028\x85 \t"), Text("b:1-2", "")]
    text.write_jsonl(tmp_path / "x.jsonl", texts)
    assert text.read_jsonl(tmp_path / "x.jsonl") == texts


# ---------------------------------------------------------------------------------- tokenizers


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, ByteTokenizer]:
    return {kind: ByteTokenizer(train_tokenizer(kind, SAMPLE, 600, 64), kind) for kind in KINDS}


@given(st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n\t<>0xA_defsT")), max_size=60))
@settings(max_examples=150, deadline=None)
def test_tokens_tile_the_bytes_of_any_text(tokenizers: dict[str, ByteTokenizer], sample: str) -> None:
    data = sample.encode()
    for kind, tokenizer in tokenizers.items():
        encoding = tokenizer.encode(sample)
        assert not data or encoding.ends[-1] == len(data)
        assert (np.diff(encoding.ends) >= 0).all()
        if "▁" not in sample:  # the one character that a SentencePiece vocabulary cannot tell from a space
            spelled = b"".join(tokenizer.token_bytes[i] or b"?" for i in encoding.ids)
            assert spelled.removeprefix(b" " if kind == "sentencepiece" and data else b"") == data


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers_prepend_bos_and_have_eos(tokenizers: dict[str, ByteTokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    assert tokenizer.bos_id is not None
    assert tokenizer.eos_id is not None
    assert tokenizer.hf("a")["input_ids"][0] == tokenizer.bos_id


def test_the_four_kinds_cut_the_same_text_differently(tokenizers: dict[str, ByteTokenizer]) -> None:
    line = "    return  1813  words\n\n  of text"
    assert len({tuple(t.encode(line).ends.tolist()) for t in tokenizers.values()}) == len(KINDS)


# ---------------------------------------------------------------------------------- training


def test_muon_steps_are_nearly_orthogonal_whatever_the_gradient() -> None:
    for shape in ((8, 20), (20, 8), (8, 8)):
        matrix = torch.zeros(shape, requires_grad=True)
        matrix.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e3
        Muon([matrix], lr=1.0, weight_decay=0.0).step()
        scale = max(1.0, shape[0] / shape[1]) ** 0.5
        values = torch.linalg.svdvals(matrix.detach()) / scale
        assert values.min() > 0.5
        assert values.max() < 1.3
        assert (matrix.detach() * matrix.grad).sum() < 0


def test_rows_hold_all_tokens_and_every_other_begins_with_bos() -> None:
    tokenizer = train_tokenizer("byte_level", SAMPLE, 400, 64)
    rows = token_rows(tokenizer, SAMPLE, 32)
    stream = [
        i
        for t in SAMPLE
        for i in (*tokenizer(t, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
    ]
    assert (rows[::2, 0] == tokenizer.bos_token_id).all()
    got = [i for n, row in enumerate(rows.tolist()) for i in row[(n + 1) % 2 :]]
    assert got == stream[: len(got)]
    assert len(stream) - len(got) < 2 * 32


# ---------------------------------------------------------------------------------- the zoo


def test_of_two_builds_at_once_one_builds_and_one_waits(
    built: tuple[Zoo, list[list[tuple[str, float, str]]]],
) -> None:
    zoo, told = built
    finished = [{stage for stage, share, _ in mine if share == 1.0} for mine in told]
    assert sorted(map(len, finished)) == [0, 5]
    assert max(finished, key=len) == {"text", *DOMAINS, "target"}
    assert [path.name for path in zoo.folder.parent.iterdir() if path.is_dir()] == [zoo.folder.name]


def test_a_finished_zoo_is_taken_from_the_cache(
    built: tuple[Zoo, list[list[tuple[str, float, str]]]],
) -> None:
    def unexpected(*event: object) -> None:
        raise AssertionError(event)

    assert build_zoo(built[0].folder.parent, on_progress=unexpected, plan=small_plan()) == built[0]


def test_models_and_tokenizers_load_as_hugging_face_folders(
    built: tuple[Zoo, list[list[tuple[str, float, str]]]],
) -> None:
    zoo, _ = built
    architectures, fingerprints = set(), set()
    for folder in (zoo.target, *zoo.experts.values()):
        model = AutoModelForCausalLM.from_pretrained(folder)
        hf = AutoTokenizer.from_pretrained(folder)
        tokenizer = ByteTokenizer.load(str(folder), vocab_size=model.config.vocab_size)
        # The class that AutoTokenizer chooses for an architecture must not change how the text is cut.
        saved = json.loads((folder / "tokenizer.json").read_text())
        assert json.loads(hf.backend_tokenizer.to_str())["pre_tokenizer"] == saved["pre_tokenizer"]
        assert hf.decode(tokenizer.encode(SAMPLE[0]).ids) == SAMPLE[0]
        assert (model.config.bos_token_id, model.config.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
        architectures.add(model.config.model_type)
        fingerprints.add(tokenizer.fingerprint)
    assert len(architectures) == len(fingerprints) == 4


def test_text_is_written_for_the_corpus(built: tuple[Zoo, list[list[tuple[str, float, str]]]]) -> None:
    for path in (*built[0].train.values(), *built[0].heldout.values()):
        assert all(t.text for t in text.read_jsonl(path))


def test_training_is_a_function_of_the_seed(built: tuple[Zoo, list[list[tuple[str, float, str]]]]) -> None:
    zoo, _ = built
    hf = AutoTokenizer.from_pretrained(zoo.target)
    rows = token_rows(hf, SAMPLE, 32)
    losses: list[list[float]] = []
    for seed in (0, 0, 1):
        model = AutoModelForCausalLM.from_pretrained(zoo.target)
        losses.append([])
        pretrain(
            model, rows, steps=4, batch_rows=2, seed=seed, on_step=lambda _, loss: losses[-1].append(loss)
        )
    assert losses[0] == losses[1] != losses[2]


def test_version_changes_with_the_recipes() -> None:
    plan = small_plan()
    assert plan.version() == small_plan().version()
    assert replace(plan, seed=1).version() != plan.version()
    assert replace(plan, target=replace(plan.target, steps=7)).version() != plan.version()


def test_a_failed_model_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    plan = small_plan()
    broken = replace(plan, target=replace(plan.target, hidden_size=65))
    with pytest.raises(ModelError, match="'target' could not be built"):
        build_zoo(tmp_path, on_progress=lambda *_: None, plan=broken)
    assert not multiprocessing.active_children()
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_an_interrupt_leaves_no_process_and_no_folder(tmp_path: Path) -> None:
    def interrupt(stage: str, share: float, message: str) -> None:
        if stage != "text":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_zoo(tmp_path, on_progress=interrupt, plan=small_plan())
    assert not multiprocessing.active_children()
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
