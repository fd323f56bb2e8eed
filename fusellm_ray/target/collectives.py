"""What ranks tell each other: sums, small JSON values, and on CPUs their shards. Nothing is pickled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, Comm, ReduceScatter


def sum_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """Element-wise sum of each rank's values, in float64."""
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


def gather_json(value: Any, *, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's value, by rank.

    Args:
        group: of all ranks; default: the one that trains.
    """
    device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(text)], dtype=torch.int64, device=device), group=group)
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(text)] = text
    parts = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return [json.loads(bytes(part[: int(size)].tolist())) for part, size in zip(parts, sizes, strict=True)]


class _Direct(Comm):
    """How shards travel on CPUs: from each rank to each other one, all at once.

    Gloo's own reduce-scatter sums the whole on every rank before each keeps its shard, twice the bytes; its all-gather
    passes shards on from rank to rank, and copies them on the way.
    """

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Memory for what goes in, and for what comes out."""
        return torch.empty(size, dtype=dtype, device=device)

    @staticmethod
    def exchange(sent: Sequence[Tensor], received: Sequence[Tensor], group: dist.ProcessGroup) -> None:
        """Send the other ranks of a group what is in their places, and fill with theirs; one's own place is left."""
        operations = []
        for peer in range(group.size()):
            if peer != group.rank():
                other = dist.get_global_rank(group, peer)
                operations.append(dist.P2POp(dist.isend, sent[peer], other, group))
                operations.append(dist.P2POp(dist.irecv, received[peer], other, group))
        if operations:  # of one rank, none
            for work in dist.batch_isend_irecv(operations):
                work.wait()


class DirectAllGather(_Direct, AllGather):
    """Parameters: every rank's shard to all ranks."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """Args: output_tensor: [ranks · n], the shards in the order of ranks; input_tensor: [n], this rank's."""
        assert not async_op
        shards = output_tensor.chunk(group.size())
        own = shards[group.rank()]
        if own.data_ptr() != input_tensor.data_ptr():  # FSDP gives the same memory
            own.copy_(input_tensor)
        self.exchange([input_tensor] * group.size(), shards, group)


class DirectReduceScatter(_Direct, ReduceScatter):
    """Gradients: every rank gets the sum over ranks of its shard."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Args: output_tensor: [n], this rank's shard; input_tensor: [ranks · n], the shards in the order of ranks."""
        assert op == dist.ReduceOp.SUM
        assert not async_op
        shards = input_tensor.chunk(group.size())
        theirs = torch.empty_like(input_tensor).chunk(group.size())
        self.exchange(shards, theirs, group)
        output_tensor.copy_(shards[group.rank()])
        for peer in range(group.size()):
            if peer != group.rank():
                output_tensor.add_(theirs[peer])
