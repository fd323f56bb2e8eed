"""Keeps secrets out of configurations: they are saved with every checkpoint and shown in reports."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from fusellm_ray.errors import ConfigError

_PATTERNS = {
    # A password may hold slashes; digits and a slash are a port.
    "a user and password in a URI": re.compile(
        r"[a-z][a-z0-9+.-]*://[^/\s:@]*:(?!\d+/)[^\s@]+@", re.IGNORECASE
    ),
    # Elsewhere what stands there may be a container (abfss://container@account…).
    "a user or token in a URI": re.compile(r"https?://[^/\s?#@]+@", re.IGNORECASE),
    "a credential in a URI's query": re.compile(
        r"://[^\s?]*\?(?:[^\s]*&)?(?:[\w.-]*(?:secret|token|passw|signature|credential|(?:access|account|api)[_-]?key)"
        r"[\w.-]*|sig)=[^&\s]",
        re.IGNORECASE,
    ),
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{20,}"),
    "an AWS access key": re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    "a GitHub token": re.compile(r"\b(?:gh[pousr]_|github_pat_)[A-Za-z0-9_]{20,}"),
    "a Google API key": re.compile(r"\bAIza[A-Za-z0-9_-]{35}"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}
_NAMES = re.compile(
    r"(?:^|_)(?:(?:auth|hf|access)?token|password|passwd|passphrase|secret|credentials?"
    r"|(?:access|account|api|private|secret)_?key)$"
)
"""Ends of keys, in snake case."""


def find_credentials(tree: Any) -> list[tuple[str, str]]:
    """Where in a tree of mappings, lists and values a secret stands, and of which kind; never the secret itself."""
    return list(_find(tree, ()))


def refuse_credentials(tree: Any, where: str) -> None:
    """Call it before anything else reads the tree, for other messages show the value they refuse.

    Raises:
        ConfigError: the tree holds secrets; it says where, and of which kind.
    """
    secrets = find_credentials(tree)
    if secrets:
        raise ConfigError(
            f"{where}: holds credentials, which would be saved and shown\n  "
            + "\n  ".join(f"{path}: {kind}" if path else kind for path, kind in secrets)
            + "\ngive them to every node by its environment (AWS_ACCESS_KEY_ID, HF_TOKEN, …) or its role instead"
        )


def _find(node: Any, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _find(value, (*path, str(key)))
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from _find(value, (*path, str(index)))
    elif isinstance(node, str):
        kinds = [kind for kind, pattern in _PATTERNS.items() if pattern.search(node)]
        if not kinds and node and path and _NAMES.search(_snake_case(path[-1])):
            kinds = ["a value that its name calls secret"]
        for kind in kinds[:1]:
            yield ".".join(path), kind


def _snake_case(key: str) -> str:
    """Example: secretAccessKey → secret_access_key; of a dotted key's parts, too."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).replace("-", "_").replace(".", "_").lower()
