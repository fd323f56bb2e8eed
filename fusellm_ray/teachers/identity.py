"""What a teacher's answers depend on: equal here means that one pool can serve several runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusellm_ray.config import AlignmentConfig, TeacherConfig


def engine_settings(teacher: TeacherConfig) -> dict[str, Any]:
    """The engine's settings that its numbers depend on; speed and memory do not count."""
    engine = teacher.engine.model_dump(mode="json")
    return {name: engine[name] for name in ("type", "dtype", "lora", "args") if name in engine}


def answer_settings(teacher: TeacherConfig, alignment: AlignmentConfig) -> dict[str, Any]:
    """Everything in a run's config that a teacher's answers depend on, by the keys people write, but the
    target's tokenizer, which is a file."""
    settings: dict[str, Any] = {
        key: getattr(teacher, key) for key in ("model", "revision", "top_k", "max_context", "add_bos")
    }
    settings |= {f"engine.{key}": value for key, value in engine_settings(teacher).items()}
    return settings | {f"alignment.{key}": value for key, value in alignment.model_dump().items()}


def differences(
    running: Mapping[str, Any], wanted: Mapping[str, Any], by: str = "this config wants"
) -> list[str]:
    """A line for each setting of a running teacher that is not what is wanted of it, and by whom."""
    return [
        f"{key}: it runs with {running.get(key)!r}, {by} {wanted.get(key)!r}"
        for key in sorted({*running, *wanted})
        if running.get(key) != wanted.get(key)
    ]
