"""Sources → documents, sharded and resumable without end.

    files ── checked, converted once to Arrow ──┐
    hub or saved dataset (Arrow) ───────────────┴ random access ──┐
    streaming dataset or files ───────────────────── in order ────┴ shard i of n → documents

The order is a function of the sources, the seed and the number of shards alone. Document i of a source,
counted without empty documents and in the epoch's order, belongs to shard i % n. A source with fewer
documents than shards is cut into as many shards as it has documents, and shard i reads shard i % that number:
of c shards that so read the same, each begins at another c-th of its first document, and goes on with whole ones.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakSet

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fusellm_ray.config import CorpusConfig, SourceConfig
from fusellm_ray.corpus.files import check_column, checked_text, find_files, read_records, sampled_digest
from fusellm_ray.errors import CorpusError

_SCAN_ROWS = 10_000
_WINDOW_CHARS = 64 << 20
"""Of a stream's records, kept for shards that have yet to take them."""
_FEISTEL_ROUNDS = 8
_MASK64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Document:
    text: str
    domain: str
    """The source's name."""
    name: str
    """Where it came from, for errors: "data.jsonl:17"."""
    epoch: int = 0
    """Times its source had been read to the end before."""


class Corpus:
    """Opened sources.

    Example:
        corpus = Corpus.open(config.corpus, seed=0)
        documents = corpus.documents(shard=3, num_shards=8)
        document = next(documents)
        again = corpus.documents(3, 8, documents.cursor())   # goes on with the next document
    """

    def __init__(self, sources: list[ArrowSource | StreamSource], shuffle: bool, seed: int) -> None:
        self.sources = sources
        self._shuffle = shuffle
        self._seed = seed

    @classmethod
    def open(cls, config: CorpusConfig, seed: int) -> Corpus:
        """Open and check all sources; local files are converted to Arrow in the datasets cache, once.

        Raises:
            CorpusError: a source is missing or empty, or a record lacks its field, is no string or no UTF-8.
        """
        return cls([_open_source(source) for source in config.sources], config.shuffle, seed)

    def identity(self) -> dict[str, Any]:
        """What the documents and their order depend on besides the seed; JSON-able. Reads all text but streams'."""
        return {
            "shuffle": self._shuffle,
            "order": [source.name for source in self.sources],
            "sources": {source.name: source.identity() for source in self.sources},
        }

    def documents(
        self, shard: int, num_shards: int, cursor: Mapping[str, Any] | None = None
    ) -> DocumentReader:
        """Shard `shard` of `num_shards`, from its start or from where a reader's `cursor()` was taken."""
        return DocumentReader(self.sources, shard, num_shards, self._seed if self._shuffle else None, cursor)


class DocumentReader:
    """One shard's documents, for ever; next comes the source that is furthest behind its share of bytes."""

    def __init__(
        self,
        sources: list[ArrowSource | StreamSource],
        shard: int,
        num_shards: int,
        seed: int | None,
        cursor: Mapping[str, Any] | None,
    ) -> None:
        self._place = [shard, num_shards]
        self._sources = sources
        states: Mapping[str, Any] = {}
        if cursor is not None:
            names = sorted(source.name for source in sources)
            if cursor["place"] != self._place or sorted(cursor["sources"]) != names:
                raise CorpusError(
                    f"the cursor is of shard {cursor['place']} and sources {sorted(cursor['sources'])}, "
                    f"this reader of shard {self._place} and sources {names}; "
                    "resume with the configuration of the first start"
                )
            states = cursor["sources"]
        self._shards = [source.shard(shard, num_shards, seed, states.get(source.name)) for source in sources]

    def __iter__(self) -> DocumentReader:
        return self

    def __next__(self) -> Document:
        behind = min(
            range(len(self._sources)),
            key=lambda i: self._shards[i].state["bytes"] / self._sources[i].weight,
        )
        shard = self._shards[behind]
        text, name, epoch = shard.next()
        if not shard.state["bytes"]:
            text = _from_own_place(text, self._place, shard.stride)
        shard.state["bytes"] += len(text) if text.isascii() else len(text.encode())
        return Document(text, self._sources[behind].name, name, epoch)

    def cursor(self) -> dict[str, Any]:
        """Small and JSON-able; a reader made from it continues with the next document."""
        states = zip(self._sources, self._shards, strict=True)
        return {"place": self._place, "sources": {source.name: dict(shard.state) for source, shard in states}}

    @property
    def epochs(self) -> dict[str, int]:
        """Complete passes through this shard of each source."""
        return {s.name: shard.state["epoch"] for s, shard in zip(self._sources, self._shards, strict=True)}


