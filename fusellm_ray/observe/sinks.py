"""A run's figures in TensorBoard, Weights & Biases or MLflow, beside the record in metrics.jsonl.

The driver feeds them the very records that it writes. Addresses and keys are those services' own business: they read
WANDB_*, MLFLOW_* and their login files, and no configuration here holds a secret. A sink that fails while training
goes on is given up, with one note: metrics.jsonl has everything.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from fusellm_ray.errors import ConfigError
from fusellm_ray.folders import is_uri, last_name

PROJECT = "fusellm_ray"
"""W&B project and MLflow experiment, unless the service's own environment variables name another."""

_PACKAGES = {
    "tensorboard": ("tensorboardX", "tensorboardX"),
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow-skinny"),
}
"""Sink → module, and the package on PyPI that brings it."""


def require_packages(names: Sequence[str]) -> None:
    """Refuse sinks whose package is missing.

    Raises:
        ConfigError: naming the package.
    """
    for name in names:
        module, package = _PACKAGES[name]
        if importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"run.sinks: {name} needs {package}, which is not installed: pip install {package}"
            )


class Sinks:
    """The sinks of a run; entered when training starts.

    Args:
        names: of run.sinks.
        folder: the run's folder; for an object store (a URI) local files go beside the driver instead.
        settings: the run's configuration, shown with it.
        on_problem: told why a sink was given up.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: str,
        settings: Mapping[str, Any],
        on_problem: Callable[[str], object],
    ) -> None:
        self._names = names
        self._folder = folder.rstrip("/")
        self._settings = settings
        self._on_problem = on_problem
        self._open: dict[str, _Sink] = {}

    def __enter__(self) -> Sinks:
        name = last_name(self._folder)
        place = Path(f"{name}.sinks") if is_uri(self._folder) else Path(self._folder)
        for kind in self._names:
            with _GivingUp(self, kind):
                self._open[kind] = _KINDS[kind](name, place, self._folder, self._settings)
        return self

    def __exit__(self, *_: object) -> None:
        for kind, sink in list(self._open.items()):
            with _GivingUp(self, kind):
                sink.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Pass the numbers of a step or an evaluation on."""
        if record["event"] not in ("step", "evaluation"):
            return
        figures = {
            key: float(value)
            for key, value in record.items()
            if key not in ("step", "steps") and isinstance(value, int | float) and math.isfinite(value)
        }
        for kind, sink in list(self._open.items()):
            with _GivingUp(self, kind):
                sink.log(figures, record["step"])

    def give_up(self, kind: str, error: Exception) -> None:
        """Go on without a sink."""
        self._open.pop(kind, None)
        self._on_problem(f"run.sinks: {kind} is given up ({type(error).__name__}: {error})")


class _GivingUp:
    """Turns whatever a service's client raises into the end of that sink alone."""

    def __init__(self, sinks: Sinks, kind: str) -> None:
        self._sinks, self._kind = sinks, kind

    def __enter__(self) -> None:
        pass

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        self._sinks.give_up(self._kind, error)
        return True


class _Sink(Protocol):
    def __init__(self, name: str, place: Path, folder: str, settings: Mapping[str, Any]) -> None: ...
    def log(self, figures: dict[str, float], step: int) -> None: ...
    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, name: str, place: Path, folder: str, settings: Mapping[str, Any]) -> None:
        from tensorboardX import SummaryWriter

        # Its own file names differ by the second only, and it would overwrite.
        self._writer = SummaryWriter(str(place / "tensorboard"), filename_suffix=f".{time.time_ns()}")
        self._writer.add_text("config", f"```json\n{json.dumps(settings, indent=1)}\n```")

    def log(self, figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, name: str, place: Path, folder: str, settings: Mapping[str, Any]) -> None:
        import wandb

        place.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=name,
            id=_identity(folder),
            resume="allow",
            dir=place,
            config=dict(settings),
        )
        # A resumed run repeats steps, which W&B's own step counter would refuse.
        self._run.define_metric("*", step_metric="step")

    def log(self, figures: dict[str, float], step: int) -> None:
        self._run.log(figures | {"step": step})

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    def __init__(self, name: str, place: Path, folder: str, settings: Mapping[str, Any]) -> None:
        import mlflow

        self._client = mlflow.MlflowClient()
        wanted = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self._client.get_experiment_by_name(wanted)
        experiment = known.experiment_id if known else self._client.create_experiment(wanted)
        tag = f"{PROJECT}.run"
        runs = self._client.search_runs([experiment], f"tags.`{tag}` = '{_identity(folder)}'", max_results=1)
        if runs:
            self._id = runs[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        tags = {tag: _identity(folder)}
        self._id = self._client.create_run(experiment, run_name=name, tags=tags).info.run_id
        for key, value in _flat(settings).items():
            self._client.log_param(self._id, key, str(value)[:500])

    def log(self, figures: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(
            self._id, metrics=[Metric(name, value, now, step) for name, value in figures.items()]
        )

    def close(self) -> None:
        self._client.set_terminated(self._id)


_KINDS: dict[str, type[_Sink]] = {"tensorboard": _TensorBoard, "wandb": _Wandb, "mlflow": _Mlflow}


def _identity(folder: str) -> str:
    """The same for a run that resumes."""
    return hashlib.sha256(folder.encode()).hexdigest()[:16]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted key."""
    if isinstance(tree, Mapping):
        items: list[tuple[Any, Any]] = list(tree.items())
    elif isinstance(tree, list):
        items = list(enumerate(tree))
    else:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
