"""Functions run on several gloo ranks, each in a process of its own."""

import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch.distributed.fsdp", "transformers.modeling_utils", "fusellm_ray.target.checkpoint"]
)


def run_ranks(num_ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call function(mesh, *args) on every rank; return by rank what each returned (no tensors)."""
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(num_ranks, mp_context=_CONTEXT) as pool,
    ):
        futures = [
            pool.submit(_rank, f"file://{folder}/store", rank, num_ranks, function, args)
            for rank in range(num_ranks)
        ]
        return [future.result(timeout=240) for future in futures]


def _rank(store: str, rank: int, num_ranks: int, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=num_ranks)
    mesh: DeviceMesh = init_device_mesh("cpu", (num_ranks,))
    try:
        return function(mesh, *args)
    finally:
        dist.destroy_process_group()
