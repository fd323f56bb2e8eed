"""The vLLM engine against the transformers engine, and what becomes of its processes."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from fusellm_ray.config import TeacherConfig
from fusellm_ray.teachers.engine import Scores, make_engine
from tests.test_leash import is_gone
from tests.vllm_host import CONTEXT, LENGTHS, VOCAB, K, prompts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What tests/vllm_host.py left behind; it waits with its last engine alive."""
    path = tmp_path_factory.mktemp("vllm")
    log = path / "log"
    with log.open("w") as output:
        host = subprocess.Popen(
            [sys.executable, "-m", "tests.vllm_host", str(path)], stdout=output, stderr=output
        )
    while host.poll() is None and not (path / "seen.json").exists():
        time.sleep(0.2)
    if host.poll() is not None:
        pytest.fail(f"tests.vllm_host ended with {host.returncode}:\n{log.read_text()[-5000:]}")
    (path / "pid").write_text(str(host.pid))
    yield path
    host.kill()
    host.wait()


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "seen.json").read_text())


def load(path: Path) -> list[Scores]:
    with np.load(path) as arrays:
        return [
            Scores(arrays[f"top_ids{i}"], arrays[f"top_logprobs{i}"], arrays[f"gold_logprobs{i}"])
            for i in range(len(arrays) // 3)
        ]


def reference(model: Path, top_k: int = K) -> list[Scores]:
    teacher = TeacherConfig(name="reference", model=str(model), top_k=top_k)
    return asyncio.run(make_engine(teacher).score(prompts(), top_k))


# On GPUs vLLM's attention makes float32 products in TF32.
NEAR = 2e-2 if torch.cuda.is_available() else 1e-4


def assert_same(answers: list[Scores], wanted: list[Scores], atol: float = NEAR) -> None:
    """Equal logprobs, and equal ids wherever a candidate's neighbours are further off than that."""
    assert [len(a.gold_logprobs) for a in answers] == [len(w.gold_logprobs) for w in wanted]
    for answer, want in zip(answers, wanted, strict=True):
        k = answer.top_ids.shape[1]
        assert answer.top_ids.dtype == np.int32
        assert answer.top_logprobs.dtype == answer.gold_logprobs.dtype == np.float32
        np.testing.assert_allclose(answer.top_logprobs, want.top_logprobs[:, :k], atol=atol)
        np.testing.assert_allclose(answer.gold_logprobs, want.gold_logprobs, atol=atol)
        gaps = -np.diff(want.top_logprobs, axis=1, prepend=np.inf)  # to the candidate before
        is_apart = (gaps[:, :k] > atol) & (gaps[:, 1 : k + 1] > atol)
        assert is_apart.sum() >= (0.95 if atol < 1e-3 else 0.5) * is_apart.size
        np.testing.assert_array_equal(answer.top_ids[is_apart], want.top_ids[:, :k][is_apart])


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_scores_equal_the_transformers_engines(architecture: str, folder: Path) -> None:
    assert_same(load(folder / f"{architecture}.npz"), reference(folder / architecture, K + 1))


def test_an_adapter_scores_as_if_merged(folder: Path, seen: dict[str, Any]) -> None:
    merged, plain = reference(folder / "merged", K + 1), reference(folder / "plain", K + 1)
    assert np.abs(merged[1].gold_logprobs - plain[1].gold_logprobs).max() > 0.1
    if seen["is_cpu"]:
        assert_same(load(folder / "merged.npz"), merged)
    else:  # in bfloat16, as adapters are on GPUs
        assert mean_difference(load(folder / "merged.npz"), merged) < 0.05


def test_an_adapter_of_the_head_is_refused(seen: dict[str, Any]) -> None:
    assert seen["adapted_head"].startswith("ModelError: adapter ")
    assert "changes lm_head, which vLLM would apply to some positions only; merge it" in seen["adapted_head"]


def test_what_only_its_build_for_gpus_cannot_do_is_refused_there(seen: dict[str, Any]) -> None:
    assert seen["no_gpu"].startswith(
        "ConfigError: teacher args: resources.num_gpus=0, and this build of vLLM computes"
    )
    assert "LoRA on GPUs computes in half precision only" in seen["float32_adapter"]


def test_replicas_that_share_a_gpu_start_one_after_another(seen: dict[str, Any]) -> None:
    assert seen["turns"] == ["first has started", "second starts"]


def mean_difference(answers: list[Scores], wanted: list[Scores]) -> float:
    """Of gold logprobs, in nats."""
    pairs = [(a.gold_logprobs, w.gold_logprobs) for a, w in zip(answers, wanted, strict=True)]
    return float(np.abs(np.concatenate([a - w for a, w in pairs])).mean())


def test_facts_come_from_the_model(seen: dict[str, Any]) -> None:
    assert seen["vocab_size"] == VOCAB
    assert seen["max_context"] == CONTEXT - 1 == max(LENGTHS)


def test_flat_fallback_gives_the_same_numbers_as_raw_arrays(folder: Path, seen: dict[str, Any]) -> None:
    assert not seen["is_flat"]
    for raw, flat in zip(load(folder / "llama.npz"), load(folder / "flat.npz"), strict=True):
        np.testing.assert_array_equal(raw.top_ids, flat.top_ids)
        np.testing.assert_array_equal(raw.top_logprobs, flat.top_logprobs)
        np.testing.assert_array_equal(raw.gold_logprobs, flat.gold_logprobs)


def test_other_code_in_vllm_is_noticed_and_left_alone(seen: dict[str, Any]) -> None:
    assert seen["why_flat"] == "LogprobsProcessor._update_prompt_logprobs has another signature"


def test_fewer_candidates_are_the_first_of_more(folder: Path) -> None:
    assert_same(load(folder / "fewer.npz"), reference(folder / "llama"))


def test_concurrent_calls_give_each_its_own_answer(folder: Path) -> None:
    assert_same(load(folder / "concurrent.npz"), reference(folder / "llama", K + 1) * 3)


def test_engine_arguments_are_checked_against_vllms_own(seen: dict[str, Any]) -> None:
    where = "ConfigError: teacher args: engine.args."
    assert seen["args.max_num_seq"].startswith(
        f"{where}max_num_seq: vLLM has no such engine argument; did you mean "
    )
    assert seen["args.dtype"].startswith(
        f"{where}dtype: has a key of its own; set the teacher's engine.dtype"
    )
    assert seen["args.enable_prefix_caching"].startswith(f"{where}enable_prefix_caching: cannot be set")
    assert seen["args.seed"] == 7


def test_its_own_metrics_go_through_ray(seen: dict[str, Any]) -> None:
    # The engine counts an answer after giving it, so the last may be missing; a prompt of one token is not sent.
    assert seen["counted"]["vllm_prompt_tokens"] >= 2 * sum(n for n in LENGTHS if n > 1)


def test_a_step_is_as_long_as_its_logits_fit_in_memory_and_refused_where_none_does(
    seen: dict[str, Any],
) -> None:
    if not seen["is_cpu"]:
        pytest.skip("goes by the memory of a CPU")
    assert seen["step_of_1000"] == 8192, "a prompt has 500 tokens at most"
    assert 50 < seen["step_of_100"] < 200, "100, but for what others have taken or freed meanwhile"
    assert seen["step_of_2"].startswith(
        "ConfigError: teacher step: engine.max_num_batched_tokens=8192: the logits of "
    )
    assert "lower that, or use a larger machine" in seen["step_of_2"]


def test_what_the_engine_cannot_take_is_refused_before_it_gets_there(seen: dict[str, Any]) -> None:
    assert "teacher first: prompt 0 has ids 0..300, the model's are 0..299" in seen["foreign_id"]
    assert "top_k=8, started for at most 7" in seen["too_many"]
    for error in (seen["foreign_id"], seen["too_many"]):
        assert error.startswith("EngineError: ")


def test_stop_leaves_no_child(seen: dict[str, Any]) -> None:
    assert seen["children_while_alive"] >= 1
    assert seen["children_after_stop"] == 0
    assert seen["after_stop"] == "EngineError: teacher first: asked to score after it was stopped"


def test_killed_engine_is_reported_with_its_signal_not_waited_for(seen: dict[str, Any]) -> None:
    for error in (seen["pending_at_death"], seen["after_death"]):
        assert error.startswith("EngineError: teacher second: its engine died; process ")
        assert "SIGKILL" in error
    assert seen["death_noticed_s"] < 5


def test_engine_that_does_not_start_says_why(seen: dict[str, Any]) -> None:
    assert seen["damaged"].startswith("EngineError: teacher damaged: vLLM did not start; SafetensorError: ")
    assert seen["children_after_failure"] == 0


def test_no_process_outlives_a_killed_host(folder: Path, seen: dict[str, Any]) -> None:
    """Last: it kills the host."""
    assert len(seen["pids"]) >= 1 + seen["is_cpu"], "an engine core, and on a CPU a worker below it"
    assert all(psutil.pid_exists(pid) for pid in seen["pids"])
    psutil.Process(int((folder / "pid").read_text())).kill()
    assert all(is_gone(pid, within_s=30) for pid in seen["pids"])


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton has no build for this machine")
def test_the_model_runner_of_gpus_scores_alike(tmp_path: Path) -> None:
    """vLLM's V2, its kernels in Triton's interpreter."""
    here = Path(__file__).parent
    environment = os.environ | {
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": f"{here / 'v2_runner'}{os.pathsep}{here.parent}",
    }
    command = [sys.executable, "-m", "tests.vllm_host", str(tmp_path), "float32"]
    subprocess.run(command, check=True, env=environment, timeout=500)
    assert (tmp_path / "runner").read_text() == "V2"
    assert_same(load(tmp_path / "llama.npz"), reference(tmp_path / "llama", K + 1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bfloat16_on_a_gpu_is_near_float32_of_the_reference(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "tests.vllm_host", str(tmp_path), "bfloat16"], check=True)
    answers, wanted = load(tmp_path / "llama.npz"), reference(tmp_path / "llama")
    assert [a.top_ids.shape for a in answers] == [w.top_ids.shape for w in wanted]
    assert mean_difference(answers, wanted) < 0.05
