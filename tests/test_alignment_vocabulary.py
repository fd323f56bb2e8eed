"""Facts about the projection of one vocabulary onto another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusellm_ray.alignment.edit_distance import Strings, nearest, pair_costs
from fusellm_ray.alignment.vocabulary import NOWHERE, VocabularyMap, string_of
from fusellm_ray.corpus.tokens import ByteTokenizer, Encoding
from fusellm_ray.errors import TokenizerError
from tests.alignment_reference import edit_distance, first_target_token, spelled

words = st.text(st.sampled_from("abcé中"), max_size=7)


@dataclass(frozen=True)
class Greedy:
    """A vocabulary written down by hand; encodes by the longest token that fits."""

    token_bytes: Sequence[bytes | None]
    bos_id: int | None = None
    eos_id: int | None = None
    special_ids: frozenset[int] = frozenset()
    strips_leading_space: bool = False
    vocab_size: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocab_size", len(self.token_bytes))

    def encode_each(self, texts: Sequence[str]) -> list[Encoding | TokenizerError]:
        outcomes: list[Encoding | TokenizerError] = []
        for text in texts:
            try:
                outcomes.append(self.encode(text))
            except TokenizerError as error:
                outcomes.append(error)
        return outcomes

    def encode(self, text: str) -> Encoding:
        rest, ids = text.encode(), []
        while rest:
            fits = [i for i, part in enumerate(self.token_bytes) if part and rest.startswith(part)]
            if not fits:
                raise TokenizerError(f"no token covers {rest!r}")
            ids.append(max(fits, key=lambda i: (len(self.token_bytes[i] or b""), i)))
            rest = rest[len(self.token_bytes[ids[-1]] or b"") :]
        widths = [len(self.token_bytes[i] or b"") for i in ids]
        return Encoding(np.array(ids, np.int32), np.cumsum(widths, dtype=np.int32))


@pytest.fixture(scope="module")
def tokenizers(tokenizer_folders: dict[str, Path]) -> dict[str, ByteTokenizer]:
    return {kind: ByteTokenizer.load(str(folder)) for kind, folder in tokenizer_folders.items()}


def landing(maps: VocabularyMap, target: Any, token: int) -> bytes | None:
    ours = maps.whole[token]
    return None if ours == NOWHERE else target.token_bytes[ours]


@settings(deadline=None)
@given(words, words)
def test_pair_costs_are_edit_distances(a: str, b: str) -> None:
    costs = pair_costs(Strings.of([a, b]), np.array([0, 1]), np.array([1, 0]))
    assert costs.tolist() == [[edit_distance(a, b), 0], [0, edit_distance(a, b)]]


@pytest.mark.parametrize("lengths", [(63, 80), (64, 65), (65, 64), (130, 70), (64, 64), (100, 3)])
def test_edit_distances_of_long_strings(lengths: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    a, b = ("".join(rng.choice(list("abc"), n)) for n in lengths)
    assert pair_costs(Strings.of([a, b]), np.array([0]), np.array([1])).item() == edit_distance(a, b)


@settings(deadline=None)
@given(st.lists(words, min_size=1, max_size=5), st.lists(words, min_size=1, max_size=30))
def test_nearest_is_the_first_of_the_least_distances(queries: list[str], strings: list[str]) -> None:
    expected = [min(range(len(strings)), key=lambda i: edit_distance(q, strings[i])) for q in queries]
    assert nearest(Strings.of(queries + strings), len(queries)).tolist() == expected


@pytest.mark.parametrize(("teacher_kind", "target_kind"), [("llama", "bytelevel"), ("bytelevel", "llama")])
def test_mined_is_the_plain_search_over_the_whole_vocabulary(
    teacher_kind: str, target_kind: str, tokenizers: dict[str, ByteTokenizer]
) -> None:
    teacher, target = tokenizers[teacher_kind], tokenizers[target_kind]
    maps = VocabularyMap(teacher, target, "mined")
    theirs = [spelled(teacher, i) for i in range(teacher.vocab_size)]
    ours = [spelled(target, i) for i in range(target.vocab_size)]
    for i, part in enumerate(ours):  # of two ids with the same bytes texts hold one
        if part and ours.count(part) > 1 and (maps.whole[theirs.index(part)] if part in theirs else i) != i:
            ours[i] = b""
    inexact = [i for i, part in enumerate(theirs) if part and part not in ours]
    assert len(inexact) > 50
    for i in inexact[:: len(inexact) // 50]:
        distances = [edit_distance(string_of(theirs[i]), string_of(part)) if part else 10**6 for part in ours]
        assert maps.whole[i] == distances.index(min(distances))


@pytest.mark.parametrize("target", ["bytelevel", "normalising"])
@pytest.mark.parametrize("teacher", ["llama", "metaspace", "unigram"])
def test_prefix_is_exact_or_the_first_canonical_token(
    target: str, teacher: str, tokenizers: dict[str, ByteTokenizer]
) -> None:
    t, s = tokenizers[target], tokenizers[teacher]
    maps = VocabularyMap(s, t, "prefix")
    for i in range(0, s.vocab_size, 7):
        if part := spelled(s, i):
            assert maps.whole[i] == first_target_token(t, part)


def test_exact_keeps_equal_bytes_and_drops_the_rest(tokenizers: dict[str, ByteTokenizer]) -> None:
    teacher, target = tokenizers["llama"], tokenizers["bytelevel"]
    maps = VocabularyMap(teacher, target, "exact")
    ours = {spelled(target, i) for i in range(target.vocab_size)} - {b""}
    for i in range(teacher.vocab_size):
        part = spelled(teacher, i)
        expected = part if part in ours else None
        if part:
            assert landing(maps, target, i) == expected
            assert maps.is_exact[i] == (expected is not None)


def test_specials_map_by_role_only(tokenizers: dict[str, ByteTokenizer]) -> None:
    teacher, target = tokenizers["bytelevel"], tokenizers["llama"]
    for projection in ("exact", "mined", "prefix"):
        maps = VocabularyMap(teacher, target, projection)  # type: ignore[arg-type]
        assert maps.whole[teacher.eos_id] == target.eos_id
        others = teacher.special_ids - {teacher.eos_id}
        assert others
        assert all(maps.whole[i] == NOWHERE for i in others)
        reached = set(maps.whole.tolist()) - {NOWHERE, target.eos_id}
        assert not reached & target.special_ids


def test_a_special_is_not_matched_by_its_string() -> None:
    teacher = Greedy([b"a", None, b"</s>"], eos_id=1, special_ids=frozenset({1}))
    target = Greedy([b"a", b"<", b"/", b"s", b">", b"</s>", None], eos_id=5, special_ids=frozenset({5, 6}))
    for projection in ("exact", "mined", "prefix"):
        maps = VocabularyMap(teacher, target, projection)  # type: ignore[arg-type]
        assert maps.whole[1] == 5
        assert maps.whole[2] != 5


def test_a_teacher_without_eos_and_a_target_without_eos_map_it_nowhere() -> None:
    with_eos = Greedy([b"a", None], eos_id=1, special_ids=frozenset({1}))
    without = Greedy([b"a", b"b"])
    assert VocabularyMap(with_eos, without, "prefix").whole.tolist() == [0, NOWHERE]
    assert VocabularyMap(without, with_eos, "prefix").whole.tolist() == [0, NOWHERE]


def test_of_equal_bytes_the_token_that_the_tokenizer_writes_is_meant() -> None:
    """Byte-fallback <0x61> and the letter: both are b"a"."""
    target = Greedy([b"a", b"b", b"a"])
    teacher = Greedy([b"b", b"a", b"a"])
    assert target.encode("a").ids.tolist() == [2]
    assert VocabularyMap(teacher, target, "prefix").whole.tolist() == [1, 2, 2]


def test_bytes_that_are_no_text_go_to_the_longest_token_they_begin_with() -> None:
    first, second = "中".encode()[:1], "中".encode()[:2]
    target = Greedy([first, second, "中".encode(), b"x"])
    teacher = Greedy([second + b"\xad"[:0], second, first + b"\xb9", b"\xff"])
    assert VocabularyMap(teacher, target, "prefix").whole.tolist() == [1, 1, 0, NOWHERE]


def test_ids_of_a_padded_vocabulary_stay_the_same_and_the_padding_goes_nowhere(
    tokenizer_folders: dict[str, Path], tokenizers: dict[str, ByteTokenizer]
) -> None:
    small = tokenizers["llama"]
    padded = ByteTokenizer.load(str(tokenizer_folders["llama"]), vocab_size=small.vocab_size + 64)
    same = list(range(small.vocab_size))
    assert VocabularyMap(small, padded, "prefix").whole.tolist() == same
    assert VocabularyMap(padded, small, "prefix").whole.tolist() == same + [NOWHERE] * 64
    other = VocabularyMap(padded, tokenizers["bytelevel"], "prefix").whole
    assert (other[small.vocab_size :] == NOWHERE).all()


def test_rest_of_a_token_is_mapped_as_text_goes_on_and_a_start_as_text_begins(
    tokenizers: dict[str, ByteTokenizer],
) -> None:
    teacher, target = tokenizers["bytelevel"], tokenizers["llama"]
    maps = VocabularyMap(teacher, target, "prefix")
    token = next(i for i in range(teacher.vocab_size) if spelled(teacher, i) == b" return")
    offset = int(maps.bytes.start[token]) + 3
    maps.resolve(np.array([offset, ~token]))
    inner = target.encode("\nturn").ids[target.encode("\n").ids.size :]
    assert maps.suffix[offset] == inner[0]
    assert not (target.token_bytes[int(maps.suffix[offset])] or b"").startswith(b" ")
    assert maps.at_start[token] == target.encode(" return").ids[0]


def test_a_dummy_prefix_stands_for_nothing_at_the_start(tokenizers: dict[str, ByteTokenizer]) -> None:
    teacher, target = tokenizers["llama"], tokenizers["metaspace"]
    maps = VocabularyMap(teacher, target, "prefix")
    ids = {spelled(teacher, i): i for i in range(teacher.vocab_size)}
    maps.resolve(np.array([~ids[b" the"], ~ids[b" "], ~ids[b"e"]]))
    assert target.token_bytes[int(maps.at_start[ids[b" the"]])] == b" the"
    assert target.token_bytes[int(maps.at_start[ids[b" "]])] == b" "
    assert maps.at_start[ids[b"e"]] == target.encode("e").ids[0]
    onto_bytes = VocabularyMap(teacher, tokenizers["bytelevel"], "prefix")
    onto_bytes.resolve(np.array([~ids[b" the"], ~ids[b" "]]))
    assert tokenizers["bytelevel"].token_bytes[int(onto_bytes.at_start[ids[b" the"]])] == b"the"
    assert onto_bytes.at_start[ids[b" "]] == NOWHERE
