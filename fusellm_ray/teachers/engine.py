"""What a teacher's replica asks of an engine: prompts of token ids in, top-k logprobs out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fusellm_ray.config import TeacherConfig, TransformersEngine, VllmEngine
from fusellm_ray.errors import EngineError


@dataclass(frozen=True, slots=True)
class Scores:
    """Distributions of one prompt of m tokens; row q is the prediction of token q+1.

    Example:
        A prompt of 5 tokens scored with top_k=16: top_ids and top_logprobs [4, 16], gold_logprobs [4].
    """

    top_ids: NDArray[np.int32]
    """[m-1, k], by descending logprob."""
    top_logprobs: NDArray[np.float32]
    """[m-1, k], natural logarithms over the whole vocabulary at temperature 1."""
    gold_logprobs: NDArray[np.float32]
    """[m-1], logprob of the prompt's own next token, whether or not it is in the top k."""


class Engine(Protocol):
    """A model that scores prompts. Answers depend on nothing but the prompts of one call."""

    vocab_size: int
    """Rows of the output head; may exceed the tokenizer's length."""
    max_context: int
    """Tokens of the longest prompt it takes."""
    max_prompts: int
    """Prompts that it scores at once; 1 where calls are served one after the other."""
    model_cpu_s: float
    """CPU seconds that this process has spent in the model so far; NaN where another process does the work."""

    @property
    def problem(self) -> str | None:
        """Why it can score no more, None while it can."""
        ...

    async def score(self, prompts: Sequence[NDArray[np.int32]], top_k: int) -> list[Scores]:
        """Score each prompt alone.

        Args:
            prompts: ids [m] with 1 <= m <= max_context.
            top_k: candidates a position.

        Raises:
            EngineError: the answer is not finite, or not what was asked for.
        """
        ...

    async def stop(self) -> None:
        """Give back memory and processes. Idempotent."""
        ...


def make_engine(teacher: TeacherConfig) -> Engine:
    """Load the teacher's model into the engine its config names; only that engine's library is imported."""
    engine = teacher.engine
    if isinstance(engine, TransformersEngine):
        from fusellm_ray.teachers.hf import TransformersScorer

        return TransformersScorer(teacher)
    if isinstance(engine, VllmEngine):
        from fusellm_ray.teachers.vllm import VllmScorer

        return VllmScorer(teacher)
    from fusellm_ray.teachers.simulated import SimulatedScorer

    return SimulatedScorer(teacher)


def check_scores(
    scores: Sequence[Scores], prompts: Sequence[NDArray[np.int32]], top_k: int, where: str
) -> None:
    """Refuse answers of the wrong shape or with numbers that are no logprobs.

    Raises:
        EngineError: naming `where`, the prompt and what was seen.
    """
    if len(scores) != len(prompts):
        raise EngineError(f"{where}: {len(scores)} answers to {len(prompts)} prompts")
    for at, (answer, prompt) in enumerate(zip(scores, prompts, strict=True)):
        rows = len(prompt) - 1
        shapes = (answer.top_ids.shape, answer.top_logprobs.shape, answer.gold_logprobs.shape)
        if shapes != ((rows, top_k), (rows, top_k), (rows,)):
            raise EngineError(
                f"{where}: prompt {at} of {len(prompt)} tokens got shapes {shapes}, "
                f"expected {rows} rows and k={top_k}"
            )
        for name in ("top_logprobs", "gold_logprobs"):
            values = getattr(answer, name)
            # Zero-initialised maximum: prompts of one token have no rows.
            if np.isnan(values).any() or values.max(initial=-np.inf) > 1e-3:
                raise EngineError(
                    f"{where}: prompt {at} got {name} that are NaN or positive; the weights are damaged or "
                    "overflow in this dtype, try engine.dtype=float32"
                )
