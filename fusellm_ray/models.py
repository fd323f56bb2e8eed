"""Causal language models: facts from their config, safe loading, and the parts that the objective needs.

A `ModelConfig` enters; a `transformers` model leaves. Teachers, the target and evaluation load through here.

The objective never asks a model for logits: it takes hidden states and the LM head and works in chunks. And
rows are packed, so a document must not see the ones before it. `check_structure` proves on the loaded model
that both are sound for its architecture; `check_skeleton` refuses before loading what shows without weights.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from fusellm_ray.config import ModelConfig, TeacherConfig
from fusellm_ray.errors import ModelError

T = TypeVar("T")

HUB_TIMEOUT_S = 5.0
"""How long the hub may take to answer at all before only its cache on this machine is looked at."""
_KEEP_FREED = {-3: 1 << 30, -1: (1 << 31) - 1}
"""glibc's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD, in bytes."""
_SAMPLE_BYTES = 4096
"""Read of each tensor for a fingerprint of weights."""
_SPECIAL = ("flash", "flex")
"""What names of attention hold that does not run on every device and in every type. Transformers replaces a name by
that of the package it comes from: `kernels-community/flash-attn2`."""
_AFTER_HEAD = {
    "final_logit_softcapping": None,
    "logits_scaling": 1,
    "logit_scale": 1,
    "lm_head_multiplier": 1,
}
"""Settings of transformers' configs that change logits after the head, and the value (or None) that does not."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a model's config says about it."""

    architecture: str
    vocab_size: int
    """Rows of the LM head; may exceed the tokenizer's tokens."""
    max_context: int
    num_parameters: int


# ---------------------------------------------------------------------------------------- loading


def use_cpu(threads: int) -> None:
    """Have torch compute with so many threads, and this process keep the memory it frees for the next step.

    glibc gives large blocks back to the kernel, and a fresh page's first touch costs a fault: a fifth of a small
    model's step. Elsewhere nothing is kept.
    """
    torch.set_num_threads(threads)
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for option, value in _KEEP_FREED.items():
            libc.mallopt(option, value)


def model_facts(config: ModelConfig) -> ModelFacts:
    """Read a model's config.json; no weights are loaded.

    Raises:
        ModelError: the model does not exist, is no causal language model, or states no context length, or a
            teacher's max_context exceeds it.
    """
    hf_config = _read_config(config)
    text = hf_config.get_text_config()
    stated = None
    for key in ("max_position_embeddings", "max_seq_len", "seq_length"):
        stated = stated or getattr(text, key, None)
    max_context = stated
    if isinstance(config, TeacherConfig) and config.max_context is not None:
        max_context = config.max_context
        if stated is not None and max_context > stated:
            raise ModelError(
                f"teacher {config.name}: max_context={max_context} exceeds what the config of {config.model} states "
                f"({stated}); lower it to at most {stated}"
            )
    if max_context is None:
        raise ModelError(
            f"{config.model}: its config states no context length (max_position_embeddings); "
            "set max_context for a teacher, choose another model as target"
        )
    skeleton = build_on_meta(config)
    return ModelFacts(
        architecture=type(skeleton).__name__,
        vocab_size=text.vocab_size,
        max_context=max_context,
        num_parameters=sum(p.numel() for p in skeleton.parameters()),
    )


def weights_fingerprint(config: ModelConfig) -> str | None:
    """What tells a model's weights from others under the same name, at the cost of reading a few megabytes.

    Returns:
        A hub model's commit; None where an old cache of this machine does not tell it. For a folder, a digest of
        its config.json and its safetensors; see `folder_fingerprint`.

    Raises:
        ModelError: the model cannot be read.
    """
    folder = Path(config.model).expanduser()
    if folder.is_dir():
        return folder_fingerprint(folder)
    return getattr(_read_config(config), "_commit_hash", None)


def folder_fingerprint(folder: Path) -> str:
    """A digest of a folder's configs and safetensors: their headers, and the first 4 KiB of every tensor.

    Training changes nearly all numbers of a tensor that it changes at all, so its beginning tells.

    Raises:
        ModelError: it holds no safetensors, or a file is damaged.
    """
    digest = hashlib.blake2b(digest_size=16)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder}: no *.safetensors file, seen from this machine; check the path")
    for name in ("config.json", "adapter_config.json"):
        if (folder / name).is_file():
            digest.update((folder / name).read_bytes())
    for path in files:
        digest.update(path.name.encode())
        try:
            with path.open("rb") as file:
                header = file.read(int.from_bytes(file.read(8), "little"))
                digest.update(header)
                start = file.tell()
                tensors = json.loads(header)
                tensors.pop("__metadata__", None)
                for begin, end in sorted(tensor["data_offsets"] for tensor in tensors.values()):
                    file.seek(start + begin)
                    digest.update(file.read(min(_SAMPLE_BYTES, end - begin)))
        except (OSError, ValueError, TypeError, LookupError, OverflowError, MemoryError) as error:
            raise ModelError(
                f"{path}: is no safetensors file ({type(error).__name__}: {error}); save the model again"
            ) from error
    return digest.hexdigest()


