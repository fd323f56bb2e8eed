"""A whole run in a folder: two tiny teachers and a tiny target, three tokenizers, two domains of text."""

from __future__ import annotations

import inspect
import json
import pydoc_data.topics
import shutil
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fusellm_ray.config import Config
from fusellm_ray.config_file import parse_config
from fusellm_ray.corpus.tokens import ByteTokenizer
from tests.models import tiny_model

# Not qwen2: transformers gives every folder of that type Qwen's own tokenizer class, whatever the folder says.
TEACHERS = {"left": ("gpt2", "bytelevel"), "right": ("gpt_neox", "unigram")}
TARGET = ("llama_tied", "llama")


def model_folder(architecture: str, tokenizer: Path, folder: Path, seed: int) -> Path:
    """A tiny model together with a tokenizer."""
    vocab_size = ByteTokenizer.load(str(tokenizer)).vocab_size
    tiny_model(architecture, vocab_size, folder, seed=seed)
    for file in tokenizer.iterdir():
        shutil.copy(file, folder / file.name)
    return folder


def write_corpus(folder: Path, num_documents: int = 24) -> dict[str, Path]:
    """Prose and code as JSONL, one file a domain."""
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())][:num_documents]
    sources = inspect.getsource(textwrap) + inspect.getsource(json.decoder)
    pieces = sources.split("\n    def ")[:num_documents]
    paths = {}
    for name, texts in {"prose": topics, "code": pieces}.items():
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps({"text": text[:3000]}) + "\n" for text in texts))
    return paths


def build_run(folder: Path, tokenizers: dict[str, Path], **sections: Any) -> dict[str, Any]:
    """Write models and corpus; return the configuration of a run of two ranks as a tree.

    Args:
        sections: merged over the configuration's sections, key by key.
    """
    folder.mkdir(parents=True, exist_ok=True)
    seeds = iter(range(10))
    teachers = [
        {
            "name": name,
            "model": str(model_folder(architecture, tokenizers[kind], folder / name, next(seeds))),
            "top_k": 8,
            "resources": {"num_cpus": 0.1},
        }
        for name, (architecture, kind) in TEACHERS.items()
    ]
    target = model_folder(TARGET[0], tokenizers[TARGET[1]], folder / "target", next(seeds))
    corpus = write_corpus(folder)
    tree: dict[str, Any] = {
        "run": {"name": "run", "storage": str(folder / "storage")},
        "target": {"model": str(target)},
        "teachers": teachers,
        "corpus": {
            "row_tokens": 64,
            "sources": [{"name": name, "path": str(path)} for name, path in corpus.items()],
        },
        "objective": {"clm_weight": 0.5},
        "training": {"steps": 6, "batch_rows": 4, "micro_rows": 2, "lr": 1.0e-3},
        "trainer": {"workers": 2, "resources_per_worker": {"CPU": 0.2}, "max_failures": 0},
        "stream": {"deadline_s": 120},
        "checkpoint": {"every_steps": 3},
    }
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section if isinstance(section, dict) else section
    return tree


def of_event(records: Iterable[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    """A run's records of one kind."""
    return [record for record in records if record["event"] == event]


def losses(records: Iterable[dict[str, Any]]) -> dict[int, float]:
    """By step."""
    return {record["step"]: record["loss"] for record in of_event(records, "step")}


def named(tree: dict[str, Any], name: str, **sections: dict[str, Any]) -> Config:
    """The run of a tree under another name, its sections changed key by key."""
    changed = tree | {"run": tree["run"] | {"name": name}}
    for section, values in sections.items():
        changed[section] = changed.get(section, {}) | values
    return parse_config(changed)
