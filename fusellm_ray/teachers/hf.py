"""The reference engine: a transformers model on a CPU or one GPU.

Prompts are sorted by length and padded on the right, which a causal model cannot see. Where the LM head
applied to the hidden states gives the model's logits, these only ever exist for a chunk of positions.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fusellm_ray.config import TeacherConfig, TransformersEngine
from fusellm_ray.errors import ConfigError, EngineError, ModelError
from fusellm_ray.models import check_head, hidden_states, lm_head, load_causal_lm, model_facts, use_cpu
from fusellm_ray.teachers.engine import Scores, check_scores

_CHUNK_LOGITS = {"cpu": 32 << 20, "cuda": 128 << 20}
"""Logits that exist at once, where the head can be applied apart."""
_WHOLE_LOGITS = 256 << 20
"""Logits of one forward pass, where it cannot."""


class TransformersScorer:
    """Scores prompts with a transformers model, one call at a time, on a thread of its own."""

    problem = None  # it lives in this process, and dies with it

    def __init__(self, teacher: TeacherConfig) -> None:
        if not isinstance(teacher.engine, TransformersEngine):
            raise ConfigError(
                f"teacher {teacher.name}: engine.type={teacher.engine.type}, expected transformers"
            )
        self._name = teacher.name
        self._max_batch_tokens = teacher.engine.max_batch_tokens
        use_cpu(teacher.engine.threads)
        use_gpu = teacher.resources.num_gpus > 0
        if use_gpu and not torch.cuda.is_available():
            raise EngineError(
                f"teacher {teacher.name}: resources.num_gpus={teacher.resources.num_gpus:g}, and this process sees no "
                "CUDA device; set it to 0 to run on the CPU, or install a torch with CUDA"
            )
        self._device = torch.device("cuda" if use_gpu else "cpu")
        facts = model_facts(teacher)
        self._model = load_causal_lm(teacher, dtype=getattr(torch, teacher.engine.dtype))
        torch.nn.Module.to(self._model, self._device)
        self.vocab_size = facts.vocab_size
        self.max_context = teacher.max_context or facts.max_context
        self.max_prompts = 1
        self.model_cpu_s = 0.0
        try:
            check_head(self._model)
            self._head_is_apart = True
        except ModelError:
            # Soft-capped or scaled logits, or no separate head: only the model itself knows its logits.
            self._head_is_apart = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"{teacher.name}-forward")

    async def score(self, prompts: Sequence[NDArray[np.int32]], top_k: int) -> list[Scores]:
        scores = await asyncio.get_running_loop().run_in_executor(self._thread, self._score, prompts, top_k)
        check_scores(scores, prompts, top_k, where=f"teacher {self._name}")
        return scores

    async def stop(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    @torch.inference_mode()
    def _score(self, prompts: Sequence[NDArray[np.int32]], top_k: int) -> list[Scores]:
        longest = max(map(len, prompts), default=0)
        if longest > self.max_context:
            raise EngineError(
                f"teacher {self._name}: a prompt of {longest} tokens exceeds max_context={self.max_context}"
            )
        answers: list[Scores | None] = [None] * len(prompts)
        for members in self._batches([len(prompt) for prompt in prompts]):
            batch = [prompts[i] for i in members]
            started = time.thread_time()
            columns = self._score_batch(batch, top_k)
            self.model_cpu_s += time.thread_time() - started
            bounds = np.cumsum([0] + [len(prompt) - 1 for prompt in batch])
            for i, (start, stop) in zip(members, itertools.pairwise(bounds), strict=True):
                answers[i] = Scores(*(column[start:stop] for column in columns))
        return [answer for answer in answers if answer is not None]

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Indices of prompts of similar length that fit one forward pass, longest first."""
        budget = self._max_batch_tokens
        if not self._head_is_apart:
            budget = min(budget, _WHOLE_LOGITS // self.vocab_size)
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        while order:
            rows = max(1, budget // max(1, lengths[order[0]]))
            yield order[:rows]
            order = order[rows:]

    def _score_batch(
        self, prompts: Sequence[NDArray[np.int32]], top_k: int
    ) -> tuple[NDArray, NDArray, NDArray]:
        """Top ids [P, k], their logprobs [P, k], gold logprobs [P]; P = all prompts' positions end to end."""
        rows, width = len(prompts), max(map(len, prompts))
        padded = np.zeros((rows, width), dtype=np.int64)
        predicts = np.zeros((rows, width), dtype=bool)  # has a next token to be held against
        for row, prompt in enumerate(prompts):
            padded[row, : len(prompt)] = prompt
            predicts[row, : len(prompt) - 1] = True
        input_ids = torch.from_numpy(padded).to(self._device)
        keep = torch.from_numpy(predicts).to(self._device)
        gold = torch.roll(input_ids, -1, dims=1)[keep]

        head: Callable[[Tensor], Tensor]
        if self._head_is_apart:
            positions = torch.arange(width, device=self._device).expand(rows, -1)
            states = hidden_states(self._model, input_ids, positions)[keep]
            weight, bias = lm_head(self._model)
            head = lambda chunk: F.linear(chunk, weight, bias)  # noqa: E731
        else:
            states = self._model(input_ids=input_ids, use_cache=False).logits[keep]
            head = lambda chunk: chunk  # noqa: E731

        size = max(1, _CHUNK_LOGITS[self._device.type] // self.vocab_size)
        ids, logprobs, golds = [], [], []
        for chunk, wanted in zip(states.split(size), gold.split(size), strict=True):
            every = F.log_softmax(head(chunk), dim=-1, dtype=torch.float32)
            top = every.topk(top_k, dim=-1)
            ids.append(top.indices.to(torch.int32))
            logprobs.append(top.values)
            golds.append(every.gather(-1, wanted[:, None])[:, 0])
        return (
            torch.cat(ids).cpu().numpy(),
            torch.cat(logprobs).cpu().numpy(),
            torch.cat(golds).cpu().numpy(),
        )
