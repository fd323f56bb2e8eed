from __future__ import annotations

import gzip
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import combinations, islice, pairwise
from pathlib import Path
from typing import Any

import datasets
import fsspec.compression
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusellm_ray.config import CorpusConfig, SourceConfig
from fusellm_ray.corpus import source as source_module
from fusellm_ray.corpus.source import ArrowSource, Corpus, Document, StreamSource, permuted
from fusellm_ray.errors import CorpusError

pytestmark = pytest.mark.usefixtures("arrow_cache")


def opened(*sources: dict[str, Any], shuffle: bool = False, seed: int = 0) -> Corpus:
    named = [{"name": f"s{i}", **source} for i, source in enumerate(sources)]
    return Corpus.open(CorpusConfig.model_validate({"sources": named, "shuffle": shuffle}), seed)


def jsonl(path: Path, texts: Iterable[object], field: str = "text") -> str:
    path.write_text("".join(json.dumps({field: text, "other": 1}) + "\n" for text in texts))
    return str(path)


def texts_of(documents: Iterable[Document], count: int) -> list[str]:
    return [document.text for document in islice(documents, count)]


def fails(message: str, *sources: dict[str, Any]) -> None:
    with pytest.raises(CorpusError, match=message):
        opened(*sources)


# --------------------------------------------------------------------------------------- formats


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    texts = ["one", "zwei\nLinien\r\n", "三 😀"]
    (tmp_path / "text").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "text" / f"{i}.md").write_bytes(text.encode())
    jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    table = pa.table({"text": texts, "other": [1, 2, 3]})
    pa.parquet.write_table(table, tmp_path / "c.parquet")
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved")
    split = datasets.Dataset.from_dict({"text": texts})
    datasets.DatasetDict(train=split, other=split.select([0])).save_to_disk(tmp_path / "splits")
    sources: list[dict[str, Any]] = [
        {"path": str(tmp_path / "text")},
        {"path": str(tmp_path / "text" / "*.md")},
        {"path": str(tmp_path / "a.jsonl")},
        {"path": str(tmp_path / "b.jsonl.gz")},
        {"path": str(tmp_path / "c.parquet")},
        {"dataset": str(tmp_path / "saved")},
        {"dataset": str(tmp_path / "splits")},
    ]
    for source in sources:
        for streaming in (False, True):
            corpus = opened({**source, "streaming": streaming})
            assert texts_of(corpus.documents(0, 1), 7) == [*texts, *texts, texts[0]]


