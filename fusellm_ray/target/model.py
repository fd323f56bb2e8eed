"""The trainable target: loaded, adapted, sharded over the ranks, and how it is stepped.

    rank 0: safetensors → CPU        other ranks: modules without memory
        └─ block by block: to the device, broadcast, fully_shard → each rank keeps its shard

Rank 0's host holds one whole copy of the model, a device never more than its shards and one block. Master
weights, the reduction of gradients and the optimiser's state are float32; `target.dtype` is the precision of
compute. Blocks also are the units of recomputation and compilation.

Gradients are *summed* over ranks: the loss of a micro-batch is its sum over positions, divided already by the
number of valid tokens of all ranks and micro-batches.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from fusellm_ray.config import LoraConfig, TargetConfig, TrainingConfig
from fusellm_ray.errors import ConfigError, ModelError
from fusellm_ray.models import HeadedModel, build_on_meta, check_head, check_packing, load_causal_lm
from fusellm_ray.target.collectives import DirectAllGather, DirectReduceScatter, sum_over_ranks
from fusellm_ray.target.quantise import is_quantised, keep_trainable, load_quantised, quantised_parameters

# ---------------------------------------------------------------------------------------- build


def build_target(config: TargetConfig, mesh: DeviceMesh) -> HeadedModel:
    """Load the target and shard it over `mesh` (one dimension, all ranks). Every rank must call it.

    Quantised layers are not sharded: each rank loads them for itself.

    The model's own dropout stays off: a step's gradient depends on its rows alone.

    Raises:
        ModelError: it cannot be loaded, or its architecture does not fit the objective.
        ConfigError: LoRA is asked for and PEFT is not installed, or bitsandbytes.
    """
    if config.lora is not None and config.lora.quantise is not None:
        causal_lm = load_quantised(config, mesh)
    elif mesh.get_rank() == 0:
        causal_lm = load_causal_lm(config, dtype=torch.float32, attention=config.attention)
        check_head(causal_lm)
    else:
        causal_lm = build_on_meta(config, attention=config.attention)
    causal_lm.eval()
    if config.lora is not None:
        add_adapters(causal_lm, config.lora)
    keep_trainable(causal_lm)
    model = HeadedModel(causal_lm)
    _shard(model, config, mesh)
    if config.compile or config.attention == "flex_attention":
        # Each layer and each kind of batch may be compiled; what exceeds the limit, of this thread, runs uncompiled.
        torch._dynamo.config.recompile_limit = 256
    check_packing(model)
    if config.compile:  # after the check, whose shapes are no use to training
        for block in transformer_blocks(causal_lm):
            block.forward = torch.compile(block.forward, dynamic=False)
        model.is_compiled = True
    return model


def add_adapters(causal_lm: PreTrainedModel, config: LoraConfig) -> nn.Module:
    """Freeze the model and put LoRA adapters into it, in place.

    Returns:
        PEFT's wrapper around the same modules; only its `merge_and_unload` is of use here.

    Raises:
        ConfigError: PEFT is not installed, or `target_modules` names what is not there or cannot be adapted.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError("target.lora needs PEFT, which is not installed: pip install peft") from error
    if config.target_modules != "all-linear":
        _check_target_modules(causal_lm, config.target_modules)
    alpha: Any = config.alpha  # a whole number by PEFT's annotation alone
    adapters = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=alpha,
        lora_dropout=config.dropout,
        target_modules=config.target_modules,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a run that starts again starts from the same adapters
        try:
            wrapped = peft.get_peft_model(causal_lm, adapters)
        except ValueError as error:
            raise ConfigError(f"target.lora: PEFT refuses it: {error}") from error
    causal_lm.eval()
    for name, module in causal_lm.named_modules():
        if name.endswith("lora_dropout"):
            module.train()
    return wrapped


def _check_target_modules(causal_lm: PreTrainedModel, wanted: list[str]) -> None:
    """Refuse what PEFT would leave out without a word, and what our objective would not train."""
    modules = dict(causal_lm.named_modules())
    where, architecture = "target.lora.target_modules", type(causal_lm).__name__
    head = causal_lm.get_output_embeddings()
    for name in wanted:
        found = [module for at, module in modules.items() if f".{at}".endswith(f".{name}")]
        if not found:
            weights = {at: getattr(module, "weight", None) for at, module in modules.items()}
            known = sorted(
                {at.rpartition(".")[2] for at, w in weights.items() if w is not None and w.dim() == 2}
            )
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
            raise ConfigError(f"{where}: {name!r} is no module of {architecture}; {meant}")
        if head is not None and any(getattr(module, "weight", None) is head.weight for module in found):
            raise ConfigError(
                f"{where}: {name!r} is the LM head of {architecture} or shares its weight, which the objective reads "
                "without adapters; leave it out"
            )