def _from_own_place(text: str, place: list[int], stride: int) -> str:
    """What a shard reads of its first document, which all shards of one remainder by `stride` begin with."""
    shard, num_shards = place
    num_sharing = len(range(shard % stride, num_shards, stride))
    return text[len(text) * (shard // stride) // num_sharing :]


# ------------------------------------------------------------------------------------ random access


class ArrowSource:
    """A memory-mapped dataset whose documents can be read in any order."""

    def __init__(self, config: SourceConfig, dataset: datasets.Dataset, field: str, files: list[str]) -> None:
        """`files` names the records' files; empty for a dataset of the hub's."""
        self.name, self.weight, self._config = config.name, config.weight, config
        check_column(dataset.features.arrow_schema, field, f"source {config.name!r}")
        self._dataset = dataset.select_columns([field, "file", "number"] if files else [field])
        self._origin, self._field, self._files = str(config.dataset), field, files
        lengths = self._text_lengths()
        self.num_documents = int(np.count_nonzero(lengths))
        self.num_empty = len(lengths) - self.num_documents
        self.num_bytes = int(lengths.sum())
        # Memory only where it is needed: nearly always every document has text.
        self._rows = np.flatnonzero(lengths) if self.num_empty else None
        if not self.num_documents:
            raise CorpusError(f"source {config.name!r}: {len(lengths)} documents, none of them with any text")

    def identity(self) -> dict[str, Any]:
        counts = {"documents": self.num_documents, "bytes": self.num_bytes}
        return _settings(self._config) | counts | {"text": self._text_digest()}

    def _text_lengths(self) -> npt.NDArray[np.int64]:
        lengths, row = [np.zeros(0, np.int64)], 0
        for batch in self._dataset.with_format("arrow").iter(batch_size=_SCAN_ROWS):
            column = batch.column(self._field)
            if column.null_count:
                row += pc.index(pc.is_null(column), True).as_py()
                raise CorpusError(
                    f"source {self.name!r}: field {self._field!r} of row {row} is null, not a string"
                )
            lengths.append(pc.binary_length(column).to_numpy().astype(np.int64))
            row += len(column)
        return np.concatenate(lengths)

    def _text_digest(self) -> str:
        """Of all texts and where they end, however they are spread over Arrow's buffers."""
        digest = hashlib.blake2b(digest_size=16)
        for batch in self._dataset.with_format("arrow").iter(batch_size=_SCAN_ROWS):
            column = batch.column(self._field)
            digest.update(pc.binary_length(column).to_numpy().astype("<i8"))
            for chunk in filter(len, column.chunks):
                _, ends, text = chunk.buffers()
                width = np.int64 if pa.types.is_large_string(chunk.type) else np.int32
                begin, end = np.frombuffer(ends, width)[[chunk.offset, chunk.offset + len(chunk)]].tolist()
                if end > begin:  # there may be no buffer otherwise
                    digest.update(memoryview(text)[begin:end])
        return digest.hexdigest()

    def read(self, index: int) -> tuple[str, str]:
        """Text and name of the document with this index among those that are not empty."""
        row = index if self._rows is None else int(self._rows[index])
        try:
            record = self._dataset[row]
        except UnicodeDecodeError as error:
            raise CorpusError(
                f"source {self.name!r}: row {row} of {self._origin} is not UTF-8 at its byte {error.start}"
            ) from None
        if self._files:
            return record[self._field], _record_name(self._files[record["file"]], record["number"])
        return record[self._field], f"{self._origin}[{row}]"

    def shard(
        self, shard: int, num_shards: int, seed: int | None, state: Mapping[str, int] | None
    ) -> _ArrowShard:
        return _ArrowShard(self, shard, num_shards, seed, state)


class _ArrowShard:
    def __init__(
        self,
        source: ArrowSource,
        shard: int,
        num_shards: int,
        seed: int | None,
        state: Mapping[str, int] | None,
    ) -> None:
        self._source, self._seed = source, seed
        self.stride = min(num_shards, source.num_documents)
        self._first = shard % self.stride
        self.state = dict(state or {"epoch": 0, "next": 0, "bytes": 0})

    def next(self) -> tuple[str, str, int]:
        count = self._source.num_documents
        position = self._first + self.state["next"] * self.stride
        if position >= count:
            self.state["epoch"] += 1
            self.state["next"] = 0
            position = self._first
        epoch = self.state["epoch"]
        self.state["next"] += 1
        if self._seed is not None:
            key = hashlib.sha256(f"{self._seed}/{self._source.name}/{epoch}".encode()).digest()
            position = permuted(position, count, int.from_bytes(key[:8], "little"))
        return *self._source.read(position), epoch


def permuted(index: int, count: int, key: int) -> int:
    """Where `index` goes in a permutation of range(count) drawn by `key`, without holding the permutation.

    A Feistel network over the next even power of two, walked until it lands inside.
    Source: Black & Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002.
    """
    half = ((count - 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for number in range(_FEISTEL_ROUNDS):
            left, right = right, left ^ (_mixed(right ^ key, number) & mask)
        index = left << half | right
        if index < count:
            return index


def _mixed(value: int, number: int) -> int:
    """SplitMix64's finaliser."""
    value = (value + (number + 1) * 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK64
    return value ^ value >> 31


# ---------------------------------------------------------------------------------------- streaming


class StreamSource:
    """Records that can only be read in order.

    A process reads them once for all of its shards, each of which takes its documents from them; a resume reads
    again what it skips.
    """

    def __init__(self, config: SourceConfig) -> None:
        self.name, self.weight = config.name, config.weight
        self._config = config
        self._shards: WeakSet[_StreamShard] = WeakSet()
        self._windows: dict[int, _Window] = {}  # by epoch
        if config.path is not None:
            files, self._format = find_files(config.path, config.format)
            self._files = files
        else:
            self._dataset = _load_dataset(config)
        if not any(text for text, _ in self.records(0)):
            raise CorpusError(f"source {config.name!r}: no document with any text")

    def identity(self) -> dict[str, Any]:
        settings = _settings(self._config)
        if self._config.path is not None:
            return settings | {"files": len(self._files), "text": sampled_digest(f.path for f in self._files)}
        folder = Path(str(self._config.dataset)).expanduser()
        if folder.is_dir():
            return settings | {"text": sampled_digest(map(str, sorted(folder.rglob("*.arrow"))))}
        return settings | {"commit": _hub_commit(self._config)}

    def records(self, start: int) -> Iterator[tuple[str, str]]:
        """Texts (empty ones too) and names, from the record with index `start` on."""
        if self._config.path is not None:
            found = read_records(self._files, self._format, self._config.field)
            for record in itertools.islice(found, start, None):
                yield record["text"], _record_name(self._files[record["file"]].path, record["number"])
            return
        for index, record in enumerate(self._dataset.skip(start), start):
            name = f"{self._config.dataset}[{index}]"
            yield checked_text(record, self._config.field, f"source {self.name!r}: record {name}"), name

    def shard(
        self, shard: int, num_shards: int, seed: int | None, state: Mapping[str, int] | None
    ) -> _StreamShard:
        opened = _StreamShard(self, shard, num_shards, state)
        self._shards.add(opened)
        return opened

    def next_record(self, shard: _StreamShard) -> tuple[str, str] | None:
        """The shard's next record; None at the end."""
        epoch, index = shard.state["epoch"], shard.state["records"]
        window = self._windows.get(epoch)
        if window is None or index >= window.end:
            window = self._without_taken(epoch)
        if index < window.first:
            shard.own_records = self.records(index)
            return next(shard.own_records, None)
        return window.record(index)

    def _without_taken(self, epoch: int) -> _Window:
        """The window of an epoch, less the records that all shards have taken."""
        states = [each.state for each in self._shards if each.state["epoch"] <= epoch]
        needed = min(state["records"] if state["epoch"] == epoch else 0 for state in states)
        if epoch not in self._windows:
            self._windows[epoch] = _Window(self.records(needed), needed)
            for ended in [e for e in self._windows if e < min(state["epoch"] for state in states)]:
                del self._windows[ended]
        self._windows[epoch].forget(needed)
        return self._windows[epoch]


class _Window:
    """The records of one pass over a stream that some shards have yet to take."""

    def __init__(self, records: Iterator[tuple[str, str]], first: int) -> None:
        self._records = records
        self._kept: deque[tuple[str, str]] = deque()
        self._chars = 0
        self.first = first

    @property
    def end(self) -> int:
        """Index of the record that is read next."""
        return self.first + len(self._kept)

    def record(self, index: int) -> tuple[str, str] | None:
        """Of `first` and later ones; None behind the last."""
        while index >= self.end:
            record = next(self._records, None)
            if record is None:
                return None
            self._kept.append(record)
            self._chars += len(record[0])
        return self._kept[index - self.first]

    def forget(self, before: int) -> None:
        """Drop records before this index, and more where shards are so far apart that too many are kept."""
        while self._kept and (self.first < before or self._chars > _WINDOW_CHARS):
            self._chars -= len(self._kept.popleft()[0])
            self.first += 1


class _StreamShard:
    """A stream's number of documents is known after one pass; the shards of a short one wrap from then on."""

    def __init__(
        self, source: StreamSource, shard: int, num_shards: int, state: Mapping[str, int] | None
    ) -> None:
        self._source, self._shard, self._num_shards = source, shard, num_shards
        start = {"epoch": 0, "records": 0, "next": 0, "bytes": 0, "empty": 0, "count": 0}
        self.state = dict(state or start)
        self.own_records: Iterator[tuple[str, str]] | None = None
        """Of a shard that fell behind what is kept for all."""

    @property
    def stride(self) -> int:
        return min(self.state["count"] or self._num_shards, self._num_shards)

    def next(self) -> tuple[str, str, int]:
        state = self.state
        while True:
            stride = self.stride
            while record := self._next_record():
                text, name = record
                state["records"] += 1
                if not text:
                    state["empty"] += 1
                    continue
                state["next"] += 1
                if (state["next"] - 1) % stride == self._shard % stride:
                    return text, name, state["epoch"]
            if not state["next"]:
                raise CorpusError(f"source {self._source.name!r}: no document with any text")
            state.update(epoch=state["epoch"] + 1, count=state["next"], records=0, next=0)
            self.own_records = None

    def _next_record(self) -> tuple[str, str] | None:
        if self.own_records is not None:
            return next(self.own_records, None)
        return self._source.next_record(self)


# ------------------------------------------------------------------------------------------ opening


def _open_source(config: SourceConfig) -> ArrowSource | StreamSource:
    try:
        if config.streaming:
            return StreamSource(config)
        if config.path is not None:
            files, file_format = find_files(config.path, config.format)
            arguments: dict[str, Any] = {"files": files, "file_format": file_format, "field": config.field}
            if next(read_records(**arguments), None) is None:
                raise CorpusError(f"path {config.path!r}: no document with any text")
            dataset = _converted(arguments)
            return ArrowSource(config, dataset, "text", [file.path for file in files])
        return ArrowSource(config, _load_dataset(config), config.field, [])
    except CorpusError as error:
        here = f"source {config.name!r}: "
        raise CorpusError(here + str(error).removeprefix(here)) from error.__cause__


def _converted(arguments: dict[str, Any]) -> datasets.Dataset:
    """The records as Arrow in the datasets cache; the key is the files' paths, sizes and times of change."""
    features = datasets.Features(
        text=datasets.Value("large_string"), file=datasets.Value("int32"), number=datasets.Value("int64")
    )
    try:
        with _no_progress_bars():
            return datasets.Dataset.from_generator(read_records, features, gen_kwargs=arguments)
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__
        if isinstance(cause, CorpusError):
            raise cause from cause.__cause__
        raise CorpusError(f"cannot be converted to Arrow ({cause or error})") from error
    except OSError as error:
        raise CorpusError(
            f"cannot be converted to Arrow ({error}); "
            f"check space and rights in {datasets.config.HF_DATASETS_CACHE}"
        ) from error


def _load_dataset(config: SourceConfig) -> Any:
    """A dataset of the hub's (streaming or not), or one that was saved to disk."""
    origin = str(config.dataset)
    folder = Path(origin).expanduser()
    try:
        with _no_progress_bars():
            if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
                loaded = datasets.load_from_disk(folder)
                if isinstance(loaded, datasets.DatasetDict):
                    if config.split not in loaded:
                        raise CorpusError(
                            f"{origin} has no split {config.split!r}; it has {', '.join(loaded)}"
                        )
                    loaded = loaded[config.split]
                return loaded.to_iterable_dataset() if config.streaming else loaded
            if origin.startswith(("/", ".", "~")) and not folder.is_dir():
                raise CorpusError(f"dataset {origin}: no such folder; looked for {folder.absolute()}")
            if folder.is_dir():
                raise CorpusError(
                    f"folder {origin} was not written by Dataset.save_to_disk; give files with path instead"
                )
            return datasets.load_dataset(
                origin,
                config.subset,
                split=config.split,
                revision=config.revision,
                streaming=config.streaming,
            )
    except CorpusError:
        raise
    except Exception as error:  # datasets, the hub's client and fsspec each raise their own
        raise CorpusError(
            f"dataset {origin!r} (subset {config.subset!r}, split {config.split!r}) cannot be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error


def _hub_commit(config: SourceConfig) -> str:
    try:
        with _no_progress_bars():
            builder = datasets.load_dataset_builder(
                str(config.dataset), config.subset, revision=config.revision
            )
    except Exception as error:  # as above
        raise CorpusError(
            f"source {config.name!r}: dataset {config.dataset!r} does not say which commit it is at: "
            f"{type(error).__name__}: {error}"
        ) from error
    return str(builder.hash)


def _settings(config: SourceConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude={"name"}, exclude_none=True)


def _record_name(path: str, number: int) -> str:
    return f"{path}:{number}" if number else path


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    were_shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_shown:
            datasets.enable_progress_bars()