def test_documents_say_where_they_came_from(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("text")
    jsonl(tmp_path / "two.jsonl", ["", "line two"])
    datasets.Dataset.from_dict({"text": ["", "row one"]}).save_to_disk(tmp_path / "saved")
    for streaming in (False, True):
        for source, name in (
            ({"path": str(tmp_path / "one.txt")}, f"{tmp_path}/one.txt"),
            ({"path": str(tmp_path / "two.jsonl")}, f"{tmp_path}/two.jsonl:2"),
            ({"dataset": str(tmp_path / "saved")}, f"{tmp_path}/saved[1]"),
        ):
            document = next(opened({**source, "streaming": streaming}).documents(0, 1))
            assert (document.domain, document.name, document.epoch) == ("s0", name, 0)


def test_a_folder_is_read_with_its_subfolders_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a/1.txt", ".git/config.txt", "a/.hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts_of(opened({"path": str(tmp_path)}).documents(0, 1), 3) == ["a/1.txt", "b/2.txt", "a/1.txt"]


def test_an_explicit_format_picks_a_folders_files(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", ["record"])
    (tmp_path / "README.md").write_text("not a record")
    fails("holds files of several formats .*1 jsonl", {"path": str(tmp_path)})
    corpus = opened({"path": str(tmp_path), "format": "jsonl"})
    assert texts_of(corpus.documents(0, 1), 2) == ["record", "record"]


@pytest.mark.parametrize("name", ["a.csv", "a.tar.gz", "B.ARROW"])
def test_a_file_of_a_format_that_is_not_read_is_refused_unless_it_is_called_text(
    tmp_path: Path, name: str
) -> None:
    content = b"id,body"
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    for path, advice in (
        (tmp_path, "a glob pattern that leaves it out"),
        (tmp_path / name, "or set format: text"),
    ):
        for streaming in (False, True):
            says = f"{name}: .* is not read, only JSONL, Parquet and text; .*{advice}"
            fails(says, {"path": str(path), "streaming": streaming})
    corpus = opened({"path": str(tmp_path / name), "format": "text"})
    assert next(corpus.documents(0, 1)).text == "id,body"


def test_endings_of_text_are_read_as_text(tmp_path: Path) -> None:
    for name in ("a.py", "b.rst", "c.html", "d", "e.v2"):
        (tmp_path / name).write_text(name)
    assert texts_of(opened({"path": str(tmp_path)}).documents(0, 1), 5) == [
        "a.py",
        "b.rst",
        "c.html",
        "d",
        "e.v2",
    ]


def test_a_changed_file_is_read_anew_and_an_unchanged_one_is_not(tmp_path: Path, arrow_cache: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ["old"])
    before = opened({"path": path})
    assert opened({"path": path}).identity() == before.identity()
    assert len(list(arrow_cache.glob("generator/*"))) == 1
    jsonl(tmp_path / "a.jsonl", ["new text"])
    after = opened({"path": path})
    assert next(after.documents(0, 1)).text == "new text"
    assert after.identity() != before.identity()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["path", "saved"])
def test_the_identity_changes_with_the_order_and_the_ends_of_texts(
    tmp_path: Path, kind: str, streaming: bool
) -> None:
    def identity(*texts: str) -> dict[str, Any]:
        if kind == "path":
            source = {"path": jsonl(tmp_path / "a.jsonl", texts)}
        else:
            shutil.rmtree(tmp_path / "saved", ignore_errors=True)
            datasets.Dataset.from_dict({"text": list(texts)}).save_to_disk(tmp_path / "saved")
            source = {"dataset": str(tmp_path / "saved")}
        return opened({**source, "streaming": streaming}).identity()

    first = identity("ab", "cd", "ef")
    assert identity("ab", "cd", "ef") == first == json.loads(json.dumps(first))
    for texts in (("ef", "cd", "ab"), ("abc", "d", "ef"), ("ab", "cd", "eg")):
        assert identity(*texts) != first


@given(
    texts=st.lists(st.text(max_size=5), min_size=1).filter(any),
    cuts=st.lists(st.integers(0, 20)),
    is_large=st.booleans(),
)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_equal_texts_have_one_identity_however_they_lie_in_memory(
    texts: list[str], cuts: list[int], is_large: bool
) -> None:
    config = SourceConfig(name="s", dataset="d")
    bounds = [0, *sorted(min(cut, len(texts)) for cut in cuts), len(texts)]
    kind = pa.large_string() if is_large else pa.string()
    padded = pa.array(["before", *texts], kind)
    chunks = [padded[1 + start : 1 + stop] for start, stop in pairwise(bounds)]
    apart = datasets.Dataset(pa.table({"text": pa.chunked_array(chunks, kind)}))
    whole = datasets.Dataset(pa.table({"text": pa.array(texts)}))
    wanted = ArrowSource(config, whole, "text", []).identity()
    assert ArrowSource(config, apart, "text", []).identity() == wanted


def test_the_identity_changes_with_weights_field_and_shuffling(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": "x", "b": "y"}\n')
    path = str(tmp_path / "a.jsonl")
    seen = [
        opened({"path": path, "field": "a"}).identity(),
        opened({"path": path, "field": "b"}).identity(),
        opened({"path": path, "field": "a"}, shuffle=True).identity(),
        opened({"path": path, "field": "a", "weight": 2}).identity(),
        opened({"path": path, "field": "a", "streaming": True}).identity(),
    ]
    assert all(a != b for a, b in combinations(seen, 2))


# ---------------------------------------------------------------------------------- shards and order


@pytest.mark.parametrize("streaming", [False, True])
def test_document_i_belongs_to_shard_i_modulo_shards(tmp_path: Path, streaming: bool) -> None:
    path = jsonl(tmp_path / "a.jsonl", [f"d{i}" if i % 3 else "" for i in range(15)])
    kept = [f"d{i}" for i in range(15) if i % 3]  # ten documents with text
    corpus = opened({"path": path, "streaming": streaming})
    for shard in range(4):
        own = kept[shard::4]
        assert texts_of(corpus.documents(shard, 4), 2 * len(own)) == own + own


@pytest.mark.parametrize("streaming", [False, True])
def test_a_source_with_fewer_documents_than_shards_wraps(tmp_path: Path, streaming: bool) -> None:
    corpus = opened({"path": jsonl(tmp_path / "a.jsonl", ["a", "b", "c"]), "streaming": streaming})
    for shard in range(8):
        assert texts_of(corpus.documents(shard, 8), 3) == ["abc"[shard % 3]] * 3


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("num_documents", [1, 3, 8])
def test_shards_that_share_documents_begin_at_different_places_of_the_first(
    tmp_path: Path, num_documents: int, streaming: bool
) -> None:
    texts = ["".join(f"{i}.{n} é" for n in range(9)) for i in range(num_documents)]
    path = jsonl(tmp_path / "a.jsonl", texts)
    corpus = opened({"path": path, "streaming": streaming})
    firsts = []
    for shard in range(8):
        whole = texts[shard % num_documents]
        sharing = range(shard % num_documents, 8, num_documents)
        first, *others = texts_of(corpus.documents(shard, 8), 3)
        assert first == whole[len(whole) * sharing.index(shard) // len(sharing) :]
        assert others == [whole] * 2
        firsts.append(first)
    assert len(set(firsts)) == 8


@pytest.mark.parametrize("kept_chars", [1 << 20, 0])
def test_a_stream_is_read_once_for_all_shards_that_keep_together(
    tmp_path: Path, kept_chars: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "_WINDOW_CHARS", kept_chars)
    read: list[int] = []

    class Counted(StreamSource):
        def records(self, start: int) -> Iterator[tuple[str, str]]:
            for record in super().records(start):
                read.append(start)
                yield record

    path = jsonl(tmp_path / "a.jsonl", [f"d{i}" for i in range(40)])
    config = CorpusConfig.model_validate({"sources": [{"name": "s", "path": path, "streaming": True}]})
    source = Counted(config.sources[0])
    corpus = Corpus([source], shuffle=False, seed=0)
    readers = [corpus.documents(shard, 4) for shard in range(4)]
    read.clear()
    for turn in range(15):  # ten documents a shard and epoch
        for shard in (2, 0, 3, 1):
            assert next(readers[shard]).text == f"d{(4 * turn + shard) % 40}"
    if kept_chars:
        assert len(read) == 60
    read.clear()
    resumed = [corpus.documents(shard, 4, reader.cursor()) for shard, reader in enumerate(readers)]
    del readers
    for turn in range(15, 22):
        for shard in range(4):
            assert next(resumed[shard]).text == f"d{(4 * turn + shard) % 40}"


def test_each_epoch_has_its_own_order_and_every_document_once(tmp_path: Path) -> None:
    corpus = opened({"path": jsonl(tmp_path / "a.jsonl", map(str, range(50)))}, shuffle=True)
    readers = [corpus.documents(shard, 5) for shard in range(5)]
    epochs = [[text for reader in readers for text in texts_of(reader, 10)] for _ in range(3)]
    for epoch in epochs:
        assert sorted(map(int, epoch)) == list(range(50))
    assert len(set(map(tuple, epochs))) == 3
    assert readers[0].epochs == {"s0": 2}
    assert next(readers[0]).epoch == 3


def test_the_seed_draws_the_order(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", map(str, range(30)))
    orders = [texts_of(opened({"path": path}, shuffle=True, seed=s).documents(0, 1), 30) for s in (0, 0, 1)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


@given(count=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permuted_is_a_permutation(count: int, key: int) -> None:
    assert sorted(permuted(i, count, key) for i in range(count)) == list(range(count))


def test_permuted_sends_every_index_everywhere_alike() -> None:
    where = np.array([[permuted(i, 10, key * 7919) for i in range(10)] for key in range(4000)])
    for i in range(10):
        assert (np.abs(np.bincount(where[:, i], minlength=10) - 400) < 100).all()  # 5 standard deviations
    followers = Counter(map(tuple, where[:, :2]))
    assert len(followers) == 90


# ------------------------------------------------------------------------------------------ weights


def test_weights_are_shares_of_bytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    short = jsonl(tmp_path / "short.jsonl", ["é" * n for n in rng.integers(1, 50, 40)])
    long = jsonl(tmp_path / "long.jsonl", ["x" * n for n in rng.integers(500, 1500, 10)])
    reader = opened({"path": short, "weight": 3}, {"path": long, "weight": 1}).documents(0, 1)
    num_bytes: Counter[str] = Counter()
    for document in islice(reader, 3000):
        num_bytes[document.domain] += len(document.text.encode())
        if sum(num_bytes.values()) > 10_000:  # never further off than a document
            assert abs(num_bytes["s0"] / 3 - num_bytes["s1"]) <= 1500
    assert num_bytes["s0"] / sum(num_bytes.values()) == pytest.approx(0.75, abs=0.02)


def test_sources_take_turns_without_random_numbers(tmp_path: Path) -> None:
    a, b = jsonl(tmp_path / "a.jsonl", ["aa"]), jsonl(tmp_path / "b.jsonl", ["bb"])
    corpus = opened({"path": a, "weight": 2}, {"path": b})
    assert "".join(t[0] for t in texts_of(corpus.documents(0, 1), 9)) == "abaabaaba"


# ------------------------------------------------------------------------------------------ cursors


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("num_shards", [1, 3, 9])
def test_a_reader_goes_on_from_any_cursor(tmp_path: Path, shuffle: bool, num_shards: int) -> None:
    mixed = jsonl(tmp_path / "a.jsonl", [f"a{i}" * i for i in range(7)])
    stream = jsonl(tmp_path / "b.jsonl", [f"b{i}" * (i % 3) for i in range(11)])
    (tmp_path / "one.txt").write_text("one file of text")
    sources = (
        {"path": mixed},
        {"path": stream, "streaming": True, "weight": 2},
        {"path": str(tmp_path / "one.txt")},
        {"path": str(tmp_path / "one.txt"), "streaming": True},
    )
    corpus = opened(*sources, shuffle=shuffle)
    for shard in range(num_shards):
        reader = corpus.documents(shard, num_shards)
        cursors, documents = [], []
        for _ in range(40):
            cursors.append(json.loads(json.dumps(reader.cursor())))
            documents.append(next(reader))
        again = opened(*sources, shuffle=shuffle)
        for start, cursor in enumerate(cursors):
            assert len(json.dumps(cursor)) < 400
            resumed = again.documents(shard, num_shards, cursor)
            assert list(islice(resumed, 40 - start)) == documents[start:]


def test_a_cursor_of_another_shard_or_corpus_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ["a", "b"])
    cursor = opened({"path": path}).documents(0, 2).cursor()
    with pytest.raises(CorpusError, match=r"the cursor is of shard \[0, 2\]"):
        opened({"path": path}).documents(1, 2, cursor)
    with pytest.raises(CorpusError, match=r"sources \['s0'\], this reader .* sources \['s0', 's1'\]"):
        opened({"path": path}, {"path": path}).documents(0, 2, cursor)


def test_empty_documents_are_skipped_and_counted(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ["", "a", "", "bé", ""])
    corpus = opened({"path": path})
    (source,) = corpus.sources
    assert (source.num_documents, source.num_empty, source.num_bytes) == (2, 3, 4)
    assert texts_of(corpus.documents(0, 1), 3) == ["a", "bé", "a"]
    reader = opened({"path": path, "streaming": True}).documents(0, 1)
    assert texts_of(reader, 3) == ["a", "bé", "a"]
    assert reader.cursor()["sources"]["s0"]["empty"] == 4  # three in the first epoch, one in the second


# ------------------------------------------------------------------------------------------- errors


def test_a_missing_path_says_what_was_looked_for(tmp_path: Path) -> None:
    fails(f"source 's0': path .*no such file or folder.*looked for {tmp_path}/no", {"path": f"{tmp_path}/no"})
    fails("no match as a pattern", {"path": f"{tmp_path}/*.jsonl"})
    fails("folder without files", {"path": str(tmp_path)})
    fails("of format parquet", {"path": str(tmp_path), "format": "parquet"})
    fails("no such folder", {"dataset": f"{tmp_path}/no"})
    fails("not written by Dataset.save_to_disk", {"dataset": str(tmp_path)})


@pytest.mark.parametrize("streaming", [False, True])
def test_a_corpus_without_text_is_refused(tmp_path: Path, streaming: bool) -> None:
    for name, content in (("a.jsonl", b'{"text": ""}\n'), ("b.jsonl", b"\n\n"), ("c.txt", b"")):
        (tmp_path / name).write_bytes(content)
        fails("source 's0': .*any text", {"path": str(tmp_path / name), "streaming": streaming})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x", "id": 3}', r"a.jsonl:3: no field 'text'; the record's keys are 'body', 'id'"),
        ('{"text": 7}', "a.jsonl:3: field 'text' is a number, not a string"),
        ('{"text": null}', "a.jsonl:3: field 'text' is null"),
        ('{"text": ["x"]}', "a.jsonl:3: field 'text' is a list"),
        ('["text"]', "a.jsonl:3: a list where one JSON object a line is expected"),
        ('{"text": "x"', "a.jsonl:3: not JSON .* at column 13"),
        ("[" * 100_000, "a.jsonl:3: JSON that is nested too deeply"),
        ('{"text": "x\\ud83d"}', "a.jsonl:3: field 'text' has an unpaired surrogate at character 1"),
    ],
)
def test_a_bad_record_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n\n' + line + "\n")
    fails("source 's0': .*" + message, {"path": str(tmp_path / "a.jsonl")})
    streamed = opened({"path": str(tmp_path / "a.jsonl"), "streaming": True}).documents(0, 1)
    assert next(streamed).text == "fine"
    with pytest.raises(CorpusError, match=message):
        next(streamed)


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("é".encode() + b"abc\xff")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    fails(r"a.txt: byte 5 \(0xff\) is not UTF-8; convert", {"path": str(tmp_path / "a.txt")})
    fails(r"b.jsonl: byte 24 \(0xe9\) is not UTF-8", {"path": str(tmp_path / "b.jsonl")})
    broken = pa.array([b"ok", b"a\xff"], pa.binary()).view(pa.string())
    pa.parquet.write_table(pa.table({"text": broken}), tmp_path / "c.parquet")
    fails("c.parquet:2: field 'text' is not UTF-8 at its byte 1", {"path": str(tmp_path / "c.parquet")})


def test_a_column_that_is_missing_or_no_string_is_named(tmp_path: Path) -> None:
    table = pa.table({"body": ["x", "y"], "id": [1, 2], "gaps": ["x", None]})
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    for source in ({"path": str(tmp_path / "a.parquet")}, {"dataset": str(tmp_path / "saved")}):
        fails("no field 'text'; its columns are 'body', 'id', 'gaps'", source)
        fails("field 'id' is int64, not a string", {**source, "field": "id"})
    fails("a.parquet:2: field 'gaps' is null", {"path": str(tmp_path / "a.parquet"), "field": "gaps"})
    fails("field 'gaps' of row 1 is null", {"dataset": str(tmp_path / "saved"), "field": "gaps"})


def test_a_file_that_is_not_what_its_ending_says_is_named_with_its_cause(tmp_path: Path) -> None:
    for name in ("a.parquet", "a.jsonl.gz"):
        (tmp_path / name).write_bytes(b"neither of the two")
        with pytest.raises(CorpusError, match=f"{name}: cannot be read as") as caught:
            opened({"path": str(tmp_path / name)})
        assert caught.value.__cause__ is not None


@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_a_compression_that_nothing_installed_reads_is_named(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(fsspec.compression.compr, "zstd", raising=False)
    path = tmp_path / f"a.{ending}.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd")
    fails("zst: zstandard, which reads it, is not installed: pip install zstandard", {"path": str(path)})


def test_an_unknown_split_is_named(tmp_path: Path) -> None:
    split = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict(train=split).save_to_disk(tmp_path / "saved")
    fails(r"no split 'test'; it has train", {"dataset": str(tmp_path / "saved"), "split": "test"})


def test_a_dataset_that_cannot_be_loaded_keeps_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for streaming in (False, True):
        with pytest.raises(CorpusError, match="source 's0': dataset 'nobody/nothing'") as caught:
            opened({"dataset": "nobody/nothing", "streaming": streaming})
        assert caught.value.__cause__ is not None


def test_opening_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    opened({"path": jsonl(tmp_path / "a.jsonl", ["a"])})
    (tmp_path / "b.jsonl").write_text("{}\n")
    fails("no field", {"path": str(tmp_path / "b.jsonl")})
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()
