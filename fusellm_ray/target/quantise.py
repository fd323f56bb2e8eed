"""QLoRA: the target's frozen linear layers in 4 bits, by bitsandbytes, on a GPU or a CPU.

FSDP keeps its hands off them: a 4-bit weight is no tensor that could be cut. Each rank quantises for itself what it
loads, which gives the same bits everywhere.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import BitsAndBytesConfig, PreTrainedModel

from fusellm_ray.config import TargetConfig
from fusellm_ray.errors import ConfigError
from fusellm_ray.models import check_head, load_causal_lm


def load_quantised(config: TargetConfig, mesh: DeviceMesh) -> PreTrainedModel:
    """Load the target with its linear layers (but for the head) in NF4, on the mesh's device.

    Raises:
        ConfigError: bitsandbytes is not installed.
        ModelError: the model cannot be loaded, or its head does not fit the objective.
    """
    require_bitsandbytes()
    device = f"cuda:{torch.cuda.current_device()}" if mesh.device_type == "cuda" else mesh.device_type
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, config.dtype),
    )
    causal_lm = load_causal_lm(
        config,
        dtype=torch.float32,
        attention=config.attention,
        options={"quantization_config": quantisation, "device_map": {"": device}},
    )
    keep_trainable(causal_lm)
    check_head(causal_lm)
    return causal_lm


def require_bitsandbytes() -> None:
    """Raise a ConfigError where bitsandbytes is missing."""
    for package in ("bitsandbytes", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"target.lora.quantise needs {package}, which is not installed: pip install {package}"
            )


def is_quantised(module: nn.Module) -> bool:
    """Whether the module's own weight is in 4 bits."""
    return any(hasattr(parameter, "quant_state") for parameter in module.parameters(recurse=False))


def quantised_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The 4-bit weights of a model, and the biases beside them."""
    return {p for module in _quantised(model) for p in module.parameters(recurse=False)}


def keep_trainable(model: nn.Module) -> None:
    """Undo what `eval` does to quantised layers: on some CPUs it repacks weights so that no gradient passes them."""
    for module in _quantised(model):
        module.train()


def _quantised(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if is_quantised(module))
