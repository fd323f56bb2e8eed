"""Keeps secrets out of configurations: they are saved with every checkpoint and shown in reports."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_PATTERNS = {
    "a user and password in a URI": re.compile(r"[a-z][a-z0-9+.-]*://[^/\s:@]*:[^/\s@]+@", re.IGNORECASE),
    "a credential in a URI's query": re.compile(
        r"://[^\s?]*\?(?:[^\s]*&)?(?:[a-z_.-]*(?:secret|token|password|signature|access_key)[a-z_.-]*|sig)=[^&\s]",
        re.IGNORECASE,
    ),
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{20,}"),
    "an AWS access key": re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    "a GitHub token": re.compile(r"\b(?:gh[pousr]_|github_pat_)[A-Za-z0-9_]{20,}"),
    "a Google API key": re.compile(r"\bAIza[A-Za-z0-9_-]{35}"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}
_NAMES = re.compile(
    r"(?:^|_)(?:token|password|passwd|secret|api_key|access_key|credentials?)$", re.IGNORECASE
)


def find_credentials(tree: Any) -> list[tuple[str, str]]:
    """Where in a tree of mappings, lists and values a secret stands, and of which kind; never the secret itself."""
    return list(_find(tree, ()))


def _find(node: Any, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _find(value, (*path, str(key)))
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from _find(value, (*path, str(index)))
    elif isinstance(node, str):
        kinds = [kind for kind, pattern in _PATTERNS.items() if pattern.search(node)]
        if not kinds and node and path and _NAMES.search(path[-1]):
            kinds = ["a value that its name calls secret"]
        for kind in kinds[:1]:
            yield ".".join(path), kind
