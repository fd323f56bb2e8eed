"""Tasks of EleutherAI's lm-evaluation-harness by name (optional extra `harness`), with data from a hub or a folder.

DATA/TASK/SPLIT.jsonl   (or .json, .parquet) the records of a task that the harness knows, in its data set's fields;
                        a group's tasks each have a folder of their own
DATA/**/*.yaml          tasks of your own, in the harness's format
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers.processors import TemplateProcessing

from fusellm_ray.config import ReaderConfig
from fusellm_ray.errors import ConfigError, CorpusError, ModelError
from fusellm_ray.evaluate.table import Grid
from fusellm_ray.models import load_causal_lm, load_hf_tokenizer

_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_FIRST = ("acc_norm", "acc", "exact_match")
"""Metrics that stand for a task in the table, in this order, where it has them."""

TaskScores = Mapping[str, Mapping[str, float]]
"""Task or group → metric → value. A metric is NAME, or NAME,FILTER where the harness filters answers; its standard
error is NAME_stderr or NAME_stderr,FILTER."""


class Harness:
    """Tasks, loaded once for all models.

    Args:
        tasks: names that the harness knows, groups and tags included, or those of tasks in `data`.
        data: folder, see above; a task without a folder in it comes from the hub.
        limit: at most so many examples of each task.
        allow_code_execution: tasks may run the Python that models write.

    Raises:
        ConfigError: the harness is not installed, knows no such task, or one that runs code is not allowed to.
        CorpusError: a task's data cannot be had.
    """

    columns: Sequence[str]
    """What stands in the table: the tasks, and in place of a group's its mean, where it has one."""

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        data: Path | None = None,
        limit: int | None = None,
        allow_code_execution: bool = False,
    ) -> None:
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
        leaves = {name: dict(_leaves(manager.task_index, name)) for name in tasks}
        unsafe = sorted(
            {leaf for own in leaves.values() for leaf, config in own.items() if _runs_code(config)}
        )
        if unsafe and not allow_code_execution:
            raise ConfigError(
                f"--tasks: {', '.join(unsafe)} run the Python that models write, on this machine and without a "
                "sandbox; give --allow-code-execution if you accept that"
            )
        if unsafe:
            os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the metric's own question, asked when it is loaded
        self._limit, self._manager, self._runs_code = limit, manager, bool(unsafe)
        self._tasks: list[Any] = []
        columns: list[str] = []
        with tempfile.TemporaryDirectory(prefix="fusellm_ray_") as overrides:
            for name, own in leaves.items():
                if data is not None:
                    _use_local_data(manager.task_index, name, list(own), data, Path(overrides))
                try:
                    loaded = manager.load([name])
                except Exception as error:  # data sets raise whatever their host made them
                    tasks_of = "" if name in own else f" for each of {', '.join(own)}"
                    raise CorpusError(
                        f"task {name}: cannot be loaded ({_first_line(error)}); where no hub can be reached, put its "
                        f"data into DATA/{name if name in own else 'TASK'}/SPLIT.jsonl{tasks_of} and give --data DATA"
                    ) from error
                group = loaded.get("groups", {}).get(name)
                self._tasks += loaded["tasks"].values() if group is None else [group]
                columns += loaded["tasks"] if group is None or not group.aggregate_metric_list else [name]
        try:
            manager.load(list(self._tasks))
        except ValueError as error:
            raise ConfigError(f"--tasks {','.join(tasks)}: {error}; name it once") from error
        self.columns = columns

    def evaluate(
        self,
        model: ReaderConfig,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 8,
    ) -> dict[str, dict[str, float]]:
        """`TaskScores` of one model.

        Raises:
            ModelError: it cannot be loaded, or the harness failed on it.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        causal_lm = load_causal_lm(model, dtype=dtype)
        causal_lm.to(device)  # type: ignore[arg-type]
        wrapped = HFLM(
            pretrained=causal_lm,
            tokenizer=_tokenizer(model),
            batch_size=batch_size,
            device=device,
            add_bos_token=model.add_bos,
        )
        try:
            answer = simple_evaluate(
                wrapped,
                tasks=list(self._tasks),
                task_manager=self._manager,
                limit=self._limit,
                log_samples=False,
                bootstrap_iters=1000,
                confirm_run_unsafe_code=self._runs_code,
            )
        except Exception as error:  # a task's own code raises whatever it met
            raise ModelError(
                f"{model.model} on tasks {', '.join(self.columns)}: lm-evaluation-harness failed with "
                f"{type(error).__name__}: {_first_line(error)}"
            ) from error
        assert answer is not None
        results = answer["results"] | answer.get("groups", {})
        scores = {task: _numbers(values) for task, values in results.items()}
        return {task: values for task, values in scores.items() if values}


def task_grid(scores: Mapping[str, TaskScores], columns: Sequence[str]) -> Grid:
    """A row a model, a column a task: its first metric with the standard error, the best of each column in bold.

    Which values are the best is the harness's own word; higher ones, where it has none.
    """
    from lm_eval.api.registry import is_higher_better

    first = next(iter(scores.values()))
    tasks = {task: main_metric(first[task]) for task in columns}
    best_of = {m: min if is_higher_better(m.partition(",")[0]) is False else max for m in tasks.values()}
    rows = []
    for model, own in scores.items():
        cells = []
        for task, metric in tasks.items():
            name, comma, answer_filter = metric.partition(",")
            error = own[task].get(f"{name}_stderr{comma}{answer_filter}")
            cells.append(f"{own[task][metric]:.4f}" + ("" if error is None else f" ± {error:.4f}"))
        rows.append([model, *cells])
    best = frozenset(
        (i, j)
        for j, (task, metric) in enumerate(tasks.items(), 1)
        for i, own in enumerate(scores.values())
        if own[task][metric] == best_of[metric](other[task][metric] for other in scores.values())
    )
    headings = [
        f"{task} ({metric}{'; lower is better' if best_of[metric] is min else ''})"
        for task, metric in tasks.items()
    ]
    return Grid(
        "tasks, ± their standard error; higher is better unless a column says otherwise",
        ["model", *headings],
        rows,
        best,
    )


def main_metric(values: Mapping[str, float]) -> str:
    """The metric that stands for a task, with its filter."""
    known = {name.partition(",")[0]: name for name in reversed(list(values))}  # of several filters the first
    return next((known[name] for name in _FIRST if name in known), next(iter(values)))


def _leaves(index: Mapping[str, Any], name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(name, configuration) of each task that a task, tag or group stands for; functions in it are not loaded."""
    entry = index[name]
    if entry.kind.name == "TAG":
        for child in sorted(entry.tags):
            yield from _leaves(index, child)
    elif entry.kind.name == "GROUP":
        yield from _members(index, entry.cfg)
    else:
        yield name, entry.cfg


