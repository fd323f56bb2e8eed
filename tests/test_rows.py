from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from fusellm_ray.config import CorpusConfig
from fusellm_ray.corpus.rows import IGNORE_INDEX, Row, Segment, ShardReader, row_arrays
from fusellm_ray.corpus.source import Corpus
from fusellm_ray.corpus.tokens import ByteTokenizer
from fusellm_ray.errors import CorpusError, TokenizerError
from tests.tokenizers import KINDS, training_text

pytestmark = pytest.mark.usefixtures("arrow_cache")


@functools.cache
def load(folder: Path) -> ByteTokenizer:
    return ByteTokenizer.load(str(folder))


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tokenizer_folders: dict[str, Path]) -> ByteTokenizer:
    return load(tokenizer_folders[request.param])


def corpus_of(folder: Path, texts: Iterable[str], **settings: Any) -> Corpus:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = {"name": "s", "path": str(path), "streaming": settings.pop("streaming", False)}
    return Corpus.open(CorpusConfig.model_validate({"sources": [source], "shuffle": False, **settings}), 0)


@pytest.mark.parametrize("now", ["short", "é" * 3000])
def test_a_document_that_changed_under_its_cursor_is_named(
    tmp_path: Path, tokenizer_folders: dict[str, Path], now: str
):
    tokenizer = load(tokenizer_folders["bytelevel"])
    reader = ShardReader(corpus_of(tmp_path, ["x " + "word " * 500]), tokenizer, 0, 1, 64)
    while not reader.cursor()["offset"] % 2:
        reader.next_row()
    changed = corpus_of(tmp_path, [now])
    with pytest.raises(CorpusError, match=r"corpus.jsonl:1: no character begins at byte \d+ of its part 0"):
        ShardReader(changed, tokenizer, 0, 1, 64, reader.cursor())


def documents_in(rows: Iterable[Row]) -> list[tuple[str, bytes]]:
    """Name and bytes of each document, its segments put together."""
    found: list[tuple[str, bytes]] = []
    is_new = True
    for segment in (segment for row in rows for segment in row.segments):
        if is_new:
            found.append((segment.document, b""))
        name, data = found[-1]
        assert segment.document == name
        found[-1] = (name, data + segment.text)
        is_new = segment.ends_document
    return found


def check_segment(tokenizer: ByteTokenizer, segment: Segment) -> None:
    text = segment.text.decode()
    num_bos = tokenizer.bos_id is not None
    assert segment.ids.dtype == segment.ends.dtype == np.int32
    assert len(segment.ids) == len(segment.ends) == segment.num_positions + 1
    assert (np.diff(segment.ends, prepend=0) >= 0).all()
    assert segment.ends[-1] == len(segment.text) > 0
    if num_bos:
        assert (segment.ids[0], segment.ends[0]) == (tokenizer.bos_id, 0)
    if segment.ends_document and tokenizer.eos_id is not None:
        assert segment.ids[-1] == tokenizer.eos_id
        assert segment.ends[-2] == len(segment.text)
    body = segment.ids[num_bos : len(segment.ids) - segment.ends_document]
    assert not set(body.tolist()) & tokenizer.special_ids
    first = tokenizer.encode(text).ids[0]
    assert body[0] == first  # as the start of a text: with SentencePiece's space before it


def long_texts() -> list[str]:
    english = "".join(training_text()[:400])
    return [
        "one",
        english[:3000],
        "x",
        "今天天气很好,我们去公园。" * 40,
        "é" * 500,
        "😀" * 70,
        english[3000:3900],
    ]


# ---------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("row_tokens", [8, 13, 64, 500])
def test_segments_put_together_are_the_documents(
    tmp_path: Path, tokenizer: ByteTokenizer, row_tokens: int
) -> None:
    texts = long_texts()
    reader = ShardReader(corpus_of(tmp_path, texts), tokenizer, 0, 1, row_tokens)
    rows: list[Row] = []
    while reader.epochs["s"] < 1:
        rows.append(reader.next_row())
    found = documents_in(rows)[: len(texts)]
    assert [data.decode() for _, data in found] == texts
    assert [name for name, _ in found] == [f"{tmp_path}/corpus.jsonl:{i + 1}" for i in range(len(texts))]
    for row in rows:
        assert 2 <= sum(len(segment.ids) for segment in row.segments) <= row_tokens
        for segment in row.segments:
            check_segment(tokenizer, segment)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=["Cs", "Cn", "Cc"]) | st.sampled_from(" \n▁é"), min_size=1),
        min_size=1,
    ),
    row_tokens=st.integers(32, 80),
)
def test_segments_put_together_are_any_documents(
    tmp_path: Path, tokenizer: ByteTokenizer, texts: list[str], row_tokens: int
) -> None:
    reader = ShardReader(corpus_of(tmp_path, texts), tokenizer, 0, 1, row_tokens)
    rows: list[Row] = []
    while sum(segment.ends_document for row in rows for segment in row.segments) < len(texts):
        rows.append(reader.next_row())
    assert [data.decode() for _, data in documents_in(rows)[: len(texts)]] == texts


