"""Training state in a folder: safetensors that any number of ranks writes and reads, and one JSON file.

    shard-00001-model-….safetensors   rank 0's shards of `model.<parameter>`, `optimizer.<entry>.<parameter>`
    shard-00002-model-….safetensors   rank 1's
    state.json                        what else the run needs to go on, and every other file's name and size

Each rank may write into a folder of its own: file names of different ranks differ, and the union is the
checkpoint. state.json is written when all the rest is, and names it: a folder without it, or without a file
it names, is refused, and a file it does not name is not read (another attempt at the step left it). Only
trained parameters are saved; frozen ones come from the model that the config names.

Nothing pickled is ever written to storage or read from it. While ranks of one job save or load, DCP plans by
exchanging pickled Python objects between them.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from transformers import GenerationConfig, PreTrainedModel

from fusellm_ray.config import TargetConfig
from fusellm_ray.errors import CheckpointError
from fusellm_ray.folders import written_whole
from fusellm_ray.models import HeadedModel, load_causal_lm, load_hf_tokenizer
from fusellm_ray.target.collectives import gather_json
from fusellm_ray.target.model import add_adapters, trainable_parameters

STATE_FILE = "state.json"
FORMAT = 3
"""Of the folder; another number is refused."""
FILE_BYTES = 1 << 30
"""Size of a file, about. A file is serialised in memory before it is written."""
_MODEL = "model."
"""What names of a model's tensors begin with."""

# ---------------------------------------------------------------------------------------- write


