"""Three domains of text that every installation has, cut by file into parts that share nothing.

    python  the standard library's source
    prose   English sentences: the language reference (pydoc_data) and the documentation of installed packages
    cpp     the C++ headers that ship with torch

`find_domain` returns a domain's `Split`; the zoo writes its parts as JSONL for the ordinary corpus code. The
order of files is drawn from a hash of their names, so that the same installation gives the same split.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fusellm_ray.errors import CorpusError

DOMAINS = ("python", "prose", "cpp")

PROSE_PACKAGES = ("numpy", "pandas", "networkx", "sympy", "pydantic", "huggingface_hub", "numba", "ray")
"""Dependencies of this project whose docstrings are written in sentences."""

_PYTHON_SKIPPED = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "lib2to3"}
    | {"distutils", "turtledemo", "ensurepip", "idlelib", "tkinter", "__pycache__"}
)
_CPP_FOLDERS = (
    "c10",
    "torch",
    "ATen/core",
    "ATen/native",
    "ATen/cpu",
    "ATen/cuda",
    "ATen/detail",
    "pybind11",
    "fmt",
)
"""Hand-written headers; ATen/ops and the protobuf headers are generated."""

_LEAST_BYTES = 1_000
_MOST_FILE_BYTES = 150_000
_HELDOUT_FILE_BYTES = range(2_000, 9_000)
"""Short files only, so that the held-out text samples many."""
_EXCERPT_BYTES = 800
"""Of training text, so that a batch has many files and a row often two domains."""
_LONGEST_LINE = 1_000
"""Beyond it a line is data, not something a person wrote."""


@dataclass(frozen=True, slots=True)
class Text:
    """One document: a source file, or the sentences of one."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes wanted of each part of a domain."""

    expert: int = 4_000_000
    train: int = 700_000
    heldout: int = 80_000


@dataclass(frozen=True, slots=True)
class Split:
    """A domain, cut by file: no file, and hardly a line of any, is in two parts."""

    expert: list[Text]
    """What the domain's expert is trained on."""
    train: list[Text]
    """What the target is trained on, in excerpts of a few rows: none of it was seen by an expert."""
    heldout: list[Text]
    """What everything is measured on."""


def find_domain(domain: str, sizes: Sizes, seed: int = 0) -> Split:
    """Find a domain's text on this machine.

    `expert` takes what is left after the other two parts, up to its size.

    Raises:
        CorpusError: the machine has less than `train` and `heldout` and a quarter of `expert`.
    """
    finders = {"python": _python_files, "prose": _prose_files, "cpp": _cpp_files}
    candidates = sorted(finders[domain](), key=lambda candidate: _draw(seed, candidate[0]))
    split = Split([], [], [])
    room = {"heldout": sizes.heldout, "train": sizes.train, "expert": sizes.expert}
    novelty = _Novelty()
    for name, read in candidates:
        if all(left <= 0 for left in room.values()):
            break
        text = read()
        num_bytes = len(text.encode())
        if num_bytes < _LEAST_BYTES or not novelty.admit(text):
            continue
        if room["heldout"] > 0 and num_bytes in _HELDOUT_FILE_BYTES:
            part = "heldout"
        elif room["train"] > 0:
            part = "train"
        elif room["expert"] > 0:
            part = "expert"
        else:
            continue
        getattr(split, part).extend(_excerpts(name, text) if part == "train" else [Text(name, text)])
        room[part] -= num_bytes
    found = sizes.train + sizes.heldout + sizes.expert - sum(room.values())
    needed = sizes.train + sizes.heldout + sizes.expert // 4
    if room["train"] > 0 or room["heldout"] > 0 or room["expert"] > 0.75 * sizes.expert:
        raise CorpusError(
            f"quickstart domain {domain!r}: found {found} bytes of text in {_place(domain)}, needs {needed}; "
            "use a Python installation that has its sources (not a stripped or zipped one)"
        )
    return split


def write_jsonl(path: Path, texts: Iterable[Text]) -> None:
    """One record {"text": …, "name": …} a line."""
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text.text, "name": text.name}, ensure_ascii=False) + "\n")


def read_jsonl(path: Path) -> list[Text]:
    with path.open(encoding="utf-8") as file:
        return [Text(record["name"], record["text"]) for record in map(json.loads, file)]


# ---------------------------------------------------------------------------------- where it is found

_Candidate = tuple[str, Callable[[], str]]
"""A name, and how to read what it stands for ("" if it is of no use)."""


def _python_files() -> Iterator[_Candidate]:
    for name, path in _files(Path(sysconfig.get_path("stdlib")), (".py",), _PYTHON_SKIPPED):
        yield name, lambda path=path: _source(path, _PYTHON_HEADER)  # type: ignore[misc]