def load_causal_lm(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    attention: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Load a model's weights from safetensors onto the CPU, in eval mode.

    Args:
        attention: implementation by transformers' name; None is the architecture's own default.
        options: further arguments of from_pretrained.

    Raises:
        ModelError: missing folder, no safetensors, hub id out of reach, or no causal language model.
    """

    def load(name: str, **kwargs: Any) -> PreTrainedModel:
        # With PEFT installed, transformers looks for an adapter too, and would ask the hub for it.
        adapter = {"local_files_only": kwargs["local_files_only"]}
        return AutoModelForCausalLM.from_pretrained(
            name, adapter_kwargs=adapter, use_safetensors=True, **kwargs
        )

    return _from_pretrained(load, config, **_kind(dtype, attention), **(options or {}))


def build_on_meta(
    config: ModelConfig, *, dtype: torch.dtype = torch.float32, attention: str | None = None
) -> PreTrainedModel:
    """Build the model's modules on the meta device: shapes and names, no memory."""
    hf_config = _read_config(config)
    with torch.device("meta"):
        return _explained(
            config,
            AutoModelForCausalLM.from_config,
            hf_config,
            trust_remote_code=config.trust_remote_code,
            **_kind(dtype, attention),
        )


def load_hf_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer as transformers has it.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    return _from_pretrained(AutoTokenizer.from_pretrained, config, needs_weights=False)


def _kind(dtype: torch.dtype, attention: str | None) -> dict[str, Any]:
    return {"dtype": dtype, "attn_implementation": attention}


def _read_config(config: ModelConfig) -> PretrainedConfig:
    return _from_pretrained(AutoConfig.from_pretrained, config)


def _from_pretrained(
    load: Callable[..., T], config: ModelConfig, *, needs_weights: bool = True, **kwargs: Any
) -> T:
    name, is_local = _origin(config, needs_weights)
    return _explained(
        config,
        load,
        name,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        local_files_only=is_local,
        **kwargs,
    )


_PICKLED = "pickled weights (.bin, .pt) are never loaded, convert them by model.save_pretrained(folder)"


def _origin(config: ModelConfig, needs_weights: bool) -> tuple[str, bool]:
    """The folder or hub id, and whether only this machine is asked; what is no model of ours is refused."""
    folder = Path(config.model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{config.model}: the folder has no config.json; give a folder that save_pretrained wrote"
            )
        if needs_weights and not any(folder.glob("*.safetensors")):
            raise ModelError(f"{config.model}: the folder has no *.safetensors file; {_PICKLED}")
        return str(folder), True
    if config.model.count("/") > 1 or config.model.startswith((".", "/", "~")):
        raise ModelError(f"{config.model}: no such folder (seen from this machine); check the path")
    files = _hub_files(config)
    # transformers would ask a service on the web to convert what has none, with the user's token.
    if needs_weights and files and not any(file.endswith(".safetensors") for file in files):
        raise ModelError(f"{_versioned(config)}: has no *.safetensors file on the hub; {_PICKLED}")
    return config.model, files is None


def _hub_files(config: ModelConfig) -> list[str] | None:
    """The files that the hub lists, none where it knows no such model; None: it does not answer.

    One short attempt: transformers itself retries for half a minute per file when there is no network.
    """
    if constants.is_offline_mode():
        return None
    try:
        info = HfApi().model_info(config.model, revision=config.revision, timeout=HUB_TIMEOUT_S)
    except HfHubHTTPError:  # an answer; loading says what is wrong
        return []
    except Exception:  # whatever the HTTP library raises, the cache is what is left
        return None
    return [file.rfilename for file in info.siblings or []]


def _versioned(config: ModelConfig) -> str:
    return f"{config.model}@{config.revision}" if config.revision else config.model


def _explained(config: ModelConfig, load: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    try:
        return load(*args, **kwargs)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, AttributeError) as error:
        raise ModelError(f"{_versioned(config)}: cannot be loaded; {_advice(error)}") from error


def _advice(error: Exception) -> str:
    text = str(error).strip()
    if "trust_remote_code" in text:
        return "it ships its own code: read that code, then set trust_remote_code: true"
    if "attn_implementation" in text:
        return (
            "it does not support the attention implementation asked for: set target.attention to another one"
        )
    first = text.splitlines()[0] if text else type(error).__name__
    if isinstance(error, OSError):
        return (
            f"{first} (a folder must be visible from this machine; a hub id needs network or a filled cache, "
            "and a model with safetensors)"
        )
    return first


# ---------------------------------------------------------------------------------------- parts


def hidden_states(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, *, is_compiled: bool = False
) -> Tensor:
    """Final hidden states, what the LM head reads.

    Args:
        input_ids: [B, L].
        position_ids: [B, L], restarting at 0 where a document starts; documents do not attend to each other.
        is_compiled: its blocks are; they would be again for every other number of documents.

    Returns:
        [B, L, d]
    """
    rows, length = input_ids.shape
    options: dict[str, Any] = {}
    if "flash" in _attention(model):
        # Flash attention separates documents only in a batch of one row: lay the rows end to end.
        input_ids, position_ids = input_ids.reshape(1, -1), position_ids.reshape(1, -1)
        if not is_compiled:
            options = _document_bounds(position_ids[0], length)
    elif "flex" in _attention(model):
        # Not the kernel for decoding, which short rows would get: it has no configuration for some shapes.
        options = {"kernel_options": {"BACKEND": "TRITON"}}
    # Without a mask and a cache, transformers derives the block-diagonal mask from restarting positions.
    output = model.base_model(
        input_ids=input_ids, position_ids=position_ids, attention_mask=None, use_cache=False, **options
    )
    return output.last_hidden_state.reshape(rows, length, -1)


def _document_bounds(position_ids: Tensor, longest: int) -> dict[str, Any]:
    """Where documents begin and end, for flash attention: each layer would find out again, and make a GPU wait.

    Args:
        position_ids: [N]
        longest: no document is longer.
    """
    starts = (position_ids == 0).nonzero().squeeze(1)
    bounds = nn.functional.pad(starts, (0, 1), value=len(position_ids)).to(torch.int32)
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def lm_head(model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    """The LM head's weight [V, d] and its bias [V], if it has one."""
    head = model.get_output_embeddings()
    return head.weight, getattr(head, "bias", None)


class HeadedModel(nn.Module):
    """A causal model whose forward applies a function to its hidden states and LM head, never to its logits.

    The function runs inside `forward`, where a sharded model's head weight is whole and its gradient will be
    reduced.
    """

    def __init__(self, causal_lm: PreTrainedModel) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.is_compiled = False
        """Whether its blocks are."""

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, head: Callable[[Tensor, Tensor, Tensor | None], T]
    ) -> T:
        """Return head(hidden [B, L, d], weight [V, d], bias [V] or None).

        What `head` returns must be a tensor, or tuples, lists and dicts of tensors: there FSDP looks for
        gradients.
        """
        hidden = hidden_states(self.causal_lm, input_ids, position_ids, is_compiled=self.is_compiled)
        return head(hidden, *lm_head(self.causal_lm))


def _attention(model: PreTrainedModel) -> str:
    return model.config._attn_implementation or "eager"


# ---------------------------------------------------------------------------------------- proofs


def check_structure(model: PreTrainedModel) -> None:
    """Prove on the loaded model that the objective may use it: see `check_head` and `check_packing`."""
    check_head(model)
    check_packing(HeadedModel(model))


def check_skeleton(model: PreTrainedModel, attention: str = "sdpa") -> None:
    """Check what modules and config tell: nothing is computed, so the model may be on the meta device.

    Args:
        attention: what the loaded model will attend with.

    Raises:
        ModelError: `check_head` or `check_packing` would refuse the model once it is loaded.
    """
    _check_parts(model)
    _check_exchange(model, attention)
    config = model.config.get_text_config()
    for key, neutral in _AFTER_HEAD.items():
        # Only an architecture that declares a setting obeys it.
        value = getattr(config, key, None) if hasattr(type(config), key) else None
        if value not in (None, neutral):
            raise ModelError(
                f"{type(model).__name__}: its config sets {key}={value}, which changes logits after the head "
                "(soft-capping, scaling), and the objective cannot follow: choose another architecture as target"
            )


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Check that hidden states times the LM head are the model's own logits, whatever its attention.

    Raises:
        ModelError: they are not, for example because the architecture caps or scales its logits.
    """
    name = type(model).__name__
    _check_parts(model)
    input_ids, position_ids = _probe(model.get_output_embeddings().weight)
    with _portable_attention(model):
        own = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
        if not isinstance(own, Tensor):
            raise ModelError(f"{name}: returns no logits; choose another architecture as target")
        ours = nn.functional.linear(hidden_states(model, input_ids, position_ids), *lm_head(model))
    error = _relative_error(ours, own)
    if not error < (1e-4 if own.dtype == torch.float32 else 0.1):
        raise ModelError(
            f"{name}: hidden states times the LM head are not its logits (relative error {error:.1e}); "
            "it changes logits after the head (soft-capping, scaling), which the objective cannot follow: "
            "choose another architecture as target"
        )


@torch.no_grad()
def check_packing(model: HeadedModel) -> None:
    """Check that documents packed in one row neither see each other nor differ from being alone.

    Works on a sharded model too; then every rank must call it.

    Raises:
        ModelError: the architecture (or its attention implementation) lets documents of a row see each other.
    """
    causal_lm = model.causal_lm
    where = f"{type(causal_lm).__name__} with attention {_attention(causal_lm)!r}"
    _check_takes_positions(causal_lm)
    input_ids, position_ids = _probe(next(causal_lm.parameters()))
    changed = input_ids.clone()
    changed[:, :_CUT] = changed[:, :_CUT].flip(1)  # other tokens in each row's first document

    def run(ids: Tensor, positions: Tensor) -> Tensor:
        return model(ids, positions, lambda hidden, _weight, _bias: hidden)

    packed = run(input_ids, position_ids)[:, _CUT:]
    disturbed = run(changed, position_ids)[:, _CUT:]
    alone = run(input_ids[:, _CUT:].contiguous(), position_ids[:, _CUT:].contiguous())
    what_to_do = "set target.attention to sdpa, or choose an architecture that follows position_ids"
    leak = _relative_error(disturbed, packed)
    # A mixture's experts get other numbers of rows then, and kernels that round otherwise.
    if not leak < (1e-5 if packed.dtype == torch.float32 else 0.02):
        raise ModelError(
            f"{where}: hidden states change with the document packed before theirs (relative {leak:.1e}); "
            + what_to_do
        )
    shift = _relative_error(packed, alone)
    if not shift < (1e-3 if packed.dtype == torch.float32 else 0.1):
        raise ModelError(
            f"{where}: hidden states of a packed document differ from its own alone (relative {shift:.1e}); "
            + what_to_do
        )


_CUT = 6
"""Tokens of the first document in each row of the probe."""


def _probe(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Two rows of two documents each: ids [2, 16] and positions that restart at `_CUT`."""
    length = 16
    ids = (torch.arange(2 * length).reshape(2, length) * 7 + 1) % 31  # every model has 31 tokens
    positions = torch.cat([torch.arange(_CUT), torch.arange(length - _CUT)]).expand(2, -1)
    return ids.to(weight.device), positions.contiguous().to(weight.device)


@contextlib.contextmanager
def _portable_attention(model: PreTrainedModel) -> Iterator[None]:
    """Attend meanwhile with what runs everywhere."""
    own = _attention(model)
    if not _is_special(own):
        yield
        return
    _check_exchange(model, own)
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        yield
    finally:
        model.config._attn_implementation = own


def _is_special(attention: str) -> bool:
    return any(kind in attention for kind in _SPECIAL)


def _check_exchange(model: PreTrainedModel, attention: str) -> None:
    if _is_special(attention) and not model._can_set_attn_implementation():
        raise ModelError(
            f"{type(model).__name__}: its LM head cannot be checked under target.attention={attention}, as this class "
            "cannot change to another attention meanwhile; set target.attention to sdpa or eager"
        )


def _check_parts(model: PreTrainedModel) -> None:
    head = model.get_output_embeddings()
    if model.base_model is model or getattr(head, "weight", None) is None or head.weight.dim() != 2:
        raise ModelError(
            f"{type(model).__name__}: no separate body and linear LM head; choose another architecture as target"
        )
    _check_takes_positions(model)


def _check_takes_positions(model: PreTrainedModel) -> None:
    parameters = inspect.signature(model.base_model.forward).parameters
    if "position_ids" not in parameters:
        raise ModelError(
            f"{type(model).__name__}: takes no position_ids, so documents packed in a row cannot be kept "
            "apart; choose another architecture as target"
        )


def _relative_error(seen: Tensor, wanted: Tensor) -> float:
    return ((seen - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)).item()
