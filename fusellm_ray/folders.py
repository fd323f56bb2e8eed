"""Folders as users name them: paths, and URIs of object stores, whose query stays behind what lies in them."""

from __future__ import annotations

from pathlib import Path


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
