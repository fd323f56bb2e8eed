"""What went wrong in an actor, without what Ray wrapped around it; light to import."""

from __future__ import annotations

from typing import TypeGuard

from ray.exceptions import RayTaskError

from fusellm_ray.errors import FuseLLMError


def cause_of(error: Exception) -> Exception:
    """The error that a replica raised, without Ray's wrapping."""
    cause = getattr(error, "cause", None) if isinstance(error, RayTaskError) else None
    return cause if isinstance(cause, Exception) else error


def cannot_heal(error: Exception) -> TypeGuard[FuseLLMError]:
    """Whether it is input or settings that another process would refuse as well."""
    return isinstance(error, FuseLLMError) and isinstance(error, ValueError)


def summary_of(error: Exception) -> str:
    """Its type and first line, for logs."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
