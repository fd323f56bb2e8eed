"""Facts about dynamic time warping, and about what the paper's options make of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fusellm_ray.alignment import Aligner
from fusellm_ray.alignment.dtw import sole_matches
from fusellm_ray.alignment.edit_distance import Strings
from fusellm_ray.alignment.vocabulary import string_of
from fusellm_ray.config import AlignmentConfig
from fusellm_ray.corpus.tokens import ByteTokenizer
from fusellm_ray.errors import TokenizerError
from tests.alignment_reference import Case, spelled, total_mass, warp
from tests.test_alignment import TEXTS

PAPER = AlignmentConfig(sequence="dtw", straddle="onehot", projection="mined")
tokens = st.lists(st.text(st.sampled_from("ab é"), max_size=4), min_size=1, max_size=14)


@pytest.fixture(scope="module")
def tokenizers(tokenizer_folders: dict[str, Path]) -> dict[str, ByteTokenizer]:
    return {kind: ByteTokenizer.load(str(folder)) for kind, folder in tokenizer_folders.items()}


def sole(matches: list[list[int]]) -> list[int]:
    return [m[0] if len(m) == 1 else -1 for m in matches]


@settings(deadline=None)
@given(tokens, tokens)
def test_path_is_that_of_plain_float64_python(a: list[str], b: list[str]) -> None:
    ours = np.arange(len(a), dtype=np.int32)
    theirs = np.arange(len(a), len(a) + len(b), dtype=np.int32)
    assert sole_matches(Strings.of(a + b), ours, theirs).tolist() == sole(warp(a, b))


@pytest.mark.parametrize(("target", "teacher"), [("bytelevel", "llama"), ("unigram", "normalising")])
@pytest.mark.parametrize("text", TEXTS)
def test_path_on_real_tokens_is_that_of_plain_python(
    target: str, teacher: str, text: str, tokenizers: dict[str, ByteTokenizer]
) -> None:
    a, b = (
        [string_of(spelled(t, i)) for i in t.encode(text).ids]
        for t in (tokenizers[target], tokenizers[teacher])
    )
    ours = np.arange(len(a), dtype=np.int32)
    theirs = np.arange(len(a), len(a) + len(b), dtype=np.int32)
    assert sole_matches(Strings.of(a + b), ours, theirs).tolist() == sole(warp(a, b))


@pytest.mark.parametrize("projection", ["exact", "mined"])
@pytest.mark.parametrize(("target", "teacher"), [("bytelevel", "llama"), ("llama", "bytelevel")])
def test_a_row_applies_to_sole_matches_that_are_equal_or_mined_and_gold_alone_elsewhere(
    target: str, teacher: str, projection: str, tokenizers: dict[str, ByteTokenizer]
) -> None:
    t, s = tokenizers[target], tokenizers[teacher]
    aligner = Aligner(s, t, AlignmentConfig(sequence="dtw", projection=projection), 16)  # type: ignore[arg-type]
    text = TEXTS[1]
    case = Case.random(text, t, s, k=16)
    aligned, spans = case.align(aligner), case.align(projection=projection)
    ours, theirs = t.encode(text), s.encode(text)
    names = [[string_of(spelled(v, i)) for i in e.ids] for v, e in ((t, ours), (s, theirs))]
    skip = int(t.bos_id is not None)
    kinds = set()
    for i, matches in enumerate(warp(*names)):
        a, b = int(ours.ids[i]), int(theirs.ids[matches[0]])
        at_start = i == 0 == matches[0]
        is_equal = spelled(t, a) == spelled(s, b) or (at_start and spelled(t, a, True) == spelled(s, b, True))
        is_mined = projection == "mined" and aligner.map.whole[b] == a
        p = i + skip
        if len(matches) > 1 or not (is_equal or is_mined):
            kinds.add("one-hot")
            assert aligned.gold[p] == 0
            assert (aligned.logprobs[p] == -np.inf).all()
        elif ours.ends[i] == theirs.ends[matches[0]]:
            kinds.add("equal")
            assert aligned.gold[p] == spans.gold[p]
            assert aligned.ids[p].tolist() == spans.ids[p].tolist()
            assert aligned.logprobs[p].tolist() == spans.logprobs[p].tolist()
            assert aligned.residual[p] == spans.residual[p]
    assert kinds == {"one-hot", "equal"}
    assert aligned.valid[skip:].all()


@pytest.mark.parametrize("pair", [("bytelevel", "llama"), ("llama", "unigram"), ("unigram", "normalising")])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=st.text(st.sampled_from("abst hH.1\n é"), max_size=40), seed=st.integers(0, 3))
def test_mass_is_one_under_the_papers_options(
    pair: tuple[str, str], tokenizers: dict[str, ByteTokenizer], text: str, seed: int
) -> None:
    t, s = tokenizers[pair[0]], tokenizers[pair[1]]
    try:
        case = Case.random(text, t, s, k=32, seed=seed)
    except TokenizerError:
        assume(False)
    aligned = case.align(_aligner(s, t))
    np.testing.assert_allclose(total_mass(aligned), 1.0, atol=1e-5)
    for p, gold in enumerate(case.sequences.target_ids[1:]):
        assert gold not in aligned.ids[p][aligned.logprobs[p] > -np.inf]
        assert not aligned.valid[p] or np.isfinite(aligned.gold[p])


_ALIGNERS: dict[tuple[str, str], Aligner] = {}


def _aligner(teacher: ByteTokenizer, target: ByteTokenizer) -> Aligner:
    key = (teacher.fingerprint, target.fingerprint)
    if key not in _ALIGNERS:
        _ALIGNERS[key] = Aligner(teacher, target, PAPER, 32)
    return _ALIGNERS[key]


def test_special_tokens_do_not_shift_a_warp(tokenizers: dict[str, ByteTokenizer]) -> None:
    t, s = tokenizers["bytelevel"], tokenizers["llama"]
    with_end, without = (Case.random(TEXTS[0], t, s, k=16, ends_document=e) for e in (True, False))
    a, b = with_end.align(_aligner(s, t)), without.align(_aligner(s, t))
    one_hot_a, one_hot_b = (x.gold[: len(b.gold)] == 0 for x in (a, b))
    assert one_hot_a.tolist() == one_hot_b.tolist()
    assert a.gold[-1] == pytest.approx(float(with_end.gold[-1]))  # EOS to EOS
