"""The transformers engine against the model's own log softmax, one prompt at a time."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fusellm_ray.config import TeacherConfig
from fusellm_ray.errors import EngineError
from fusellm_ray.teachers.engine import Engine, Scores, check_scores, make_engine
from tests.models import tiny_model

VOCAB = 300
K = 7


def teacher(folder: Path, **engine: Any) -> TeacherConfig:
    return TeacherConfig.model_validate(
        {"name": "tiny", "model": str(folder), "engine": {"type": "transformers", **engine}}
    )


def prompts(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, n, dtype=np.int32) for n in lengths]


def score(engine: Engine, asked: list[np.ndarray], top_k: int = K) -> list[Scores]:
    return asyncio.run(engine.score(asked, top_k))


def reference(folder: Path, prompt: np.ndarray) -> np.ndarray:
    """[m-1, V] log softmax in float64 of the model's own logits."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.from_numpy(prompt.astype(np.int64))[None]).logits[0, :-1].double()
    return torch.log_softmax(logits, -1).numpy()


@pytest.mark.parametrize(
    "architecture", ["llama", "gpt2", "mistral", "gemma2", "gemma3", "gpt_neox", "bloom"]
)
def test_scores_are_the_models_own_log_softmax(architecture: str, tmp_path: Path) -> None:
    """gemma2 caps its logits after the head, bloom takes no position ids: both fall back to whole logits."""
    folder = tiny_model(architecture, VOCAB, tmp_path / "model")
    config = teacher(folder, max_batch_tokens=64).model_copy(update={"max_context": 128})
    asked = prompts(3, 40, 17, 1, 2, 40, 11)
    engine = make_engine(config)
    assert engine.vocab_size == VOCAB
    for prompt, answer in zip(asked, score(engine, asked), strict=True):
        wanted = reference(folder, prompt) if len(prompt) > 1 else np.zeros((0, VOCAB))
        assert (answer.top_ids.dtype, answer.top_logprobs.dtype) == (np.int32, np.float32)
        np.testing.assert_allclose(answer.top_logprobs, -np.sort(-wanted, axis=1)[:, :K], atol=2e-5)
        np.testing.assert_allclose(
            np.take_along_axis(wanted, answer.top_ids.astype(np.int64), 1), answer.top_logprobs, atol=2e-5
        )
        gold = np.take_along_axis(wanted, prompt[1:, None].astype(np.int64), 1)[:, 0]
        np.testing.assert_allclose(answer.gold_logprobs, gold, atol=2e-5)


def test_capped_logits_differ_from_head_times_hidden_states(tmp_path: Path) -> None:
    """Else the fallback above would prove nothing."""
    engine = make_engine(teacher(tiny_model("gemma2", VOCAB, tmp_path / "model")))
    assert not engine._head_is_apart  # type: ignore[attr-defined]
    engine = make_engine(teacher(tiny_model("llama", VOCAB, tmp_path / "other")))
    assert engine._head_is_apart  # type: ignore[attr-defined]


def test_the_same_prompts_give_the_same_bits(tmp_path: Path) -> None:
    folder = tiny_model("llama", VOCAB, tmp_path / "model")
    asked = prompts(30, 5, 64)
    first, second = (score(make_engine(teacher(folder)), asked) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.top_ids, b.top_ids)
        np.testing.assert_array_equal(a.top_logprobs, b.top_logprobs)
        np.testing.assert_array_equal(a.gold_logprobs, b.gold_logprobs)


def test_the_whole_vocabulary_may_be_asked_for(tmp_path: Path) -> None:
    engine = make_engine(teacher(tiny_model("llama", VOCAB, tmp_path / "model")))
    (answer,) = score(engine, prompts(9), top_k=VOCAB)
    np.testing.assert_allclose(np.exp(answer.top_logprobs.astype(np.float64)).sum(1), 1.0, atol=1e-5)


def test_answers_of_the_wrong_shape_are_refused() -> None:
    (prompt,) = prompts(5)
    rows = np.zeros((4, K), np.float32)
    right = Scores(rows.astype(np.int32), rows - 3, rows[:, 0] - 3)
    check_scores([right], [prompt], K, where="here")
    for wrong, match in (
        ([], "0 answers to 1 prompts"),
        ([right, right], "2 answers"),
        ([Scores(rows.astype(np.int32), rows[:3] - 3, rows[:, 0])], "shapes"),
        ([Scores(rows.astype(np.int32), rows - 3, rows[:, 0] + 1)], "gold_logprobs"),
    ):
        with pytest.raises(EngineError, match=match):
            check_scores(wrong, [prompt], K, where="here")
