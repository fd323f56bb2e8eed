"""Many models on the same held-out text: one table of bits per byte, for people and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fusellm_ray.config import ModelConfig, SourceConfig
from fusellm_ray.errors import ConfigError
from fusellm_ray.perplexity import DomainScore, evaluate_model, held_out_documents

DEFAULT_CONTEXT = 2048

Scores = Mapping[str, Mapping[str, DomainScore]]
"""Model → domain → score."""


def evaluate_models(
    models: Sequence[str],
    corpora: Sequence[str],
    *,
    field: str = "text",
    max_bytes: int = 200_000,
    context: int | None = None,
    dtype: str = "float32",
    threads: int | None = None,
    json_path: Path | None = None,
) -> Scores:
    """Score every model on every corpus, print the table, and write it as JSON if asked.

    Args:
        models: folders or hub ids.
        corpora: `NAME=PATH` strings; a path may be JSONL, Parquet, text, a folder or a glob.
        context: tokens read at once; at most what the model reads.

    Raises:
        ConfigError: a corpus is not of the form NAME=PATH, or two have one name.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    documents = held_out_documents([_source(corpus, corpora, field) for corpus in corpora], max_bytes)
    scores: dict[str, dict[str, DomainScore]] = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for model in progress.track(models, description="evaluate"):
            scores[model] = evaluate_model(
                ModelConfig(model=model),
                documents,
                row_tokens=context or DEFAULT_CONTEXT,
                device="cuda" if torch.cuda.is_available() else "cpu",
                dtype=getattr(torch, dtype),
            )
    print_scores(scores, "bits per byte on held-out text (lower is better)")
    if json_path is not None:
        json_path.write_text(json.dumps(as_json(scores), indent=1) + "\n", encoding="utf-8")
    return scores


def print_scores(scores: Scores, title: str) -> None:
    """The table: a row a model, a column a domain, the best of each column in bold, and the mean over domains."""
    domains = list(next(iter(scores.values())))
    columns: dict[str, Callable[[str], float]] = {
        domain: lambda model, domain=domain: scores[model][domain].bits_per_byte  # type: ignore[misc]
        for domain in domains
    }
    columns["mean"] = lambda model: mean_bits_per_byte(scores[model])
    table = Table(title=title, title_justify="left")
    table.add_column("model")
    for name in columns:
        table.add_column(name, justify="right")
    best = {name: min(value(model) for model in scores) for name, value in columns.items()}
    for model in scores:
        cells = []
        for name, value in columns.items():
            text = f"{value(model):.4f}"
            cells.append(f"[bold]{text}[/bold]" if value(model) == best[name] else text)
        table.add_row(model, *cells)
    Console().print(table)


def mean_bits_per_byte(scores: Mapping[str, DomainScore]) -> float:
    """Mean over domains, each with the same weight whatever its size."""
    return math.fsum(score.bits_per_byte for score in scores.values()) / len(scores)


def as_json(scores: Scores) -> dict[str, Any]:
    """Model → {mean, domains: {domain: {bits_per_byte, bytes, tokens, documents}}}."""
    return {
        model: {
            "mean": mean_bits_per_byte(by_domain),
            "domains": {
                domain: {
                    "bits_per_byte": score.bits_per_byte,
                    "bytes": score.bytes,
                    "tokens": score.tokens,
                    "documents": score.documents,
                }
                for domain, score in by_domain.items()
            },
        }
        for model, by_domain in scores.items()
    }


def _source(corpus: str, corpora: Sequence[str], field: str) -> SourceConfig:
    name, separator, path = corpus.partition("=")
    if not separator or not name or not path:
        raise ConfigError(f"--corpus {corpus!r}: expected NAME=PATH, for instance prose=heldout.jsonl")
    if sum(other.startswith(f"{name}=") for other in corpora) > 1:
        raise ConfigError(f"--corpus: two corpora are named {name!r}; give each its own name")
    return SourceConfig(name=name, path=path, field=field)
