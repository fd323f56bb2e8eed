"""The passes over tensors as large as a chunk's logits [C, V] or the head.

    outside_mass   of logits: what lies outside a few slots of each row, maximum and mass; the slots are taken out
    spread         of what is left: a factor a row times its softmax numerator, the gradient there
    scale_         of a gradient: times what is upstream

On a GPU Triton kernels make them (`fusion.kernels`), elsewhere PyTorch, in pieces that stay in the CPU's cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CACHE_BYTES = 4 << 20
"""Logits that the passes of one softmax share, for each CPU thread: the size of a second-level cache."""


def outside_mass(logits: Tensor, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take the slots out of `logits`, which are what `spread` needs after it.

    Args:
        logits: [C, V]
        slots: int64 [C, m]

    Returns:
        (what was in the slots [C, m], each row's maximum [C], Σ exp(logits − maximum) outside the slots [C]);
        the first in the type of `logits`, the others float32 or wider.
    """
    gathered = logits.gather(1, slots)
    if has_kernels(logits):
        from fusellm_ray.fusion.kernels import row_mass

        return gathered, *row_mass(logits.scatter_(1, slots, -torch.inf), gathered)
    block = len(logits)
    if logits.device.type == "cpu":
        row_bytes = logits.shape[1] * logits.element_size()
        block = max(1, _CACHE_BYTES // row_bytes) * torch.get_num_threads()
    top, outside = logits.new_empty(len(logits)), logits.new_empty(len(logits))
    for start in range(0, len(logits), max(block, 1)):
        part = slice(start, start + block)
        torch.amax(logits[part], 1, out=top[part])
        masses = logits[part].sub_(top[part, None]).exp_()
        masses.scatter_(1, slots[part], 0.0)
        torch.sum(masses, 1, out=outside[part])
    return gathered, top, outside


def spread(logits: Tensor, top: Tensor, factor: Tensor) -> None:
    """logits := factor · exp(logits − top) outside the slots, 0 in them; after `outside_mass`, which gave `top`."""
    if has_kernels(logits):
        from fusellm_ray.fusion.kernels import scaled_exp_

        scaled_exp_(logits, top, factor)
    else:
        logits.mul_(factor[:, None])


def scale_(values: Tensor, factor: Tensor) -> None:
    """values *= factor, a scalar on their device; for nothing where that is 1, as it mostly is."""
    if has_kernels(values):
        from fusellm_ray.fusion import kernels

        kernels.scale_(values, factor)
    elif values.is_cuda or factor.item() != 1.0:  # asking a GPU for the value would make it wait
        values.mul_(factor)


def has_kernels(tensor: Tensor) -> bool:
    """Whether kernels work on tensors like this one; they widen as they read and narrow as they write."""
    return tensor.is_cuda and tensor.dtype != torch.float64
