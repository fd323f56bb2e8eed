"""Local files → records: JSONL, Parquet and text, checked as they are read.

Every record is checked on the way (its field, its type, its encoding), so an error names the file, the record
and what to do; nothing is guessed or skipped.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet

from fusellm_ray.errors import CorpusError

FileFormat = Literal["jsonl", "parquet", "text"]

_ENDINGS: dict[str, FileFormat] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_OTHER_ENDINGS = frozenset((
    ".7z", ".arrow", ".avro", ".csv", ".docx", ".feather", ".lz4", ".lzma", ".npy", ".npz", ".orc", ".pdf", ".pkl",
    ".safetensors", ".tar", ".tgz", ".tsv", ".xls", ".xlsx", ".zip",
))  # fmt: skip
"""Of formats that are not read; any other ending is taken for text."""
_PARQUET_ROWS = 1024
_SAMPLE_BYTES = 1 << 16


class FileVersion(NamedTuple):
    """A file as it was when the corpus was opened; a changed file is another version."""

    path: str
    num_bytes: int
    modified_ns: int


class Record(NamedTuple):
    text: str
    file: int
    """Index into the files read."""
    number: int
    """Line of a JSONL file or row of a Parquet file, from 1; 0 for a text file, which is one record."""


def find_files(path: str, wanted: Literal["auto"] | FileFormat) -> tuple[tuple[FileVersion, ...], FileFormat]:
    """The files at `path` (a file, a folder, or a glob pattern), sorted, and their one format.

    A folder is read with its subfolders, without hidden files. An explicit format takes the files of a folder
    that have its ending (any file, for text).

    Raises:
        CorpusError: nothing is there, formats are mixed, or the format is to be found and is none that is read.
    """
    place = Path(path).expanduser()
    if any((place / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise CorpusError(f"path {path!r} was written by Dataset.save_to_disk; give it as a dataset instead")
    if place.is_dir():
        inside = [p for p in place.rglob("*") if p.is_file()]
        found = [p for p in inside if not any(part.startswith(".") for part in p.relative_to(place).parts)]
        if wanted in ("jsonl", "parquet"):
            found = [p for p in found if _format_of(p) == wanted]
    elif place.is_file():
        found = [place]
    else:
        found = [p for p in map(Path, glob.glob(str(place), recursive=True)) if p.is_file()]
    if not found:
        kind = (
            "folder without files" if place.is_dir() else "no such file or folder, and no match as a pattern"
        )
        of = "" if wanted == "auto" else f" of format {wanted}"
        raise CorpusError(f"path {path!r}: {kind}{of}; looked for {place.absolute()}")
    found.sort()
    if wanted == "auto":
        for file in found:
            if (ending := _ending(file)) in _OTHER_ENDINGS:
                advice = (
                    "convert it to one of them, or set format: text to read it as it is"
                    if len(found) == 1
                    else "set format: jsonl or parquet, or give a glob pattern that leaves it out"
                )
                raise CorpusError(f"{file}: {ending} is not read, only JSONL, Parquet and text; {advice}")
        counts = Counter(map(_format_of, found))
        if len(counts) > 1:
            mixed = ", ".join(f"{count} {kind}" for kind, count in counts.items())
            raise CorpusError(
                f"path {path!r}: holds files of several formats ({mixed}); set format, or a glob pattern"
            )
        (wanted,) = counts
    versions = tuple(FileVersion(str(p), (s := p.stat()).st_size, s.st_mtime_ns) for p in found)
    return versions, wanted


def sampled_digest(paths: Iterable[str]) -> str:
    """Of files too large to be read whole: of each its size, and 64 KiB at its start, middle and end."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            digest.update(size.to_bytes(8, "little"))
            for place in (0, size // 2, max(0, size - _SAMPLE_BYTES)):
                file.seek(place)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _ending(path: Path) -> str:
    """Without that of a compression."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _format_of(path: Path) -> FileFormat:
    return _ENDINGS.get(_ending(path), "text")


def read_records(
    files: tuple[FileVersion, ...], file_format: FileFormat, field: str
) -> Iterator[dict[str, Any]]:
    """The records of all files in order, each a `Record` as a dictionary."""
    read = {"jsonl": _read_jsonl, "parquet": _read_parquet, "text": _read_text}[file_format]
    for index, file in enumerate(files):
        try:
            for number, text in read(file.path, field):
                yield Record(text, index, number)._asdict()
        except CorpusError:
            raise
        except (OSError, EOFError, ValueError, pa.ArrowException) as error:
            raise CorpusError(
                f"{file.path}: cannot be read as {file_format} ({type(error).__name__}: {error})"
            ) from error


def checked_text(record: dict[str, Any], field: str, where: str) -> str:
    """The record's text.

    Raises:
        CorpusError: the field is missing, not a string, or not valid Unicode.
    """
    if field not in record:
        keys = ", ".join(map(repr, record)) or "none"
        raise CorpusError(
            f"{where}: no field {field!r}; the record's keys are {keys}: set the source's field"
        )
    text = record[field]
    if not isinstance(text, str):
        raise CorpusError(f"{where}: field {field!r} is {_kind(text)}, not a string")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise CorpusError(
                f"{where}: field {field!r} has an unpaired surrogate at character {error.start}; "
                "it is not valid Unicode: repair the record"
            ) from None
    return text


def _kind(value: object) -> str:
    names = {"NoneType": "null", "dict": "an object", "list": "a list", "bool": "a boolean"}
    return names.get(
        type(value).__name__, "a number" if isinstance(value, int | float) else type(value).__name__
    )


def _open(path: str) -> Any:
    """The file's bytes, without its compression."""
    if path.lower().endswith(".zst") and "zstd" not in fsspec.available_compressions():
        raise CorpusError(f"{path}: zstandard, which reads it, is not installed: pip install zstandard")
    return fsspec.open(path, "rb", compression="infer")


def _decode(data: bytes, path: str, offset: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path}: byte {offset + error.start} (0x{data[error.start]:02x}) is not UTF-8; "
            "convert the file to UTF-8, or leave it out"
        ) from None