def _members(index: Mapping[str, Any], group: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for member in group.get("task") or []:
        child = member if isinstance(member, str) else member.get("group") or member.get("task")
        if child in index:
            yield from _leaves(index, child)
        elif "group" in member:  # defined where it is used
            yield from _members(index, member)
        else:
            yield child, member


def _runs_code(config: Mapping[str, Any]) -> bool:
    return bool(config.get("unsafe_code"))


def _use_local_data(
    index: Mapping[str, Any], name: str, leaves: Sequence[str], data: Path, scratch: Path
) -> None:
    """Make the index read tasks from the files in DATA, each by a configuration that includes the task's own."""
    if name not in leaves and _files(data / name):
        raise ConfigError(
            f"--data: {data / name} holds records, and {name} is a group; its tasks are {', '.join(leaves)}: "
            f"put each one's into {data}/TASK/SPLIT.jsonl"
        )
    for leaf in leaves:
        files = _files(data / leaf)
        if files and leaf in index and index[leaf].yaml_path.parent != scratch:
            changed = scratch / f"{leaf}.yaml"
            changed.write_text(yaml.safe_dump({"include": str(index[leaf].yaml_path)} | _override(files)))
            index[leaf].yaml_path = changed


def _tokenizer(model: ReaderConfig) -> Any:
    tokenizer: Any = load_hf_tokenizer(model)
    if (
        model.add_bos
    ):  # all that the harness can do is to ask for the special tokens that a tokenizer adds by itself
        bos = tokenizer.bos_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    return tokenizer


def _files(folder: Path) -> dict[str, Path]:
    """Split → file."""
    return {path.stem: path for path in sorted(folder.glob("*")) if path.suffix in _READERS}


def _override(files: Mapping[str, Path]) -> dict[str, Any]:
    """What makes a task read these files in place of its data set."""
    readers = {_READERS[path.suffix] for path in files.values()}
    if len(readers) > 1:
        folder = next(iter(files.values())).parent
        raise ConfigError(
            f"--data: {folder} holds JSON and Parquet files; keep the splits of a task in one format"
        )
    return {
        "dataset_path": readers.pop(),
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(path.absolute()) for split, path in files.items()}},
    }


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """`acc,none` → `acc`; a filter other than none stays in the name. `sample_len` is a count, not a score."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if name != "sample_len" and isinstance(value, int | float)
    }


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
