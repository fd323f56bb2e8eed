"""An engine without weights: a cost model with deterministic answers, to measure the pipeline around it."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fusellm_ray.compiled import compiled, frozen
from fusellm_ray.config import SimulatedEngine, TeacherConfig
from fusellm_ray.corpus.tokens import ByteTokenizer
from fusellm_ray.errors import ConfigError, EngineError
from fusellm_ray.teachers.engine import Scores

_PATTERNS = 4096
_GOLD_SHARE = 3 / 4
"""Share of positions whose gold token is among the candidates, about what real teachers reach."""
_DEFAULT_CONTEXT = 2048

_STRETCH, _MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)
"""Of a multiplicative hash."""

Patterns = tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]
"""P distributions: distinct ids [P, k], descending logprobs [P, k], and the logprob [P] of a gold token that is
not among them, a quarter of what they leave."""


class SimulatedScorer:
    """Takes as long as the cost model says and answers as a function of the prompt alone.

    Of `teacher.model` only the tokenizer is read. Position q's answer is one of a fixed set of distributions,
    chosen by a hash of the tokens up to q, with the gold token put in at most positions.
    """

    problem = None

    def __init__(self, teacher: TeacherConfig) -> None:
        if not isinstance(teacher.engine, SimulatedEngine):
            raise ConfigError(
                f"teacher {teacher.name}: engine.type={teacher.engine.type}, expected simulated"
            )
        self._name = teacher.name
        self._cost = teacher.engine
        tokenizer = ByteTokenizer.of_model(teacher)
        self.vocab_size = tokenizer.vocab_size
        self.max_context = teacher.max_context or _DEFAULT_CONTEXT
        self.max_prompts = 1
        self.model_cpu_s = 0.0
        self._rng = np.random.default_rng()  # of durations and failures only, never of answers
        self._free_at = 0.0
        self._is_tested = False  # the first call is the replica's self-test, not a request
        self._patterns: dict[int, Patterns] = {}
        time.sleep(self._cost.startup_s)

    async def score(self, prompts: Sequence[NDArray[np.int32]], top_k: int) -> list[Scores]:
        await self._spend(sum(len(prompt) for prompt in prompts))
        is_request, self._is_tested = self._is_tested, True
        if is_request and self._rng.random() < self._cost.failure_rate:
            raise EngineError(
                f"teacher {self._name}: simulated failure (engine.failure_rate={self._cost.failure_rate})"
            )
        return [self._answer(prompt, top_k) for prompt in prompts]

    async def stop(self) -> None:
        self._patterns.clear()

    async def _spend(self, tokens: int) -> None:
        """Wait as a device would that serves one request after the other."""
        if self._cost.tokens_per_s is None:
            return
        duration = tokens / self._cost.tokens_per_s
        if self._cost.jitter:
            duration *= max(0.0, self._rng.normal(1.0, self._cost.jitter))
        now = time.monotonic()
        self._free_at = max(now, self._free_at) + duration
        if self._free_at > now:
            await asyncio.sleep(self._free_at - now)

    def _answer(self, prompt: NDArray[np.int32], top_k: int) -> Scores:
        patterns = self._patterns.get(top_k) or self._make_patterns(top_k)
        num_rows = len(prompt) - 1
        scores = Scores(
            np.empty((num_rows, top_k), np.int32),
            np.empty((num_rows, top_k), np.float32),
            np.empty(num_rows, np.float32),
        )
        num_slots = math.ceil(top_k / _GOLD_SHARE)
        _fill_in(
            frozen(prompt, np.int32),
            *patterns,
            num_slots,
            scores.top_ids,
            scores.top_logprobs,
            scores.gold_logprobs,
        )
        return scores

    def _make_patterns(self, top_k: int) -> Patterns:
        rng = np.random.default_rng([self.vocab_size, top_k])
        # Distinct within a row: an arithmetic progression with a step that no wrap-around repeats.
        start = rng.integers(0, self.vocab_size, (_PATTERNS, 1))
        step = rng.integers(1, max(2, self.vocab_size // top_k), (_PATTERNS, 1))
        ids = ((start + step * np.arange(top_k)) % self.vocab_size).astype(np.int32)
        weights = np.arange(1, top_k + 1) ** -rng.uniform(0.7, 2.5, (_PATTERNS, 1))
        mass = rng.uniform(0.7, 0.99, (_PATTERNS, 1))
        logprobs = np.log(weights / weights.sum(axis=1, keepdims=True) * mass).astype(np.float32)
        tails = np.log((1 - mass[:, 0]) / 4).astype(np.float32)
        self._patterns[top_k] = (ids, logprobs, tails)
        return self._patterns[top_k]


@compiled
def _fill_in(prompt, ids, logprobs, tails, num_slots, top_ids, top_logprobs, gold_logprobs):
    """Fill the last three. The hash is of the running sum: every position depends on all tokens before it."""
    top_k = ids.shape[1]
    prefix = np.uint64(0)
    for q in range(len(prompt) - 1):
        prefix += np.uint64(prompt[q] + 1) * _STRETCH
        mixed = (prefix ^ (prefix >> np.uint64(29))) * _MIX
        pattern = np.int64((mixed >> np.uint64(40)) % np.uint64(len(tails)))
        slot = np.int64((mixed >> np.uint64(20)) % np.uint64(num_slots))
        gold, place = prompt[q + 1], -1
        for c in range(top_k):
            top_ids[q, c], top_logprobs[q, c] = ids[pattern, c], logprobs[pattern, c]
            if ids[pattern, c] == gold:
                place = c
        if place < 0 and slot < top_k:
            place = int(slot)
            top_ids[q, slot] = gold
        gold_logprobs[q] = top_logprobs[q, place] if place >= 0 else tails[pattern]