def _read_jsonl(path: str, field: str) -> Iterator[tuple[int, str]]:
    offset = 0
    with _open(path) as stream:
        for number, line in enumerate(stream, start=1):
            where = f"{path}:{number}"
            text = _decode(line, path, offset)
            offset += len(line)
            if number == 1:
                text = text.removeprefix("\ufeff")
            if not text.strip():
                continue
            try:
                record = json.loads(text.rstrip())
            except json.JSONDecodeError as error:
                raise CorpusError(
                    f"{where}: not JSON ({error.msg} at column {error.colno}); one object a line is expected"
                ) from None
            except RecursionError:
                raise CorpusError(f"{where}: JSON that is nested too deeply; repair the record") from None
            if not isinstance(record, dict):
                raise CorpusError(f"{where}: {_kind(record)} where one JSON object a line is expected")
            yield number, checked_text(record, field, where)


def _read_parquet(path: str, field: str) -> Iterator[tuple[int, str]]:
    with pa.parquet.ParquetFile(path) as file:
        check_column(file.schema_arrow, field, path)
        number = 0
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[field]):
            for value in batch.column(0):
                number += 1
                where = f"{path}:{number}"
                try:
                    yield number, checked_text({field: value.as_py()}, field, where)
                except UnicodeDecodeError as error:
                    raise CorpusError(
                        f"{where}: field {field!r} is not UTF-8 at its byte {error.start}; repair the record"
                    ) from None


def check_column(schema: pa.Schema, field: str, where: str) -> None:
    """Raise a CorpusError unless `field` is a column of strings."""
    if field not in schema.names:
        raise CorpusError(
            f"{where}: no field {field!r}; its columns are {', '.join(map(repr, schema.names)) or 'none'}: "
            "set the source's field"
        )
    kind = schema.field(field).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise CorpusError(f"{where}: field {field!r} is {kind}, not a string")


def _read_text(path: str, field: str) -> Iterator[tuple[int, str]]:
    with _open(path) as stream:
        yield 0, _decode(stream.read(), path, 0)
