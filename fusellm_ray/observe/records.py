"""The record of a run as JSON lines: what each step measured, in the order it happened, written by the driver.

    {"time": 1790000000.0, "event": "run" | "start" | "step" | "evaluation" | "teachers" | "end" | "failed", ...}

A run that resumed repeats the steps after its last checkpoint; of two lines for one step the later counts. A line that
was cut off, as its driver died or the disk was full, costs that record only.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.fs

from fusellm_ray.errors import ConfigError
from fusellm_ray.folders import absolute, below, is_uri, try_lock

METRICS_FILE = "metrics.jsonl"
UNREADABLE = "unreadable"
"""The event of a line that is no record."""
_UPLOAD_S = 30.0
"""Between two uploads of the record to an object store."""

logger = logging.getLogger(__name__)


class RecordLog:
    """Appends records to metrics.jsonl in the run's folder.

    Args:
        folder: the run's folder. Object stores (URIs) cannot append: there the file is kept on this node and
            uploaded whole: at once, now and then, and at the end.

    The run matters more than its record: what cannot be written once training goes on is lost, with a warning.

    Raises:
        ConfigError: when it is entered, as the folder cannot be written, or another process writes the record. In
            object stores, and where file systems have no locks, nobody sees the other.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._path = Path(folder) / METRICS_FILE
        self._remote: _Remote | None = None
        self._stack = contextlib.ExitStack()
        self._file: io.FileIO | None = None
        self._is_torn = False
        """The last line in the file has no end."""
        self._lost = 0
        """Records in a row that could not be written."""
        self._uploaded_at = -math.inf

    def __enter__(self) -> RecordLog:
        with contextlib.ExitStack() as stack:
            try:
                if is_uri(self._folder):
                    place = stack.enter_context(tempfile.TemporaryDirectory(prefix="fusellm_ray_"))
                    self._path = Path(place) / METRICS_FILE
                    self._remote = _Remote(self._folder)
                    self._remote.fetch(self._path)
                self._path.parent.mkdir(parents=True, exist_ok=True)
                # Unbuffered: a buffer would keep what a full disk refuses, and mix it with later lines.
                self._file = stack.enter_context(self._path.open("ab+", buffering=0))
                if try_lock(self._file) is False:
                    raise ConfigError(
                        f"{self._folder}: another process is training this run; wait for its end or stop it, or give "
                        "this one a run.name of its own"
                    )
                if self._file.tell():
                    self._file.seek(-1, io.SEEK_END)
                    self._is_torn = self._file.read(1) != b"\n"
            except OSError as error:
                raise ConfigError(
                    f"{self._folder}: the run's record cannot be written there ({error}); see that run.storage "
                    "can be reached and written from here"
                ) from error
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        if self._remote is not None:
            self._upload(self._remote)
        self._stack.close()

    def so_far(self) -> list[dict[str, Any]]:
        """All records, those of earlier drivers of the run included; see `read_records`."""
        return read_records(str(self._path.parent))

    def write(self, record: dict[str, Any]) -> None:
        """Append one line, readable by others at once (in an object store: after the next upload)."""
        assert self._file is not None, "used as a context manager"
        line = (json.dumps({"time": round(time.time(), 3)} | record) + "\n").encode()
        line = b"\n" + line if self._is_torn else line
        try:
            written = self._file.write(line)
            self._is_torn = written < len(line)
            problem = "no space for the whole line" if self._is_torn else None
        except OSError as error:
            problem = str(error)
        if problem is not None:
            if not self._lost:
                logger.warning("%s: the run goes on without being recorded (%s)", self._path, problem)
            self._lost += 1
            return
        if self._lost:
            logger.warning("%s: recorded again; %d records are missing", self._path, self._lost)
        self._lost = 0
        if self._remote is not None and time.monotonic() - self._uploaded_at > _UPLOAD_S:
            self._upload(self._remote)

    def _upload(self, remote: _Remote) -> None:
        try:
            remote.put(self._path)
        except OSError as error:
            logger.warning("%s: %s could not be written (%s)", self._folder, METRICS_FILE, error)
        self._uploaded_at = time.monotonic()


class _Remote:
    """metrics.jsonl in an object store."""

    def __init__(self, folder: str) -> None:
        self._filesystem, self._path = pyarrow.fs.FileSystem.from_uri(below(folder, METRICS_FILE))

    def fetch(self, local: Path) -> None:
        """Copy the record so far, if there is one. Makes the folder, so that it shows now whether it can be written."""
        self._filesystem.create_dir(self._path.rpartition("/")[0])
        if self._filesystem.get_file_info(self._path).type == pyarrow.fs.FileType.File:
            with self._filesystem.open_input_stream(self._path) as source, local.open("wb") as copy:
                shutil.copyfileobj(source, copy)

    def put(self, local: Path) -> None:
        with local.open("rb") as source, self._filesystem.open_output_stream(self._path) as copy:
            shutil.copyfileobj(source, copy)


@dataclass
class History:
    """A run so far; of repeated steps only the later."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    """Ascending by step."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    teachers: list[dict[str, Any]] = field(default_factory=list)
    """How the pools stood, now and then."""
    config: dict[str, Any] | None = None
    """Of its latest start."""
    outcome: dict[str, Any] | None = None
    """How it ended: `end` or `failed`; None while it runs, again after a resume."""
    last: dict[str, Any] = field(default_factory=dict)
    """The latest record of all."""
    last_of_ranks: dict[str, Any] = field(default_factory=dict)
    """The latest but for those about teachers, which come whether or not ranks get on."""
    num_unreadable: int = 0
    """Lines that are no records."""

    def add(self, record: dict[str, Any]) -> None:
        event = record["event"]
        if event == UNREADABLE:
            self.num_unreadable += 1
            return
        if event == "run":
            self.config = record["config"]
        if event in ("run", "start"):
            self.outcome = None
        if event in ("end", "failed"):
            self.outcome = record
        if event == "start":
            self.steps = [r for r in self.steps if r["step"] <= record["step"]]
            self.evaluations = [r for r in self.evaluations if r["step"] <= record["step"]]
        kept = {"step": self.steps, "evaluation": self.evaluations, "teachers": self.teachers}.get(event)
        if kept is not None:
            kept.append(record)
        self.last = record
        if event != "teachers":
            self.last_of_ranks = record

    @classmethod
    def of(cls, records: Iterable[dict[str, Any]]) -> History:
        history = cls()
        for record in records:
            history.add(record)
        return history


def read_records(folder: str) -> list[dict[str, Any]]:
    """All records in a run's folder (a path or a URI), oldest first; UNREADABLE ones stand for lines that are none.

    Raises:
        ConfigError: the file cannot be read, or no line of it is a record.
    """
    try:
        filesystem, path = pyarrow.fs.FileSystem.from_uri(below(absolute(folder), METRICS_FILE))
        with filesystem.open_input_stream(path) as stream:
            *lines, _being_written = stream.read().decode(errors="replace").split("\n")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder}: no {METRICS_FILE} can be read there ({error}); give a run's folder or its config, of a run "
            "that has begun to train"
        ) from error
    records, problems = [], []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            record["event"]
        except (ValueError, KeyError, TypeError) as error:
            problems.append(f"line {number}: is no record of a run ({error})")
            record = {"event": UNREADABLE}
        records.append(record)
    if problems and len(problems) == len(lines):
        raise ConfigError(f"{folder}/{METRICS_FILE}, {problems[0]}; give a run's folder")
    return records
