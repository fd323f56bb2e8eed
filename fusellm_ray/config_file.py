"""Reading a configuration, and saying what is wrong with one.

    preset (optional)  <  the YAML file  <  dotted overrides ("objective.clm_weight=0.5")

All problems are told at once, a line each; an unknown key with the name that was probably meant.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ValidationError

from fusellm_ray.config import Config
from fusellm_ray.credentials import refuse_credentials
from fusellm_ray.errors import ConfigError

Tree = typing.TypeVar("Tree", bound=BaseModel)

_TAGS = ("transformers", "vllm", "simulated")
"""What pydantic adds to an error's path where `type` decides."""

PRESETS: Mapping[str, dict[str, Any]] = {
    "paper": {
        "teachers": {"top_k": 10},
        "alignment": {"sequence": "dtw", "straddle": "onehot", "projection": "mined"},
        "fusion": {"rule": "min_ce", "granularity": "row", "unit": "nats_per_token", "gate": "frozen_target"},
        "objective": {"clm_weight": 0.9, "divergence": "forward_kl", "tail": "renormalise"},
        "training": {
            "batch_rows": 128,
            "lr": 1e-5,
            "schedule": "cosine",
            "warmup_ratio": 0.008,
            "betas": [0.9, 0.95],
            "weight_decay": 0.1,
            "clip_norm": 1.0,
        },
    },
}
"""Named starting points; `preset: paper` selects the paper's choice everywhere (arXiv 2401.10491). What stands under
`teachers` holds for each of them."""


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file, apply dotted overrides, and validate.

    Args:
        path: the YAML file. Relative paths in it are left as they are: relative to where the run starts.
        overrides: `key.path=value` strings; values are YAML, list items go by index (`teachers.0.top_k=8`).

    Raises:
        ConfigError: naming every problem, one a line.
    """
    tree = read_tree(path)
    for override in overrides:
        apply_override(tree, override)
    return parse_config(tree, where=str(path))


def read_tree(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"config {path}: cannot be read ({error.strerror}); give the path of a YAML file"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"config {path}: byte {error.start} is not UTF-8 ({error.reason}); convert the file"
        ) from None  # the error itself holds the text, which may hold a secret
    try:
        tree = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"config {path}: not valid YAML: {_yaml_problem(error)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"config {path}: expected a mapping of sections, got {type(tree).__name__}")
    return tree


class _Loader(yaml.SafeLoader):
    """Refuses a key that a mapping holds twice, of which YAML's own would keep the last in silence."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            name = (key.tag, str(key.value))
            if name in seen:
                raise yaml.composer.ComposerError(problem="a key is there twice", problem_mark=key.start_mark)
            seen.add(name)
        return node


def parse_config(tree: Mapping[str, Any], where: str = "config") -> Config:
    """Validate an already parsed tree; `preset` in it names a starting point."""
    tree = dict(tree)
    refuse_credentials(tree, where)
    preset = tree.pop("preset", None)
    if preset is not None:
        if not isinstance(preset, str) or preset not in PRESETS:
            raise ConfigError(f"{where}: preset {preset!r} is unknown; known: {', '.join(PRESETS)}")
        tree = _with_preset(preset, tree)
    return validated(Config, tree, where)


def _with_preset(preset: str, tree: Mapping[str, Any]) -> dict[str, Any]:
    """A tree over the preset's."""
    start = dict(PRESETS[preset])
    each = start.pop("teachers")
    merged = _merge(start, tree)
    if isinstance(merged.get("teachers"), list):
        merged["teachers"] = [each | t if isinstance(t, dict) else t for t in merged["teachers"]]
    return merged