def training_tensors(model: HeadedModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors of the training state by their names in a checkpoint; the live ones, not copies."""
    return _model_tensors(model.causal_lm) | _optimizer_tensors(model.causal_lm, optimizer)


def model_part(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an export needs of `training_tensors`."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith(_MODEL)}


def write_checkpoint(
    directory: str | Path,
    tensors: dict[str, Tensor],
    state: Mapping[str, Any],
    *,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write tensors and `state` into `directory`, the same on all ranks or one for each.

    Every rank must call it.

    Args:
        tensors: `training_tensors`, or a copy or part of them.
        state: goes into state.json, from rank 0; JSON-able, without the keys `format` and `files`.
        group: over which ranks agree, default: all. One of its own lets another thread write while ranks train.

    Raises:
        CheckpointError: it cannot be written.
    """
    directory = Path(directory)
    try:
        with _quiet():
            writer = HuggingFaceStorageWriter(
                str(directory), fqn_to_index_mapping=_file_numbers(tensors), save_distributed=True
            )
            # What is on the CPU already needs no stream, for which this thread would take memory of the first GPU.
            writer.per_thread_copy_ahead = 0
            dcp.save(
                tensors,
                storage_writer=writer,
                process_group=group,
                no_dist=not dist.is_initialized(),
            )
        files = {path.name: path.stat().st_size for path in directory.glob("*.safetensors")}
        if dist.is_initialized():
            parts = gather_json(files, group=group)
            files = {name: size for part in parts for name, size in part.items()}
        if not dist.is_initialized() or dist.get_rank() == 0:
            _write_state(directory, {**state, "format": FORMAT, "files": dict(sorted(files.items()))})
    except (OSError, dcp.api.CheckpointException) as error:
        raise CheckpointError(f"checkpoint {directory} cannot be written: {error}") from error


def _write_state(directory: Path, state: dict[str, Any]) -> None:
    partial = directory / f"{STATE_FILE}.partial"
    with partial.open("w", encoding="utf-8") as file:
        json.dump(state, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(directory / STATE_FILE)


# ---------------------------------------------------------------------------------------- read


def read_state(directory: str | Path) -> dict[str, Any]:
    """state.json of a complete checkpoint.

    Raises:
        CheckpointError: it is incomplete, damaged, or of another format.
    """
    path = Path(directory) / STATE_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"checkpoint {directory}: no {STATE_FILE}, so it was never finished; use an earlier one"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: unreadable ({error}); use an earlier checkpoint") from error
    require_format(state, str(path))
    for name, size in state["files"].items():
        file = Path(directory) / name
        if file.name != name:
            raise CheckpointError(f"{path}: file name {name!r} leaves the folder; use an earlier checkpoint")
        seen = file.stat().st_size if file.is_file() else None
        if seen != size:
            is_like = "is missing" if seen is None else f"has {seen} bytes instead of {size}"
            raise CheckpointError(f"checkpoint {directory}: {name} {is_like}; use an earlier checkpoint")
    return state


def require_format(state: Any, where: str) -> None:
    """Refuse a state.json of another version of this package."""
    is_ours = (
        isinstance(state, dict) and state.get("format") == FORMAT and isinstance(state.get("files"), dict)
    )
    if not is_ours:
        seen = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(
            f"{where}: format {seen!r}, this version reads {FORMAT}; use the version that wrote it"
        )


def load_checkpoint(directory: str | Path, model: HeadedModel, optimizer: torch.optim.Optimizer) -> None:
    """Read parameters and optimiser state in place; any number of ranks, each reads its own shards.

    Raises:
        CheckpointError: incomplete or damaged, or its tensors are not those of this model.
    """
    causal_lm = model.causal_lm
    tensors = _model_tensors(causal_lm)
    parameters = trainable_parameters(causal_lm)
    with _named_files(directory) as files:
        shapes = _saved_shapes(files)
        _require_same_model(directory, shapes, tensors)
        for key, shape in shapes.items():
            kind, _, rest = key.partition(".")
            if kind == "optimizer":
                entry, _, name = rest.partition(".")
                parameter = parameters[name]
                # AdamW keeps its state on the parameter's device, its step count as a scalar.
                optimizer.state[parameter][entry] = (
                    torch.zeros_like(parameter)
                    if shape == parameter.shape
                    else torch.zeros(shape, dtype=torch.float32, device=parameter.device)
                )
        tensors |= _optimizer_tensors(causal_lm, optimizer)
        _read_tensors(directory, files, tensors)


@contextlib.contextmanager
def _named_files(directory: str | Path) -> Iterator[str]:
    """A temporary folder with links to the files that state.json names, for DCP, which reads all it finds."""
    state = read_state(directory)
    with tempfile.TemporaryDirectory(prefix="fusellm_ray_") as links:
        for name in state["files"]:
            (Path(links) / name).symlink_to((Path(directory) / name).resolve())
        yield links


def explain_changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two runs' identities, a line each, by dotted key; empty if nothing does."""
    before, after = _flatten(saved), _flatten(now)
    keys = [*before, *(key for key in after if key not in before)]
    return [
        f"{key}: was {_shown(before, key)}, is {_shown(after, key)}"
        for key in keys
        if key not in before or key not in after or before[key] != after[key]
    ]


def is_same_order(saved: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a place in one run's corpus is that place in the other's, by their identities."""
    return all(saved[key] == now[key] for key in ("corpus", "batch_rows", "seed"))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
        )
    return flat


def _shown(flat: Mapping[str, Any], key: str) -> str:
    return str(flat[key]) if key in flat else "absent"


# ---------------------------------------------------------------------------------------- export


def export_model(directory: str | Path, target: TargetConfig, out: str | Path) -> Path:
    """Write a checkpoint's model as a folder that transformers and vLLM load, adapters merged, tokenizer too.

    Runs in one process, without a process group. The folder appears complete or not at all. Weights are saved
    in the precision the run computed in (`target.dtype`).

    Raises:
        CheckpointError: the checkpoint is incomplete or of another model, or `out` is in use.
        ModelError: the model the config names, or its tokenizer, cannot be loaded.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not an empty folder; choose another one or remove it")
    read_state(directory)  # before anything large is loaded
    tokenizer = load_hf_tokenizer(target)
    causal_lm = load_causal_lm(target, dtype=torch.float32)
    adapted: Any = add_adapters(causal_lm, target.lora) if target.lora else None
    tensors = _model_tensors(causal_lm)
    with _named_files(directory) as files:
        _require_same_model(directory, _saved_shapes(files), tensors)
        _read_tensors(directory, files, tensors)
    merged = adapted.merge_and_unload() if adapted else causal_lm
    merged.to(getattr(torch, target.dtype))
    _repair_generation_config(merged)
    try:
        with written_whole(out) as partial:
            merged.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error}") from error
    return out


def _repair_generation_config(causal_lm: PreTrainedModel) -> None:
    # Some models ship one that transformers loads and refuses to save (Llama-2: temperature, no sampling).
    try:
        if causal_lm.generation_config is not None:
            causal_lm.generation_config.validate(strict=True)
    except ValueError:
        causal_lm.generation_config = GenerationConfig.from_model_config(causal_lm.config)


# ---------------------------------------------------------------------------------------- tensors


def _model_tensors(causal_lm: nn.Module) -> dict[str, Tensor]:
    return {f"{_MODEL}{name}": p.detach() for name, p in trainable_parameters(causal_lm).items()}


def _optimizer_tensors(causal_lm: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"optimizer.{entry}.{name}": tensor
        for name, parameter in trainable_parameters(causal_lm).items()
        for entry, tensor in optimizer.state.get(parameter, {}).items()
    }


def _file_numbers(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Which file of a rank each tensor goes to; from 1."""
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    numbers, total = {}, 0
    for name, tensor in tensors.items():
        numbers[name] = 1 + total // FILE_BYTES
        total += tensor.numel() * tensor.element_size() // num_ranks
    return numbers


def _saved_shapes(files: str) -> dict[str, torch.Size]:
    metadata = HuggingFaceStorageReader(files).read_metadata()
    return {name: entry.size for name, entry in metadata.state_dict_metadata.items()}  # type: ignore[union-attr]


def _require_same_model(
    directory: str | Path, shapes: Mapping[str, torch.Size], tensors: Mapping[str, Tensor]
) -> None:
    saved = {key: str(list(size)) for key, size in shapes.items() if key.startswith(_MODEL)}
    wanted = {key: str(list(tensor.shape)) for key, tensor in tensors.items()}
    changes = explain_changes(saved, wanted)
    if changes:
        more = f"\n  and {len(changes) - 5} more" if len(changes) > 5 else ""
        raise CheckpointError(
            f"checkpoint {directory}: its trained parameters are not this model's (check target.model and "
            "target.lora):\n  " + "\n  ".join(changes[:5]) + more
        )


def _read_tensors(directory: str | Path, files: str, tensors: dict[str, Tensor]) -> None:
    try:
        with _quiet():
            dcp.load(
                tensors,
                storage_reader=HuggingFaceStorageReader(files),
                no_dist=not dist.is_initialized(),
            )
    except dcp.api.CheckpointException as error:
        raise CheckpointError(
            f"checkpoint {directory} cannot be read: {error}; use an earlier one"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warning that there is no process group, which `no_dist` has said already."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield
