"""Folders as users name them: paths, and URIs of object stores, whose query stays behind what lies in them."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


def is_uri(folder: str) -> bool:
    return "://" in folder


def absolute(folder: str) -> str:
    """A path made absolute; a URI as it is."""
    return folder if is_uri(folder) else str(Path(folder).expanduser().resolve())


def below(folder: str, name: str) -> str:
    """What lies in a folder: s3://bucket/runs?region=a → s3://bucket/runs/name?region=a."""
    path, query = _split(folder)
    return f"{path}/{name}{query}"


def last_name(folder: str) -> str:
    """The folder's own name."""
    return _split(folder)[0].rsplit("/", 1)[-1]


def _split(folder: str) -> tuple[str, str]:
    path, mark, query = folder.partition("?") if is_uri(folder) else (folder, "", "")
    return path.rstrip("/"), mark + query


def try_lock(file: IO[Any]) -> bool | None:
    """Lock an open file until it is closed, or its process ends, however.

    Returns:
        False: somebody else holds it. None: this file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextlib.contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`, which takes its place at the end, or is removed where something is raised.

    Raises:
        OSError: it cannot be written, or `out` is there and not an empty folder.
    """
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