def validated(kind: type[Tree], tree: Mapping[str, Any], where: str) -> Tree:
    """A tree as a `kind`, or every problem with it, one a line."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(detail, kind) for detail in error.errors()]
        raise ConfigError(f"{where}: {len(lines)} problem(s)\n  " + "\n  ".join(lines)) from None


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set what `key.path=value` says in a tree of mappings and lists; the value is YAML."""
    dotted, separator, text = override.partition("=")
    if not separator or not dotted:
        key = re.split(r"[^\w.]", override, maxsplit=1)[0]  # what follows it may be meant for nobody's eyes
        raise ConfigError(f"override {key!r}: expected key.path=value")
    where = f"override {dotted!r}"
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: the value is not valid YAML: {_yaml_problem(error)}") from None
    set_dotted(tree, dotted, value, where)


def _yaml_problem(error: yaml.YAMLError) -> str:
    """What is wrong and where, without the text, which may hold a secret."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:  # a character that no YAML may have
        return str(error)
    problem = re.sub(r"'(?!<).{2,}'", "what is there", getattr(error, "problem", None) or "malformed")
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1})"


def set_dotted(tree: dict[str, Any], dotted: str, value: Any, where: str) -> None:
    """Set one value of a tree; `where` is for errors."""
    node: Any = tree
    *parents, last = dotted.split(".")
    for depth, key in enumerate(parents):
        here = ".".join(parents[: depth + 1])
        if isinstance(node, list):
            node = node[_index(node, key, where)]
        else:
            if node.get(key) is None:
                node[key] = {}
            node = node[key]
        if not isinstance(node, dict | list):
            raise ConfigError(f"{where}: {here} is a value, not a section")
    if isinstance(node, list):
        node[_index(node, last, where)] = value
    else:
        node[last] = value


def _index(items: list[Any], key: str, where: str) -> int:
    if not key.isdigit() or int(key) >= len(items):
        raise ConfigError(f"{where}: {key!r} is no index of a list of {len(items)}")
    return int(key)


def _explain(detail: Any, root: type[BaseModel]) -> str:
    location = [part for part in detail["loc"] if part not in _TAGS]
    where = ".".join(str(part) for part in location) or "config"
    if detail["type"] == "extra_forbidden":
        known = _known_keys(detail["loc"][:-1], root)
        if root is Config and len(location) == 1:
            known = sorted([*known, "preset"])
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        meant = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{where}: unknown key; {meant}"
    if detail["type"] == "missing":
        return f"{where}: required, and not given"
    if detail["type"] == "union_tag_not_found":
        unknown = set(map(str, detail["input"])).difference(_known_keys(detail["loc"], root))
        near = difflib.get_close_matches("type", unknown, n=1, cutoff=0.5)
        meant = f"{near[0]!r} was probably meant for it" if near else "not given"
        return f"{where}.type: required, and {meant}; known types: {', '.join(_TAGS)}"
    if detail["type"] == "union_tag_invalid":
        return f"{where}.type: {detail['ctx']['tag']!r} is unknown; known types: {', '.join(_TAGS)}"
    message = str(detail["msg"]).removeprefix("Value error, ")
    seen = detail.get("input")
    if detail["type"] in ("model_type", "model_attributes_type"):
        message = f"expected a section, {where.rpartition('.')[2]}: {{key: value}}"
        if seen in _TAGS:
            message = f"expected a section; write {{type: {seen}}}"
    shown = f" (got {seen!r})" if isinstance(seen, str | int | float | bool) or seen is None else ""
    return f"{where}: {message}{shown}"


def _known_keys(location: tuple[Any, ...], root: type[BaseModel]) -> list[str]:
    """Keys of the section at `location`, an error's path from the root."""
    annotation: Any = root
    for part in location:
        if isinstance(part, int):
            (annotation,) = typing.get_args(annotation)
            continue
        models = _models(annotation)
        tagged = [
            m
            for m in models
            if "type" in m.model_fields and part in typing.get_args(m.model_fields["type"].annotation)
        ]
        if tagged:
            annotation = tagged[0]
            continue
        fields = {name: field.annotation for m in models for name, field in m.model_fields.items()}
        annotation = fields[part]
    return sorted({name for m in _models(annotation) for name in m.model_fields})


def _models(annotation: Any) -> list[type[BaseModel]]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, Annotated):
        return [m for a in typing.get_args(annotation) for m in _models(a)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