def test_rows_are_filled(tmp_path: Path, tokenizer: ByteTokenizer) -> None:
    reader = ShardReader(corpus_of(tmp_path, training_text()), tokenizer, 0, 1, 512)
    used = sum(len(segment.ids) for _ in range(40) for segment in reader.next_row().segments)
    assert used / (40 * 512) > 0.985


def test_a_document_that_fits_is_one_segment_with_its_own_encoding(
    tmp_path: Path, tokenizer: ByteTokenizer
) -> None:
    texts = ["A document.", " another", "三"]
    row = ShardReader(corpus_of(tmp_path, texts), tokenizer, 0, 1, 200).next_row()
    for text, segment in zip(texts, row.segments, strict=False):
        whole = tokenizer.sequence(text, ends_document=True)
        assert segment.ids.tolist() == whole.ids.tolist()
        assert segment.ends.tolist() == whole.ends.tolist()


def test_a_continued_piece_starts_like_a_text(tmp_path: Path, tokenizer_folders: dict[str, Path]) -> None:
    tokenizer = load(tokenizer_folders["llama"])
    text = "self " * 200
    reader = ShardReader(corpus_of(tmp_path, [text]), tokenizer, 0, 1, 32)
    pieces = [reader.next_row().segments[0] for _ in range(4)]
    for piece in pieces:
        own = tokenizer.sequence(piece.text.decode(), piece.ends_document)
        assert piece.ids.tolist() == own.ids.tolist()
        assert piece.ends.tolist() == own.ends.tolist()


def test_one_token_documents_make_rows(tmp_path: Path) -> None:
    fast = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    plain = ByteTokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=fast), "plain")
    row = ShardReader(corpus_of(tmp_path, ["a", "", "b"]), plain, 0, 1, 8).next_row()
    assert [segment.text for segment in row.segments] == [b"a", b"b"] * 3 + [b"a"]  # a lone place is no use
    assert [segment.num_positions for segment in row.segments] == [0] * 7
    with_eos = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>")
    row = ShardReader(corpus_of(tmp_path, ["a", "", "b"]), ByteTokenizer(with_eos, "e"), 0, 1, 8).next_row()
    assert [segment.ids.tolist() for segment in row.segments] == [[0, 2], [1, 2]] * 2


def test_eos_does_not_go_alone_into_the_next_row(tmp_path: Path) -> None:
    fast = Tokenizer(models.BPE({"a": 0}, []))
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>")
    for length in range(6, 12):
        reader = ShardReader(corpus_of(tmp_path, ["a" * length]), ByteTokenizer(hf, "e"), 0, 1, 8)
        rows = [reader.next_row() for _ in range(9)]
        assert {data for _, data in documents_in(rows)[:-1]} == {b"a" * length}
        assert min(segment.num_positions for row in rows for segment in row.segments) >= 1


def test_a_large_document_is_read_piece_by_piece(tmp_path: Path, tokenizer_folders: dict[str, Path]) -> None:
    text = "".join(itertools.islice(itertools.cycle(["word é ", "lines\n", "三 "]), 600_000))
    assert len(text.encode()) > 3_500_000
    tokenizer = load(tokenizer_folders["bytelevel"])
    reader = ShardReader(corpus_of(tmp_path, [text, "end"]), tokenizer, 0, 1, 4096)
    rows: list[Row] = []
    cursors = []
    while reader.epochs["s"] < 1:
        cursors.append(reader.cursor())
        rows.append(reader.next_row())
    assert documents_in(rows)[0][1].decode() == text
    assert max(len(json.dumps(cursor)) for cursor in cursors) < 250
    middle = len(rows) // 2
    resumed = ShardReader(corpus_of(tmp_path, [text, "end"]), tokenizer, 0, 1, 4096, cursors[middle])
    assert same_rows([resumed.next_row() for _ in range(3)], rows[middle : middle + 3])


def test_a_character_longer_than_a_row_is_refused(tmp_path: Path) -> None:
    fast = Tokenizer(models.BPE({char: i for i, char in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    fast.normalizer = normalizers.NFKC()
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = ByteTokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=fast), "nfkc")
    reader = ShardReader(corpus_of(tmp_path, ["a \ufdfa b"]), tokenizer, 0, 1, 8)
    assert reader.next_row().segments[0].text == b"a "
    with pytest.raises(CorpusError, match=r"corpus.jsonl:1: one character takes more tokens than a row of 8"):
        reader.next_row()


def test_a_text_the_tokenizer_cannot_cover_is_named(tmp_path: Path) -> None:
    fast = Tokenizer(models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>"))
    tokenizer = ByteTokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=fast), "tiny")
    reader = ShardReader(corpus_of(tmp_path, ["aaaaaaaa", "a\nb"]), tokenizer, 0, 1, 8)
    reader.next_row()
    with pytest.raises(TokenizerError, match=r"document .*corpus.jsonl:2: tiny: token '<unk>'"):
        reader.next_row()


# ---------------------------------------------------------------------------------------- resuming


