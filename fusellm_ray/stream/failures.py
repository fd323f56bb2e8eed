"""What went wrong in an actor, without what Ray wrapped around it; light to import."""

from __future__ import annotations

from ray.exceptions import RayTaskError


def cause_of(error: Exception) -> Exception:
    """The error that a replica raised, without Ray's wrapping."""
    cause = getattr(error, "cause", None) if isinstance(error, RayTaskError) else None
    return cause if isinstance(cause, Exception) else error


def summary_of(error: Exception) -> str:
    """Its type and first line, for logs."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