def _shard(model: HeadedModel, config: TargetConfig, mesh: DeviceMesh) -> None:
    precision = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if config.dtype == "bfloat16" else None, reduce_dtype=torch.float32
    )
    blocks = transformer_blocks(model.causal_lm)
    whole = quantised_parameters(model)
    shared: dict[Tensor, Tensor | None] = dict.fromkeys(_shared_tensors(model))
    for block in blocks:
        _materialise(block.modules(), mesh, shared)
        if config.activation_checkpointing:
            # In place of `forward`, inside FSDP's hooks, so that the names of parameters do not change.
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        fully_shard(
            block,
            mesh=mesh,
            mp_policy=precision,
            reshard_after_forward=config.reshard_after_forward,
            ignored_params=whole,
        )
    in_blocks = {module for block in blocks for module in block.modules()}
    _materialise((module for module in model.modules() if module not in in_blocks), mesh, shared)
    fully_shard(model, mesh=mesh, mp_policy=precision, ignored_params=whole)
    model.register_forward_hook(_reshard_after_inference)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            if mesh.size() > 1:  # one rank divides nothing, and would copy its gradients for the factor
                module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other reduction with a factor
            if mesh.device_type == "cpu":
                module.set_custom_all_gather(DirectAllGather())
                module.set_custom_reduce_scatter(DirectReduceScatter())


def _reshard_after_inference(model: nn.Module, _inputs: Any, _output: Any) -> None:
    # FSDP leaves the root (and, without reshard_after_forward, every block) whole for the backward pass that follows.
    # Without one, the whole copies would stay: the optimiser would not reach their parameters, and the next forward
    # would use them as they were.
    if torch.is_grad_enabled():
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def transformer_blocks(causal_lm: PreTrainedModel) -> list[nn.Module]:
    """The repeated layers, in order: units of sharding, recomputation and compilation."""
    num_layers = causal_lm.config.get_text_config().num_hidden_layers
    for module in causal_lm.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return list(module)
    raise ModelError(
        f"{type(causal_lm).__name__}: no list of {num_layers} layers found in it; "
        "choose another architecture as target"
    )


def _slots(modules: Iterable[nn.Module]) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Where the modules' own parameters and buffers are held: (dict, key, tensor); none of quantised layers."""
    for module in modules:
        if is_quantised(module):
            continue
        tensors: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for own in tensors:
            for name, tensor in own.items():
                if tensor is not None:
                    yield own, name, tensor


def _shared_tensors(model: nn.Module) -> list[Tensor]:
    """Tensors in more than one place, such as tied embeddings."""
    counts = Counter(tensor for _, _, tensor in _slots(model.modules()))
    return [tensor for tensor, count in counts.items() if count > 1]


def _materialise(modules: Iterable[nn.Module], mesh: DeviceMesh, shared: dict[Tensor, Tensor | None]) -> None:
    """Give the modules' own tensors rank 0's values, on the mesh's device.

    Args:
        shared: tensor in more than one place → what all of them get, None before the first. Of the others
            nothing is kept: FSDP frees a block's whole parameters when nobody else refers to them.
    """
    for own, name, old in _slots(modules):
        new = shared.get(old)
        if new is None:
            new = _from_rank_0(old, mesh)
            if old in shared:
                shared[old] = new
        own[name] = new


def _from_rank_0(old: Tensor, mesh: DeviceMesh) -> Tensor:
    device = mesh.device_type  # of CUDA devices the current one, which Ray Train has set
    new = torch.empty_like(old, device=device) if old.is_meta else old.detach().to(device).contiguous()
    if mesh.size() > 1:
        dist.broadcast(new, group=mesh.get_group(), group_src=0)
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


# ---------------------------------------------------------------------------------------- step


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW. Weight decay holds for matrices (embeddings too), not for norms and biases."""
    trained = trainable_parameters(model).values()
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, fused=True)


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Learning rate of the step with this index: 0 is the first, config.steps - 1 the last.

    Linear warm-up over warmup_ratio of all steps, which reaches lr at its last step; then the schedule, which
    would reach min_lr_ratio · lr at index config.steps.
    """
    warmup = math.ceil(config.warmup_ratio * config.steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = min((step - warmup) / max(config.steps - warmup, 1), 1.0)
    share = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
    }[config.schedule]
    floor = 1.0 if config.schedule == "constant" else config.min_lr_ratio
    return config.lr * (floor + (1 - floor) * share)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set it for every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale the gradients of all parameters, over all ranks, to a joint 2-norm of at most `max_norm`.

    Returns:
        The norm before, the same on every rank. If it is not finite the gradients are left as they are.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    # On this rank's shards themselves: through DTensor it takes three times as long for a small model.
    shards = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    norm = float(torch.nn.utils.get_total_norm(shards))
    if any(isinstance(g, DTensor) for g in gradients):
        (square,) = sum_over_ranks([norm**2], shards[0].device)
        norm = math.sqrt(square)
    if math.isfinite(norm) and norm > max_norm:
        torch._foreach_mul_(shards, max_norm / norm)
    return norm
