"""What every engine promises, asked of each of them; and vLLM's faults that only its engine can have."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from fusellm_ray.config import TeacherConfig
from fusellm_ray.errors import EngineError
from fusellm_ray.teachers.engine import Scores
from fusellm_ray.teachers.scoring import join_windows, windows
from tests.engine_host import HostedEngine
from tests.vllm_host import CONTEXT, VOCAB, K, build

NAN_TOKEN = VOCAB - 1
"""Its embedding is damaged: a prompt that holds it has no distributions, any other has."""

ENGINES = {
    "transformers": {"type": "transformers", "max_batch_tokens": 256},
    "vllm": {"type": "vllm", "dtype": "float32", "max_num_batched_tokens": 64, "max_num_seqs": 4},
}
pytestmark = pytest.mark.slow
only_vllm = pytest.mark.parametrize("engine", ["vllm"], indirect=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = build("llama", tmp_path_factory.mktemp("engines"))
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.model.embed_tokens.weight[NAN_TOKEN] = float("nan")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=sorted(ENGINES))
def engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[HostedEngine]:
    if request.param == "vllm" and importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    hosted = HostedEngine(
        TeacherConfig.model_validate(
            {"name": "tiny", "model": str(folder), "top_k": K, "engine": ENGINES[request.param]}
        )
    )
    yield hosted
    hosted.stop()


def prompts(*lengths: int) -> list[NDArray[np.int32]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, NAN_TOKEN, n, dtype=np.int32) for n in lengths]


async def score(engine: Any, asked: Sequence[NDArray[np.int32]]) -> list[Scores]:
    return await engine.score(asked, K)


async def score_at_once(engine: Any, asked: Sequence[NDArray[np.int32]]) -> list[Scores]:
    calls = await asyncio.gather(*(engine.score([prompt], K) for prompt in asked))
    return [scores for (scores,) in calls]


def assert_is(answer: Scores, prompt: NDArray[np.int32], wanted: NDArray[np.float64]) -> None:
    """`wanted`: logprobs of all tokens at each position, [m-1, V]."""
    assert (answer.top_ids.shape, answer.top_ids.dtype) == ((len(prompt) - 1, K), np.int32)
    assert answer.top_logprobs.dtype == answer.gold_logprobs.dtype == np.float32
    np.testing.assert_allclose(answer.top_logprobs, -np.sort(-wanted, axis=1)[:, :K], atol=1e-4)
    at_ids = np.take_along_axis(wanted, answer.top_ids.astype(np.int64), 1)
    np.testing.assert_allclose(at_ids, answer.top_logprobs, atol=1e-4)
    gold = np.take_along_axis(wanted, prompt[1:, None].astype(np.int64), 1)[:, 0]
    np.testing.assert_allclose(answer.gold_logprobs, gold, atol=1e-4)


def log_softmax(folder: Path, prompt: NDArray[np.int32]) -> NDArray[np.float64]:
    """[m-1, V], in float64, of the model's own logits."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        logits = model(torch.from_numpy(prompt.astype(np.int64))[None]).logits[0, :-1]
    return torch.log_softmax(logits, -1).numpy()


@pytest.mark.parametrize("ask", [score, score_at_once])
def test_each_prompt_gets_its_own_rows_ids_and_gold(engine: HostedEngine, folder: Path, ask: Any) -> None:
    asked = prompts(3, 40, engine.max_context, 1, 2, 90, 17, 40)
    answers = engine.call(ask, asked)
    assert len(answers) == len(asked)
    for prompt, answer in zip(asked, answers, strict=True):
        assert_is(answer, prompt, log_softmax(folder, prompt) if len(prompt) > 1 else np.zeros((0, VOCAB)))


def test_no_prompts_give_no_scores(engine: HostedEngine) -> None:
    assert engine.call(score, []) == []


def test_a_prompt_longer_than_the_context_is_an_engine_error(engine: HostedEngine) -> None:
    assert engine.max_context in (CONTEXT - 1, CONTEXT)
    length = engine.max_context + 1
    with pytest.raises(EngineError, match=rf"teacher tiny: .*{length} tokens.*{engine.max_context}"):
        engine.call(score, prompts(5, length))


