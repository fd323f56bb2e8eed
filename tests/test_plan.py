"""The estimates that `fusellm-ray check` prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fusellm_ray.config import parse_config
from fusellm_ray.plan import _target_memory
from tests.models import tiny_model

VOCAB, WIDTH, RANK = 101, 32, 4


def memory(model: Path, **lora: Any) -> int:
    """Of one of two ranks."""
    tree = {
        "run": {"name": "r"},
        "target": {"model": str(model), "lora": {"rank": RANK, **lora} if lora else None},
        "corpus": {"sources": [{"name": "x", "path": "x.jsonl"}]},
        "fusion": {"rule": "none"},
        "training": {"steps": 1},
        "trainer": {"workers": 2},
    }
    return _target_memory(parse_config(tree))


def test_memory_counts_frozen_weights_at_their_width(tmp_path: Path):
    pytest.importorskip("peft")
    model = tiny_model("gpt2", VOCAB, tmp_path)  # its LM head is its embedding
    layers, positions = 2, 128
    linear = layers * 12 * WIDTH**2
    biases_and_norms = layers * (9 * WIDTH + 4 * WIDTH) + 2 * WIDTH
    rest = (VOCAB + positions) * WIDTH + biases_and_norms
    adapters = layers * RANK * (4 + 2 + 5 + 5) * WIDTH  # qkv, projection, up, down: their inputs and outputs
    assert memory(model) == (linear + rest) * 16 // 2
    assert memory(model, target_modules="all-linear") == ((linear + rest) * 4 + adapters * 16) // 2
    assert memory(model, quantise="nf4") == (rest * 4 + adapters * 16) // 2 + linear // 2
