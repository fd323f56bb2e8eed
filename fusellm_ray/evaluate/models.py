"""`fusellm-ray evaluate`: many models on the same held-out text, and how sure their differences are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from fusellm_ray.config import ReaderConfig, Resources, SourceConfig, TeacherConfig, TransformersEngine
from fusellm_ray.config_file import validated
from fusellm_ray.corpus.tokens import ByteTokenizer
from fusellm_ray.errors import ConfigError
from fusellm_ray.evaluate.bootstrap import LEVEL, NUM_RESAMPLES, PairedBootstrap
from fusellm_ray.evaluate.ensemble import evaluate_ensemble
from fusellm_ray.evaluate.harness import Harness, task_grid
from fusellm_ray.evaluate.table import Grid, as_json, difference_grid, interval_json, score_grid
from fusellm_ray.models import model_facts
from fusellm_ray.perplexity import DocumentScore, by_domain, evaluate_model, held_out_documents

DATASET = "dataset:"
"""What a corpus begins with that is a Hugging Face dataset."""
DEFAULT_CONTEXT = 2048
ENSEMBLE_TOP_K = 64


def evaluate_models(
    models: Sequence[str],
    corpora: Sequence[str],
    *,
    field: str = "text",
    max_bytes: int = 200_000,
    context: int | None = None,
    dtype: str = "float32",
    threads: int | None = None,
    ensembles: Sequence[str] = (),
    tasks: Sequence[str] = (),
    data: Path | None = None,
    limit: int | None = None,
    allow_code_execution: bool = False,
    add_bos: Sequence[str] = (),
    against: str | None = None,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    json_path: Path | None = None,
    markdown_path: Path | None = None,
) -> dict[str, Any]:
    """Score every model on every corpus, print the tables, and write them if asked.

    Args:
        models: folders or hub ids.
        corpora: `NAME=PATH` strings; a path may be JSONL, Parquet, text, a folder or a glob. Or
            `NAME=dataset:PLACE[,KEY=VALUE…]`: a hub id or a folder that `Dataset.save_to_disk` wrote, and keys of
            `SourceConfig` (subset, split, revision, streaming).
        context: tokens read at once; at most what the model reads.
        ensembles: `TEACHER,TEACHER,…` strings, each scored as one more model, at the first model's tokens.
        tasks, data, limit, allow_code_execution: of the lm-evaluation-harness; see `Harness`.
        add_bos: models and members of ensembles whose texts begin with BOS, though their tokenizers add none.
        against: the model that the others are compared with; default: the first.
        num_resamples, seed: of the bootstrap.

    Returns:
        What is written as JSON: {models, against, differences, bootstrap} of the corpora and {tasks}.

    Raises:
        ConfigError: nothing to evaluate on, a corpus is not of that form, two have one name, or `against` or one of
            `add_bos` is no model.
        ModelError, TokenizerError: a model cannot be loaded; found out before the first is scored.
    """
    models = list(dict.fromkeys(models))
    if threads is not None:
        torch.set_num_threads(threads)
    teams = {f"ensemble {names}": _teachers(names, dtype, add_bos) for names in ensembles}
    members = [teacher for team in teams.values() for teacher in team]
    against = against or models[0]
    if against not in (*models, *teams):
        raise ConfigError(f"--against {against!r} is none of the models: {', '.join((*models, *teams))}")
    if not corpora and not tasks:
        raise ConfigError("nothing to evaluate on: give --corpus NAME=PATH, --tasks NAME,…, or both")
    if teams and not corpora:
        raise ConfigError(
            f"--ensemble {ensembles[0]}: tasks are not run on ensembles; give --corpus NAME=PATH, or leave it out"
        )
    known = list(dict.fromkeys([*models, *(name for names in ensembles for name in names.split(","))]))
    for name in add_bos:
        if name not in known:
            raise ConfigError(f"--add-bos {name!r} is none of the models: {', '.join(known)}")
    readers = {name: ReaderConfig(model=name, add_bos=name in add_bos or None) for name in models}
    # Refuse before minutes of scoring.
    tokenizers = [_tokenizer(reader) for reader in (*readers.values(), *members)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision: torch.dtype = getattr(torch, dtype)
    harness = None
    if tasks:
        harness = Harness(tasks, data=data, limit=limit, allow_code_execution=allow_code_execution)
    grids: list[Grid] = []
    report: dict[str, Any] = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        if corpora:
            documents = held_out_documents([_source(c, corpora, field) for c in corpora], max_bytes)
            row_tokens = context or DEFAULT_CONTEXT
            scored: dict[str, list[DocumentScore]] = {}
            for model in progress.track(models, description="text"):
                scored[model] = evaluate_model(
                    readers[model], documents, row_tokens=row_tokens, device=device, dtype=precision
                )
            for team, teachers in progress.track(teams.items(), description="ensembles"):
                scored[team] = evaluate_ensemble(teachers, tokenizers[0], documents, row_tokens=row_tokens)
            grids, report = _text_report(scored, against, num_resamples, seed)
        if harness is not None:
            on_tasks = {
                model: harness.evaluate(readers[model], device=device, dtype=precision)
                for model in progress.track(models, description="tasks")
            }
            grids.append(task_grid(on_tasks, harness.columns))
            report["tasks"] = on_tasks
    for grid in grids:
        grid.print()
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if markdown_path is not None:
        markdown_path.write_text("\n".join(grid.markdown() for grid in grids), encoding="utf-8")
    return report


def _text_report(
    scored: dict[str, list[DocumentScore]], against: str, num_resamples: int, seed: int
) -> tuple[list[Grid], dict[str, Any]]:
    scores = {model: by_domain(own) for model, own in scored.items()}
    bootstrap = PairedBootstrap(scored, num_resamples=num_resamples, seed=seed)
    differences = {model: bootstrap.difference(model, against) for model in scored if model != against}
    grids = [score_grid(scores, "bits per byte on held-out text (lower is better)")]
    if differences:
        grids.append(difference_grid(differences, against))
    report = {
        "models": as_json(scores),
        "against": against,
        "differences": {
            model: {domain: interval_json(interval) for domain, interval in intervals.items()}
            for model, intervals in differences.items()
        },
        "bootstrap": {"resamples": num_resamples, "seed": seed, "level": LEVEL},
    }
    return grids, report


def _tokenizer(reader: ReaderConfig) -> ByteTokenizer:
    return ByteTokenizer.of_model(reader, model_facts(reader).vocab_size)


def _teachers(names: str, dtype: str, add_bos: Sequence[str]) -> list[TeacherConfig]:
    """The members of an ensemble. k only decides how finely a token is split where tokenizers differ."""
    engine = TransformersEngine.model_validate({"dtype": dtype, "threads": torch.get_num_threads()})
    gpus = Resources(num_gpus=float(torch.cuda.is_available()))
    return [
        TeacherConfig(
            name=f"member{i}",
            model=model,
            add_bos=model in add_bos or None,
            engine=engine,
            resources=gpus,
            top_k=ENSEMBLE_TOP_K,
        )
        for i, model in enumerate(names.split(","))
    ]


def _source(corpus: str, corpora: Sequence[str], field: str) -> SourceConfig:
    where = f"--corpus {corpus!r}"
    name, separator, place = corpus.partition("=")
    if not separator or not name or not place:
        raise ConfigError(f"{where}: expected NAME=PATH, for instance prose=heldout.jsonl")
    if sum(other.startswith(f"{name}=") for other in corpora) > 1:
        raise ConfigError(f"--corpus: two corpora are named {name!r}; give each its own name")
    tree = {"name": name, "field": field}
    if not place.startswith(DATASET):
        return validated(SourceConfig, tree | {"path": place}, where)
    dataset, *settings = place.removeprefix(DATASET).split(",")
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator or key in (*tree, "path", "dataset", "format", "weight"):
            raise ConfigError(
                f"{where}: {setting!r} is no setting of a dataset; give subset=, split=, revision= or streaming="
            )
        tree[key] = value
    return validated(SourceConfig, tree | {"dataset": dataset}, where)
