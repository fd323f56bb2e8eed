"""Facts about what alignment refuses, measures, and withstands."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fusellm_ray.alignment import Aligner
from fusellm_ray.alignment.project import Scored
from fusellm_ray.alignment.statistics import (
    Kind,
    alignment_statistics,
    kind_shares,
    mass_statistics,
    position_kinds,
)
from fusellm_ray.compiled import compiled
from fusellm_ray.config import AlignmentConfig
from fusellm_ray.corpus.tokens import ByteTokenizer
from fusellm_ray.errors import AlignmentError
from tests.alignment_reference import Case, total_mass
from tests.test_alignment import TEXTS


@pytest.fixture(scope="module")
def tokenizers(tokenizer_folders: dict[str, Path]) -> dict[str, ByteTokenizer]:
    return {kind: ByteTokenizer.load(str(folder)) for kind, folder in tokenizer_folders.items()}


@pytest.fixture
def case(tokenizers: dict[str, ByteTokenizer]) -> Case:
    return Case.random(TEXTS[1], tokenizers["bytelevel"], tokenizers["llama"], k=16)


def changed(case: Case, **sequences: np.ndarray) -> Case:
    return dataclasses.replace(case, sequences=dataclasses.replace(case.sequences, **sequences))


def test_offsets_of_another_text_are_refused(case: Case) -> None:
    with pytest.raises(AlignmentError, match=r"target: byte ends .* bytes"):
        changed(case, target_ends=case.sequences.target_ends + 1).align()
    with pytest.raises(AlignmentError, match=r"teacher: byte ends"):
        changed(case, teacher_ends=case.sequences.teacher_ends[::-1]).align()


def test_token_ids_of_another_vocabulary_are_refused(case: Case) -> None:
    ids = case.sequences.teacher_ids.copy()
    ids[3] = 5000
    with pytest.raises(AlignmentError, match=r"teacher: token ids .* 5000, vocabulary 1200"):
        changed(case, teacher_ids=ids).align()
    top = case.top_ids.copy()
    top[2, 1] = -1
    with pytest.raises(AlignmentError, match="top_ids from -1"):
        dataclasses.replace(case, top_ids=top).align()


def test_shapes_that_do_not_fit_are_refused(case: Case) -> None:
    with pytest.raises(AlignmentError, match="rows"):
        dataclasses.replace(case, gold=case.gold[:-1]).align()
    with pytest.raises(AlignmentError, match="one end offset per token"):
        changed(case, target_ends=case.sequences.target_ends[:-1]).align()


@pytest.mark.parametrize("value", [np.nan, 0.5, 3.0])
def test_logprobs_that_are_none_are_refused(case: Case, value: float) -> None:
    logprobs = case.top_logprobs.copy()
    logprobs[3, :] = value
    with pytest.raises(AlignmentError, match="row 3 sum to"):
        dataclasses.replace(case, top_logprobs=logprobs).align()


def test_an_infinite_gold_logprob_is_refused(case: Case) -> None:
    gold = case.gold.copy()
    gold[4] = -np.inf
    with pytest.raises(AlignmentError, match=r"gold_logprobs\[4\]"):
        dataclasses.replace(case, gold=gold).align()


def test_unused_slots_of_the_top_k_are_ignored(case: Case) -> None:
    ids = np.concatenate([case.top_ids, np.zeros_like(case.top_ids)], axis=1)
    logprobs = np.concatenate([case.top_logprobs, np.full_like(case.top_logprobs, -np.inf)], axis=1)
    aligner = Aligner(case.teacher, case.target, AlignmentConfig(), 16)
    padded = dataclasses.replace(case, top_ids=ids, top_logprobs=logprobs).align(aligner)
    plain = case.align(aligner)
    assert padded.ids.tolist() == plain.ids.tolist()
    assert padded.residual.tolist() == plain.residual.tolist()


def test_mass_on_padding_and_unused_ids_goes_to_the_residual(
    tokenizer_folders: dict[str, Path], tokenizers: dict[str, ByteTokenizer]
) -> None:
    padded = ByteTokenizer.load(str(tokenizer_folders["llama"]), vocab_size=1264)
    case = Case.random(TEXTS[0], tokenizers["bytelevel"], padded)
    aligned = case.align()
    np.testing.assert_allclose(total_mass(aligned), 1.0, atol=1e-5)
    at_padding = np.where(case.top_ids >= 1200, np.exp(case.top_logprobs), 0).sum(1)
    coinciding = np.flatnonzero(np.isin(case.sequences.target_ends[:-1], case.sequences.teacher_ends))
    for p in coinciding:
        row = case.row_at(int(case.sequences.target_ends[p]))
        assert np.exp(aligned.residual[p]) >= at_padding[row] - 1e-5


def test_arrays_of_any_layout_and_type_give_the_same(case: Case) -> None:
    wide = dataclasses.replace(
        case,
        top_ids=np.asfortranarray(case.top_ids.astype(np.int64)),
        top_logprobs=np.asfortranarray(case.top_logprobs.astype(np.float64)),
        gold=case.gold.astype(np.float64),
    )
    wide.top_ids.flags.writeable = False
    a, b = wide.align(), case.align()
    assert a.ids.tolist() == b.ids.tolist()
    assert a.residual.tolist() == b.residual.tolist()


def test_threads_that_share_an_aligner_get_what_one_gets_alone(tokenizers: dict[str, ByteTokenizer]) -> None:
    t, s = tokenizers["llama"], tokenizers["unigram"]
    cases = [Case.random(text, t, s, k=64, seed=i) for i in range(4) for text in TEXTS[:5]]
    alone = [case.align() for case in cases]
    shared = Aligner(s, t, AlignmentConfig(), 64)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda case: case.align(shared), cases))
    for a, b in zip(alone, together, strict=True):
        for name in ("ids", "logprobs", "gold", "residual", "valid"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_segments_aligned_together_get_what_each_gets_alone(tokenizers: dict[str, ByteTokenizer]) -> None:
    t, s = tokenizers["llama"], tokenizers["unigram"]
    cases = [Case.random(text, t, s, k=64, seed=i) for i, text in enumerate(TEXTS)]
    scored = [
        Scored(
            *(getattr(case.sequences, field.name) for field in dataclasses.fields(case.sequences)),
            case.top_ids,
            case.top_logprobs,
            case.gold,
        )
        for case in cases
    ]
    together = Aligner(s, t, AlignmentConfig(), 64).align_each(scored)
    for case, aligned in zip(cases, together, strict=True):
        alone = case.align()
        for field in dataclasses.fields(alone):
            np.testing.assert_array_equal(getattr(aligned, field.name), getattr(alone, field.name))


def test_kernels_compile_where_nothing_can_be_cached() -> None:
    namespace: dict = {}
    exec("def add(a, b):\n    return a + b", namespace)  # a function without a file has no place for a cache
    assert compiled(namespace["add"])(2, 3) == 5


def test_kinds_say_how_each_position_got_its_distribution(case: Case) -> None:
    aligner = Aligner(case.teacher, case.target, AlignmentConfig(), 16)
    kinds = position_kinds(aligner, case.sequences)
    ours, theirs = case.sequences.target_ends, case.sequences.teacher_ends
    for p, kind in enumerate(kinds[:-1]):
        start, end = int(ours[p]), int(ours[p + 1])
        row = case.row_at(start)
        is_whole = int(theirs[row + 1]) == end
        expected = Kind.STRADDLED if theirs[row] < start else Kind.EXACT if is_whole else Kind.PREFIX
        assert kind == expected
    assert kinds[-1] == Kind.EXACT  # EOS to EOS
    shares = kind_shares([kinds])
    assert sum(shares.values()) == pytest.approx(1)
    assert min(shares["exact"], shares["prefix"], shares["straddled"]) > 0


@pytest.mark.parametrize("straddle", ["condition", "mask", "onehot"])
def test_statistics_are_sums_over_covered_positions(
    straddle: str, case: Case, tokenizers: dict[str, ByteTokenizer]
) -> None:
    config = AlignmentConfig(straddle=straddle)  # type: ignore[arg-type]
    aligner = Aligner(case.teacher, case.target, config, 16)
    aligned = case.align(aligner)
    other = Case.random(TEXTS[0], case.target, case.teacher, k=16)
    figures = alignment_statistics(
        aligner, [case.sequences, other.sequences], [aligned, other.align(aligner)]
    )
    assert figures.positions == len(aligned.gold) + len(other.sequences.target_ids) - 1
    assert figures.coverage == pytest.approx(sum(figures.shares[k] for k in ("exact", "prefix", "straddled")))
    assert figures.mapped_mass + figures.residual_mass == pytest.approx(1)
    assert (figures.coverage == 1) == (straddle == "condition")
    assert (figures.shares["one_hot"] > 0) == (straddle == "onehot")


def test_fidelity_is_one_where_the_whole_vocabulary_was_sent(tokenizers: dict[str, ByteTokenizer]) -> None:
    case = Case.random(TEXTS[1], tokenizers["bytelevel"], tokenizers["bytelevel"])
    aligner = Aligner(case.teacher, case.target, AlignmentConfig(), 1200)
    figures = alignment_statistics(aligner, [case.sequences], [case.align(aligner)])
    assert figures.fidelity == pytest.approx(1, abs=1e-5)
    assert figures.coverage == 1
    assert figures.residual_mass == pytest.approx(0, abs=1e-5)


def test_masses_of_a_map_sum_to_one_and_exact_loses_what_prefix_maps(case: Case) -> None:
    prefix, exact = (
        mass_statistics(
            Aligner(case.teacher, case.target, AlignmentConfig(projection=projection), 16),  # type: ignore[arg-type]
            case.top_ids,
            case.top_logprobs,
        )
        for projection in ("prefix", "exact")
    )
    for figures in (prefix, exact):
        total = figures.exact + figures.other + figures.lost + figures.unsent
        assert total == pytest.approx(1, abs=1e-5)
    assert exact.exact == pytest.approx(prefix.exact)
    assert exact.other == pytest.approx(0)
    assert exact.lost == pytest.approx(prefix.other + prefix.lost)
    assert prefix.other > 0