def _cpp_files() -> Iterator[_Candidate]:
    torch = _package_folder("torch")
    for folder in _CPP_FOLDERS if torch else ():
        assert torch is not None
        for name, path in _files(torch / "include" / folder, (".h", ".hpp"), frozenset()):
            yield f"{folder}/{name}", lambda path=path: _source(path, _CPP_HEADER)  # type: ignore[misc]


def _prose_files() -> Iterator[_Candidate]:
    for topic, text in _language_reference().items():
        yield f"pydoc_data/{topic}", lambda text=text: _sentences([text])  # type: ignore[misc]
    for package in PROSE_PACKAGES:
        root = _package_folder(package)
        if root is not None:
            for name, path in _files(root, (".py",), frozenset({"test", "tests"})):
                yield f"{package}/{name}", lambda path=path: _sentences(_docstrings(path))  # type: ignore[misc]


def _language_reference() -> dict[str, str]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions ship it apart
        return {}
    return topics


def _files(root: Path, suffixes: tuple[str, ...], skipped: frozenset[str]) -> Iterator[tuple[str, Path]]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skipped and not name.startswith("config-")]
        for name in names:
            if name.endswith(suffixes):
                path = Path(folder, name)
                yield path.relative_to(root).as_posix(), path


def _package_folder(package: str) -> Path | None:
    """Where a package lies, without importing it."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None


def _place(domain: str) -> str:
    if domain == "python":
        return sysconfig.get_path("stdlib")
    if domain == "cpp":
        return f"{_package_folder('torch')}/include"
    return f"pydoc_data and the docstrings of {', '.join(PROSE_PACKAGES)}"


# ---------------------------------------------------------------------------------- how it is read

_PYTHON_HEADER = re.compile(r"\A(?:#.*\n|\s*\n)+")
_CPP_HEADER = re.compile(r"\A\s*(?:/\*.*?\*/|(?:[ \t]*//[^\n]*\n)+)\s*", re.DOTALL)
_DOCSTRING = re.compile(r'[ \t]*r?"""(.*?)"""', re.DOTALL)
_BLANK_LINES = re.compile(r"\n[ \t]*\n")
_PROSE_SHARE = 0.88
"""Letters and spaces in a paragraph of sentences; code, tables and formulas have fewer."""


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
        return data.decode().replace("\r\n", "\n") if len(data) <= _MOST_FILE_BYTES else ""
    except (OSError, UnicodeDecodeError):
        return ""


def _source(path: Path, header: re.Pattern[str]) -> str:
    """A source file without the licence at its head."""
    text = _read(path)
    head = header.match(text)
    if head and re.search("licen[sc]e|copyright", head[0], re.IGNORECASE):
        text = text[head.end() :]
    if "\0" in text or any(len(line) > _LONGEST_LINE for line in text.splitlines()):
        return ""
    return text


def _docstrings(path: Path) -> list[str]:
    return _DOCSTRING.findall(_read(path))


def _sentences(documentation: Iterable[str]) -> str:
    """The paragraphs that are English sentences, one a line, unwrapped; each once."""
    kept: dict[str, None] = {}
    for document in documentation:
        for paragraph in _BLANK_LINES.split(document):
            text = " ".join(paragraph.split())
            if len(text) < 80 or text[-1] not in ".!?" or not (text[0].isupper() or text[0] in "`\"'"):
                continue
            if (
                ">>>" in text
                or "::" in text
                or sum(c.isalpha() or c == " " for c in text) < _PROSE_SHARE * len(text)
            ):
                continue
            kept[text] = None
    return "\n\n".join(kept)


def _excerpts(name: str, text: str) -> Iterator[Text]:
    """A text cut at ends of lines, each part of `_EXCERPT_BYTES` or a little more."""
    lines: list[str] = []
    start = num_bytes = 0
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        lines.append(line)
        num_bytes += len(line.encode())
        if num_bytes >= _EXCERPT_BYTES:
            yield Text(f"{name}:{start + 1}-{number}", "".join(lines))
            lines, start, num_bytes = [], number, 0
    if lines:
        yield Text(f"{name}:{start + 1}-{number}", "".join(lines))


class _Novelty:
    """Refuses a text most of whose lines were seen before: copies, generated variants, boilerplate."""

    def __init__(self, most_seen: float = 0.4) -> None:
        self._most_seen = most_seen
        self._seen: set[int] = set()

    def admit(self, text: str) -> bool:
        lines = {zlib.crc32(line.strip().encode()) for line in text.splitlines() if len(line.strip()) >= 20}
        repeated = len(lines & self._seen)
        self._seen |= lines
        return repeated <= self._most_seen * len(lines)


def _draw(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()
