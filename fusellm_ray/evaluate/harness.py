"""Tasks of EleutherAI's lm-evaluation-harness by name (optional extra `harness`), with data from a hub or a folder.

DATA/TASK/SPLIT.jsonl   (or .json, .parquet) the records of a task that the harness knows, in its data set's fields
DATA/**/*.yaml          tasks of your own, in the harness's format
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fusellm_ray.config import ModelConfig
from fusellm_ray.errors import ConfigError, CorpusError
from fusellm_ray.evaluate.table import Grid
from fusellm_ray.models import load_causal_lm, load_hf_tokenizer

_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_FIRST = ("acc_norm", "acc", "exact_match")
"""Metrics that stand for a task in the table, in this order, where it has them."""

TaskScores = Mapping[str, Mapping[str, float]]
"""Task → metric → value; a metric's standard error is METRIC_stderr."""


class Harness:
    """Tasks, loaded once for all models.

    Args:
        tasks: names that the harness knows, groups and tags included, or those of tasks in `data`.
        data: folder, see above; a task without a folder in it comes from the hub.
        limit: at most so many examples of each task.

    Raises:
        ConfigError: the harness is not installed, or knows no such task.
        CorpusError: a task's data cannot be had.
    """

    def __init__(self, tasks: Sequence[str], *, data: Path | None = None, limit: int | None = None) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ConfigError(
                f"--tasks needs lm-evaluation-harness, which cannot be imported ({error}): "
                "pip install 'fusellm-ray[harness]'"
            ) from error
        if data is not None and not data.is_dir():
            raise ConfigError(f"--data {data}: no such folder")
        # The harness's own thousands of tasks take seconds to index; the caller's may be all that is asked for.
        manager = TaskManager(include_path=None if data is None else str(data), include_defaults=False)
        if not set(tasks) <= set(manager.all_tasks):
            manager = TaskManager(include_path=None if data is None else str(data))
        unknown = sorted(set(tasks) - set(manager.all_tasks))
        if unknown:
            raise ConfigError(
                f"--tasks: the harness knows no {', '.join(unknown)}; `lm-eval ls tasks` lists all"
            )
        self._limit = limit
        self._tasks: list[Any] = []
        for name in tasks:
            files = {} if data is None else _files(data / name)
            # A group's members may override what the registered task says.
            local = {"group": f"local {name}", "task": [{"task": name, **_override(files)}]}
            try:
                self._tasks += manager.load([local if files else name])["tasks"].values()
            except Exception as error:  # data sets raise whatever their host made them
                raise CorpusError(
                    f"task {name}: its data cannot be loaded ({_first_line(error)}); where no hub can be reached, put "
                    f"it into DATA/{name}/SPLIT.jsonl and give --data DATA"
                ) from error

    def evaluate(
        self, model: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32, batch_size: int = 8
    ) -> dict[str, dict[str, float]]:
        """Task → metric → value of one model: a folder or hub id."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        config = ModelConfig(model=model)
        causal_lm = load_causal_lm(config, dtype=dtype)
        causal_lm.to(device)  # type: ignore[arg-type]
        wrapped = HFLM(
            pretrained=causal_lm, tokenizer=load_hf_tokenizer(config), batch_size=batch_size, device=device
        )
        answer = simple_evaluate(
            wrapped, tasks=list(self._tasks), limit=self._limit, log_samples=False, bootstrap_iters=1000
        )
        assert answer is not None
        return {task: _numbers(values) for task, values in answer["results"].items()}


def task_grid(scores: Mapping[str, TaskScores]) -> Grid:
    """A row a model, a column a task: its first metric with the standard error, the best of each column in bold."""
    tasks = {task: main_metric(values) for task, values in next(iter(scores.values())).items()}
    rows = []
    for model, own in scores.items():
        cells = []
        for task, metric in tasks.items():
            error = own[task].get(f"{metric}_stderr")
            cells.append(f"{own[task][metric]:.4f}" + ("" if error is None else f" ± {error:.4f}"))
        rows.append([model, *cells])
    columns = [f"{task} ({metric})" for task, metric in tasks.items()]
    best = frozenset(
        (i, j)
        for j, (task, metric) in enumerate(tasks.items(), 1)
        for i, own in enumerate(scores.values())
        if own[task][metric] == max(other[task][metric] for other in scores.values())
    )
    return Grid("tasks, ± their standard error (higher is better)", ["model", *columns], rows, best)


def main_metric(values: Mapping[str, float]) -> str:
    """The metric that stands for a task."""
    return next((name for name in _FIRST if name in values), next(iter(values)))


def _files(folder: Path) -> dict[str, Path]:
    """Split → file."""
    return {path.stem: path for path in sorted(folder.glob("*")) if path.suffix in _READERS}


def _override(files: Mapping[str, Path]) -> dict[str, Any]:
    """What makes a task read these files in place of its data set."""
    if not files:
        return {}
    readers = {_READERS[path.suffix] for path in files.values()}
    if len(readers) > 1:
        folder = next(iter(files.values())).parent
        raise ConfigError(
            f"--data: {folder} holds JSON and Parquet files; keep the splits of a task in one format"
        )
    return {
        "dataset_path": readers.pop(),
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(path) for split, path in files.items()}},
    }


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """`acc,none` → `acc`; a filter other than none stays in the name."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if name != "alias" and isinstance(value, int | float)
    }


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