def test_a_text_longer_than_the_context_gets_all_rows_each_with_its_windows_context(
    engine: HostedEngine, folder: Path
) -> None:
    (text,) = prompts(3 * CONTEXT + 11)
    pieces = windows(text, engine.max_context, None)
    assert len(pieces) > 3
    answers = engine.call(score, [prompt for prompt, _ in pieces])
    whole = join_windows([(a, kept) for a, (_, kept) in zip(answers, pieces, strict=True)], K)
    assert_is(whole, text, np.concatenate([log_softmax(folder, p)[-kept:] for p, kept in pieces]))
    # The rows of the first window are those of a model that reads it all; the next have lost context.
    alone = log_softmax(folder, text[: engine.max_context])
    assert_is(
        Scores(*(a[: len(alone)] for a in (whole.top_ids, whole.top_logprobs, whole.gold_logprobs))),
        text[: engine.max_context],
        alone,
    )


def test_nan_is_an_engine_error_and_harms_no_prompt_after_it(engine: HostedEngine, folder: Path) -> None:
    (well,) = prompts(40)
    damaged = well.copy()
    damaged[20] = NAN_TOKEN
    with pytest.raises(EngineError, match="teacher tiny: prompt 1 got top_logprobs that are NaN"):
        engine.call(score, [well, damaged])
    for _ in range(3):
        (answer,) = engine.call(score, [well])
        assert_is(answer, well, log_softmax(folder, well))


# ---------------------------------------------------------------------------------------- vLLM alone


async def self_test_with_a_limit_of(engine: Any, nats: float) -> None:
    with mock.patch("fusellm_ray.teachers.vllm._SELF_TEST_NATS", nats):
        await engine.self_test()


async def score_with_rows_out_of_place(engine: Any, prompt: NDArray[np.int32]) -> list[Scores]:
    """As in vllm issue 44106."""
    generate = engine._engine.generate

    async def misplacing(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        async for reply in generate(*args, **kwargs):
            reply.prompt_logprobs = [
                chunk and chunk._replace(logprob_token_ids=np.roll(chunk.logprob_token_ids, 1, axis=0))
                for chunk in reply.prompt_logprobs
            ]
            yield reply

    with mock.patch.object(engine._engine, "generate", misplacing):
        return await engine.score([prompt], K)


async def requests_left_after_one_failed(engine: Any, asked: Sequence[NDArray[np.int32]]) -> int:
    """Of vLLM's, a moment after the shortest prompt's failed."""
    generate = engine._engine.generate

    async def failing(request: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        async for reply in generate(request, *args, **kwargs):
            if len(request["prompt_token_ids"]) == 2:
                raise ValueError("a fault")
            yield reply

    with mock.patch.object(engine._engine, "generate", failing), pytest.raises(EngineError, match="a fault"):
        await engine.score(asked, K)
    await asyncio.sleep(0.05)
    return engine._engine.get_num_unfinished_requests()


@only_vllm
def test_a_self_test_that_fails_is_an_engine_error(engine: HostedEngine) -> None:
    engine.call(self_test_with_a_limit_of, 1e-3)
    with pytest.raises(EngineError, match="teacher tiny: self-test failed, a prefix's logprobs change by"):
        engine.call(self_test_with_a_limit_of, -1.0)


@only_vllm
def test_rows_about_another_token_are_refused(engine: HostedEngine) -> None:
    (prompt,) = prompts(9)
    with pytest.raises(EngineError, match=f"prompt 0, row 0 is about token {prompt[-1]}, the prompt goes on"):
        engine.call(score_with_rows_out_of_place, prompt)


@only_vllm
def test_where_one_prompt_fails_the_engine_drops_the_others_of_its_call(
    engine: HostedEngine, folder: Path
) -> None:
    assert engine.call(requests_left_after_one_failed, prompts(2, *[CONTEXT - 1] * 300)) == 0
    (prompt,) = prompts(30)
    (answer,) = engine.call(score, [prompt])
    assert_is(answer, prompt, log_softmax(folder, prompt))
