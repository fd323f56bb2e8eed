"""What a run learns of its target while it trains: bits per byte on held-out text, and how it goes on from prompts.

All ranks take part, as a sharded model requires, and make equally many forward passes. Nothing here draws from
the generators that training uses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusellm_ray.config import Config, EarlyStop, EvaluationConfig
from fusellm_ray.corpus.source import Document
from fusellm_ray.corpus.tokens import ByteTokenizer
from fusellm_ray.models import HeadedModel
from fusellm_ray.perplexity import bits_per_byte, sum_over_ranks


def is_due(config: Config, step: int) -> bool:
    """Whether the target is evaluated after this many steps."""
    every = config.evaluation.every_steps
    return step == config.training.steps or bool(every and step % every == 0)


def held_out_figures(
    model: HeadedModel,
    tokenizer: ByteTokenizer,
    documents: Sequence[Document],
    config: Config,
    *,
    rank: int,
    num_ranks: int,
) -> dict[str, float]:
    """Bits per byte by domain, and their mean as `bits_per_byte`; every rank scores its share."""
    scores = sum_over_ranks(
        bits_per_byte(
            model,
            tokenizer,
            documents,
            row_tokens=config.corpus.row_tokens,
            batch_rows=config.training.micro_rows,
            shard=rank,
            num_shards=num_ranks,
        )
    )
    figures = {f"bits_per_byte/{domain}": score.bits_per_byte for domain, score in scores.items()}
    return figures | {"bits_per_byte": math.fsum(figures.values()) / len(figures)}


# ---------------------------------------------------------------------------------------- the best so far


@dataclass(slots=True)
class Best:
    """The least mean bits per byte so far, and how long ago it was seen; saved with every checkpoint."""

    least: float | None = None
    reference: float | None = None
    """What last counted as an improvement, so that many small ones add up to one."""
    num_worse: int = 0
    """Evaluations since then."""

    def add(self, figure: float, early_stop: EarlyStop | None) -> bool:
        """Count one evaluation; True if it is the best so far."""
        is_best = math.isfinite(figure) and (self.least is None or figure < self.least)
        if is_best:
            self.least = figure
        margin = early_stop.min_delta if early_stop else 0.0
        if math.isfinite(figure) and (self.reference is None or figure < self.reference - margin):
            self.reference, self.num_worse = figure, 0
        else:
            self.num_worse += 1
        return is_best

    def is_exhausted(self, early_stop: EarlyStop | None) -> bool:
        """Whether so many evaluations in a row brought nothing that training should end."""
        return early_stop is not None and self.num_worse >= early_stop.patience


# ---------------------------------------------------------------------------------------- samples


@torch.no_grad()
def sample(
    model: HeadedModel, tokenizer: ByteTokenizer, config: EvaluationConfig, *, seed: int, device: torch.device
) -> list[str]:
    """How the target goes on from each prompt, as text; every rank must call it.

    Prompts share one batch of a fixed shape, padded on the right, where a causal model does not look; a token costs
    a whole forward pass, which needs nothing of the model that training does not need.

    Args:
        seed: of the draws, where `config.sample_temperature` is not 0.
    """
    prompts = [tokenizer.sequence(text, ends_document=False).ids for text in config.prompts]
    length = max(len(ids) for ids in prompts) + config.sample_tokens
    pad_id = tokenizer.eos_id or 0
    ids = torch.full((len(prompts), length), pad_id, dtype=torch.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = torch.from_numpy(prompt.astype("int64"))
    ids = ids.to(device)
    positions = torch.arange(length, device=device).expand(len(prompts), -1).contiguous()
    rows = torch.arange(len(prompts), device=device)
    ends = torch.tensor([len(prompt) for prompt in prompts], device=device)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(config.sample_tokens):
        last = ends - 1

        def head(hidden: Tensor, weight: Tensor, bias: Tensor | None, last: Tensor = last) -> Tensor:
            return torch.nn.functional.linear(hidden[rows, last], weight, bias).float()

        logits = model(ids, positions, head).cpu()
        if config.sample_temperature > 0:
            chances = (logits / config.sample_temperature).softmax(-1)
            drawn = torch.multinomial(chances, 1, generator=generator).squeeze(1)
        else:
            drawn = logits.argmax(-1)
        ids[rows, ends] = drawn.to(device)
        ends = ends + 1
    return [
        _text(tokenizer, row[len(prompt) : end].tolist())
        for row, prompt, end in zip(ids, prompts, ends.tolist(), strict=True)
    ]


def _text(tokenizer: ByteTokenizer, ids: list[int]) -> str:
    if tokenizer.eos_id in ids:
        ids = ids[: ids.index(tokenizer.eos_id)]
    # Rows of the head that no token has, and control tokens, spell nothing.
    spelled = [tokenizer.token_bytes[i] or b"" for i in ids if i < len(tokenizer.token_bytes)]
    return b"".join(spelled).decode(errors="replace")
