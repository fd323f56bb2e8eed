"""Training a small model from nothing, in seconds: Muon, one thread, plain torch.

Matrices inside the blocks take Muon steps, everything else AdamW: in a budget of a few hundred steps that learns
clearly more than AdamW alone. Called in the zoo's processes, once a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast

MUON_LR, ADAM_LR = 0.03, 0.05
_WARMUP_STEPS = 10
_DECAY_SHARE = 0.7
"""The last part of the steps, over which the learning rates fall to nearly zero."""


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, in float32.

    torch.optim.Muon iterates in bfloat16, which CPUs emulate, and one matrix at a time.

    Source: Jordan et al., Muon, https://kellerjordan.github.io/posts/muon/
    """

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)

    def __init__(
        self, matrices: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(list(matrices), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[Tensor]] = {}
            for matrix in group["params"]:
                by_shape.setdefault((min(matrix.shape), max(matrix.shape)), []).append(matrix)
            for matrices in by_shape.values():
                updates = self._orthogonalise([self._momentum(m, group["momentum"]) for m in matrices])
                for matrix, update in zip(matrices, updates, strict=True):
                    rows, columns = matrix.shape
                    scale = max(1.0, rows / columns) ** 0.5
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.add_(update if rows <= columns else update.T, alpha=-group["lr"] * scale)

    def _momentum(self, matrix: Tensor, momentum: float) -> Tensor:
        """Nesterov momentum, wider than tall."""
        state = self.state[matrix]
        average = state.setdefault("momentum", torch.zeros_like(matrix))
        assert matrix.grad is not None
        average.lerp_(matrix.grad, 1 - momentum)
        update = matrix.grad.lerp(average, momentum)
        return update if update.shape[0] <= update.shape[1] else update.T

    def _orthogonalise(self, updates: Sequence[Tensor]) -> Tensor:
        """Newton-Schulz iterations on [matrices, rows, columns]."""
        a, b, c = self.COEFFICIENTS
        x = torch.stack(list(updates))
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(5):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x


def token_rows(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], row_tokens: int) -> Tensor:
    """[rows, row_tokens] int64: documents and their EOS end to end.

    Every other row begins with a BOS, so that the model reads pieces of documents with it and without.
    """
    rust = tokenizer.backend_tokenizer
    stream: list[int] = []
    for encoding in rust.encode_batch_fast(list(texts), add_special_tokens=False):
        stream += encoding.ids
        stream.append(tokenizer.eos_token_id)
    pair = 2 * row_tokens - 1
    body = np.array(stream[: len(stream) // pair * pair], np.int64).reshape(-1, pair)
    rows = np.pad(body, ((0, 0), (1, 0)), constant_values=tokenizer.bos_token_id)
    return torch.from_numpy(rows.reshape(-1, row_tokens))


def pretrain(
    model: PreTrainedModel,
    rows: Tensor,
    *,
    steps: int,
    batch_rows: int,
    seed: int,
    on_step: Callable[[int, float], None],
    lr_scale: float = 1.0,
) -> None:
    """Train in place on `rows` [R, L], in an order drawn from the seed, again when they run out.

    Args:
        lr_scale: of both learning rates; below 1 to continue a trained model.
        on_step: called after each step with its number, from 1, and the mean loss of its tokens in nats.
    """
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    embeddings = {
        id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()
    }
    inner = [p for p in model.parameters() if p.ndim == 2 and id(p) not in embeddings]
    inner_ids = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in inner_ids]
    optimisers: list[torch.optim.Optimizer] = [
        Muon(inner, lr=lr_scale * MUON_LR),
        torch.optim.AdamW(rest, lr=lr_scale * ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: _schedule(step, steps)) for o in optimisers
    ]
    model.train()
    for step in range(steps):
        batch = rows[order[torch.arange(step * batch_rows, (step + 1) * batch_rows) % len(rows)]]
        logits = model(batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser, schedule in zip(optimisers, schedules, strict=True):
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
        on_step(step + 1, loss.item())
    model.eval()


def _schedule(step: int, steps: int) -> float:
    left = (steps - step) / (steps * _DECAY_SHARE)
    return min(1.0, (step + 1) / _WARMUP_STEPS, left + 0.02)