def same_rows(left: list[Row], right: list[Row]) -> bool:
    def plain(rows: list[Row]) -> list[Any]:
        return [
            (s.text, s.ids.tolist(), s.ends.tolist(), s.ends_document, s.domain, s.document)
            for row in rows
            for s in row.segments
        ]

    return plain(left) == plain(right) and [len(r.segments) for r in left] == [len(r.segments) for r in right]


@pytest.mark.parametrize("row_tokens", [8, 50, 300])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_reader_goes_on_from_any_cursor_with_the_same_rows(
    tmp_path: Path, tokenizer: ByteTokenizer, row_tokens: int, streaming: bool
) -> None:
    corpus = corpus_of(tmp_path, long_texts(), shuffle=True, streaming=streaming)
    reader = ShardReader(corpus, tokenizer, 1, 3, row_tokens)
    cursors, rows = [], []
    for _ in range(60):
        cursors.append(json.loads(json.dumps(reader.cursor())))
        rows.append(reader.next_row())
    for start in range(0, 60, 7):
        resumed = ShardReader(corpus, tokenizer, 1, 3, row_tokens, cursors[start])
        assert resumed.cursor() == cursors[start]
        assert same_rows([resumed.next_row() for _ in range(60 - start)], rows[start:])


def test_batches_do_not_depend_on_the_number_of_ranks(
    tmp_path: Path, tokenizer_folders: dict[str, Path]
) -> None:
    corpus = corpus_of(tmp_path, training_text(), shuffle=True)
    tokenizer, batch_rows, steps = load(tokenizer_folders["bytelevel"]), 6, 4

    def batches(num_ranks: int) -> list[list[Row]]:
        ranks = [
            {
                shard: ShardReader(corpus, tokenizer, shard, batch_rows, 64)
                for shard in range(r, batch_rows, num_ranks)
            }
            for r in range(num_ranks)
        ]
        steps_rows = []
        for _ in range(steps):
            rows = {shard: reader.next_row() for rank in ranks for shard, reader in rank.items()}
            steps_rows.append([rows[shard] for shard in range(batch_rows)])
        return steps_rows

    one = batches(1)
    for num_ranks in (2, 3, 6):
        assert all(same_rows(a, b) for a, b in zip(one, batches(num_ranks), strict=True))


def test_shards_share_out_the_documents(tmp_path: Path, tokenizer_folders: dict[str, Path]) -> None:
    texts = [f"document {i}" for i in range(20)]
    corpus = corpus_of(tmp_path, texts, shuffle=True)
    tokenizer, seen = load(tokenizer_folders["bytelevel"]), []
    for shard in range(4):
        reader = ShardReader(corpus, tokenizer, shard, 4, 512)
        seen += [segment.text.decode() for segment in reader.next_row().segments[:5]]
    assert sorted(seen) == sorted(texts)


# ------------------------------------------------------------------------------------------ arrays


def segment(ids: list[int], ends: list[int]) -> Segment:
    text = b"x" * ends[-1]
    return Segment(text, np.array(ids, np.int32), np.array(ends, np.int32), True, "s", "d")


def test_row_arrays_lays_segments_out() -> None:
    row = Row((segment([1, 5, 6, 2], [0, 3, 4, 4]), segment([7], [2]), segment([8, 2], [1, 1])))
    arrays = row_arrays(row, 10, pad_id=9)
    no = IGNORE_INDEX
    assert arrays.input_ids.tolist() == [1, 5, 6, 2, 7, 8, 2, 9, 9, 9]
    assert arrays.position_ids.tolist() == [0, 1, 2, 3, 0, 0, 1, 0, 1, 2]
    assert arrays.labels.tolist() == [5, 6, 2, no, no, 2, no, no, no, no]
    assert arrays.gold_bytes.tolist() == [3, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    assert arrays.segment.tolist() == [0, 0, 0, 0, 1, 2, 2, -1, -1, -1]
    assert [a.dtype for a in (arrays.input_ids, arrays.position_ids, arrays.labels)] == [np.int64] * 3
    assert arrays.gold_bytes.dtype == arrays.segment.dtype == np.int32


def test_row_arrays_agree_with_the_segments(tmp_path: Path, tokenizer: ByteTokenizer) -> None:
    reader = ShardReader(corpus_of(tmp_path, long_texts()), tokenizer, 0, 1, 64)
    for _ in range(30):
        row = reader.next_row()
        arrays = row_arrays(row, 64, pad_id=0)
        labelled = arrays.labels != IGNORE_INDEX
        assert labelled.sum() == sum(s.num_positions for s in row.segments)
        assert (arrays.labels[:-1] == arrays.input_ids[1:])[labelled[:-1]].all()
        for index, s in enumerate(row.segments):
            inside = arrays.segment == index
            assert arrays.input_ids[inside].tolist() == s.ids.tolist()
            assert arrays.position_ids[inside].tolist() == list(range(len(s.ids)))
            assert arrays.gold_bytes[inside].sum() == len(s.text) - s.ends[0]
