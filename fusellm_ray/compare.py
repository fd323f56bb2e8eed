"""`fusellm-ray compare`: every arm of a study at equal tokens and steps, over several seeds, in one table.

    study ─ build ─┬─ arms without training (model, merge, ensemble) ─────────────┐
                   └─ Ray ─ teachers, up once ─ each trained arm × each seed ─────┴─ scores on held-out text
                                                                                            │ results/*.json
                                                                    table, Markdown, JSON ──┘

Each arm and seed leaves one file of scores, document by document. The same command again makes only what is
missing; an interrupted training run goes on from its checkpoint. An arm that fails is named below the table, and the
others go on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
import torch
from ray.exceptions import RayError
from rich.console import Console

from fusellm_ray.config import Config, ModelConfig, TeacherConfig, VllmEngine
from fusellm_ray.corpus.files import find_files
from fusellm_ray.corpus.source import Document
from fusellm_ray.corpus.tokens import ByteTokenizer
from fusellm_ray.errors import ClusterError, ConfigError, CorpusError, FuseLLMError
from fusellm_ray.evaluate.comparison import Comparison
from fusellm_ray.evaluate.ensemble import evaluate_ensemble
from fusellm_ray.evaluate.merge import merge_models
from fusellm_ray.folders import try_lock
from fusellm_ray.job import export_run, local_or_running_cluster, run_job
from fusellm_ray.observe.progress import make_display
from fusellm_ray.perplexity import MEASURE, DocumentScore, by_domain, evaluate_model, held_out_documents
from fusellm_ray.plan import fits_beside, rank_resources, require_resources
from fusellm_ray.quickstart.domains import build_domains, build_text
from fusellm_ray.quickstart.zoo import OnProgress, build_zoo, point_latest
from fusellm_ray.report.write import write_report
from fusellm_ray.stream.failures import cause_of, summary_of
from fusellm_ray.study import Arm, Study
from fusellm_ray.target.storage import BEST_FOLDER, STEP_FOLDER
from fusellm_ray.teachers.service import stop_pools, supervise

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Cell:
    """One arm with one seed: one file of results."""

    arm: Arm
    seed: int
    name: str
    """Of its file and its run; holds a hash of all that it depends on."""


def run_comparison(study: Study) -> bool:
    """Make what is missing of a study, and write its table.

    Writes into the study's folder: comparison.md and comparison.json, reports/ (a page for each trained arm),
    results/, runs/ (metrics of the trained arms), models/ where they are kept.

    Returns:
        False after a requested stop, from which the same command goes on.

    Raises:
        ConfigError: another process is at it.
        FuseLLMError: arms failed; the others are made, and the table is written.
    """
    study.folder.mkdir(parents=True, exist_ok=True)
    with (study.folder / ".lock").open("w") as lock:
        if try_lock(lock) is False:
            raise ConfigError(
                f"{study.folder}: another process is making this study; wait for its end or stop it, or give this one "
                "another name"
            )
        return _run(study)


def _run(study: Study) -> bool:
    console = Console(stderr=True)
    _build(study, _StageLines(console))
    base = study.config()
    documents = held_out_documents(base.evaluation.sources, base.evaluation.max_bytes)
    cells = _cells(study, documents)
    missing = [cell for cell in cells if not _result(study, cell).is_file()]
    console.print(
        f"{study.name}: {len(study.arms)} arms, seeds {study.seeds}: {len(cells) - len(missing)} of {len(cells)} "
        f"results are there ({study.folder})"
    )
    (study.folder / "results").mkdir(exist_ok=True)
    failures: dict[str, str] = {}
    try:
        is_finished = _make(study, missing, documents, console, failures)
    finally:
        num_done = _write_table(study, cells, failures, console)
    if not is_finished:
        console.print(f"stopped: {num_done} of {len(cells)} results are there; the same command goes on")
    elif failures:
        raise FuseLLMError(
            f"study {study.name}: {len(failures)} of {len(cells)} results could not be made "
            f"({'; '.join(failures)}); the same command tries them again"
        )
    return is_finished


def _write_table(study: Study, cells: Sequence[Cell], failures: Mapping[str, str], console: Console) -> int:
    """Write the table of the results that are there; returns how many that are."""
    done = [cell for cell in cells if _result(study, cell).is_file()]
    if done:
        comparison = _read(study, done, failures)
        comparison.grid().print()
        _write(study.folder / "comparison.json", json.dumps(comparison.as_json(), indent=1) + "\n")
        _write(study.folder / "comparison.md", comparison.markdown())
        _write_reports(study, done)
        console.print(f"wrote {study.folder}/: comparison.md, comparison.json, reports/")
    return len(done)


def _build(study: Study, on_progress: OnProgress) -> None:
    if study.build == "domains":
        build_domains(on_progress=on_progress)
    elif study.build == "quickstart":
        point_latest(build_zoo(on_progress=on_progress).folder)
    elif study.build == "text":
        build_text(on_progress=on_progress)


def _make(
    study: Study,
    missing: Sequence[Cell],
    documents: list[Document],
    console: Console,
    failures: dict[str, str],
) -> bool:
    """Make every missing result, and note those that fail; False after a requested stop."""
    number = 0

    def announce(cell: Cell, what: str) -> None:
        nonlocal number
        number += 1
        console.print(f"[{number}/{len(missing)}] {cell.arm.name}, seed {cell.seed}: {what}")

    def failed(cell: Cell, error: FuseLLMError) -> None:
        name = f"{cell.arm.name}, seed {cell.seed}"
        failures[name] = f"{type(error).__name__}: {error}"
        console.print(f"{name} failed: {failures[name]}", style="red", markup=False)

    trained = {
        cell.name: (cell, study.config(cell.arm, seed=cell.seed, run=cell.name))
        for cell in missing
        if cell.arm.kind == "train"
    }
    with contextlib.ExitStack() as stack:
        if trained:
            stack.enter_context(local_or_running_cluster(study.config()))
            _require_resources(trained.values(), console)
        for cell in missing:
            if cell.arm.kind != "train":
                announce(cell, cell.arm.kind)
                started = time.perf_counter()
                try:
                    scores = _score_untrained(study, cell, documents)
                except FuseLLMError as error:
                    failed(cell, error)
                    continue
                _keep(study, cell, scores, time.perf_counter() - started)
        teachers = stack.enter_context(_Teachers())
        waiting = _by_teachers([config for _, config in trained.values()])
        while waiting:
            cell, config = trained[waiting[0].run.name]
            announce(cell, "training")
            started = time.perf_counter()
            waiting = waiting[1:]
            try:
                pools = teachers.up(config)
                outcome = run_job(_training_only(config), pools=pools, display=make_display(cell.arm.name))
                if not outcome.is_finished:
                    return False
                teachers.keep(waiting)
                scores = _score_trained(study, config, documents)
            except FuseLLMError as error:
                failed(cell, error)
                teachers.drop(config)  # one of them may be why
                continue
            _keep(study, cell, scores, time.perf_counter() - started)
            _drop_checkpoints(study, config)
            if outcome.stop_requested and waiting:
                return False
    return True


def _require_resources(trained: Iterable[tuple[Cell, Config]], console: Console) -> None:
    """Refuse a study of which an arm can never run here, before the first is trained."""
    for arm, config in {cell.arm.name: config for cell, config in trained}.items():
        try:
            missing = require_resources(config)
        except ClusterError as error:
            raise ClusterError(f"arm {arm!r}: {error}") from error
        if missing:
            console.print(f"{arm}: the cluster must grow first ({missing})")


# ---------------------------------------------------------------------------------------- teachers


def _pool_keys(config: Config) -> dict[str, str]:
    """Teacher → what its pool depends on; arms with the same key share a pool."""
    shared = [config.target.model_dump(mode="json"), config.alignment.model_dump(), config.stream.deadline_s]
    return {
        t.name: json.dumps([t.model_dump(mode="json"), *shared], sort_keys=True)
        for t in config.active_teachers
    }


def _by_teachers(configs: Sequence[Config]) -> list[Config]:
    """Runs with the same teachers one after the other, otherwise in their order."""
    groups: dict[frozenset[str], list[Config]] = {}
    for config in configs:
        groups.setdefault(frozenset(_pool_keys(config).values()), []).append(config)
    return [config for group in groups.values() for config in group]


class _Teachers:
    """The teachers that are up: each is loaded once, and stopped when no later arm asks for it or room is needed."""

    def __init__(self) -> None:
        self._pools: dict[str, tuple[TeacherConfig, Any]] = {}

    def __enter__(self) -> _Teachers:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop(self._pools)

    def up(self, config: Config) -> dict[str, Any]:
        """Teacher → its pool, started if it is not up."""
        keys = _pool_keys(config)
        idle = [key for key in self._pools if key not in keys.values()]
        if not fits_beside(config, [self._pools[key][0] for key in idle]):
            self._stop(idle)
        for teacher in config.active_teachers:
            if keys[teacher.name] not in self._pools:
                self._pools[keys[teacher.name]] = (teacher, supervise(config, [teacher]))
        return {name: self._pools[key][1] for name, key in keys.items()}

    def keep(self, configs: Iterable[Config]) -> None:
        """Stop what none of these runs asks for."""
        wanted = {key for config in configs for key in _pool_keys(config).values()}
        self._stop(self._pools.keys() - wanted)

    def drop(self, config: Config) -> None:
        """Stop the teachers of this run."""
        self._stop(self._pools.keys() & set(_pool_keys(config).values()))

    def _stop(self, keys: Iterable[str]) -> None:
        stop_pools({key: self._pools.pop(key)[1] for key in list(keys)})


# ---------------------------------------------------------------------------------------- scores


def _training_only(config: Config) -> Config:
    """Without an evaluation at the end: what is compared is the exported model, beside all others."""
    if config.evaluation.every_steps is not None:
        return config
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"sources": []})})


def _score_model(study: Study, model: ModelConfig, documents: list[Document]) -> list[DocumentScore]:
    """On a GPU that a rank would get, where arms are trained on GPUs: this process may have none, and the first that
    it sees may be full of a teacher."""
    config = study.config()
    context = study.context or config.corpus.row_tokens
    if config.trainer.use_gpu and ray.is_initialized():
        return _as_a_task(rank_resources(config), _score, model, documents, context)
    return _score(model, documents, context)


def _score(model: ModelConfig, documents: list[Document], context: int) -> list[DocumentScore]:
    try:
        return evaluate_model(
            model,
            documents,
            row_tokens=context,
            batch_rows=4,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
    finally:
        torch.cuda.empty_cache()  # teachers and ranks of later arms want that memory


def _as_a_task(amounts: dict[str, float], function: Callable[..., T], *arguments: Any) -> T:
    """Call a function of this module on a node that has so much of each resource free."""
    custom = {name: amount for name, amount in amounts.items() if name not in ("CPU", "GPU")}
    task = ray.remote(
        num_cpus=amounts.get("CPU", 0), num_gpus=amounts.get("GPU", 0), resources=custom, max_retries=0
    )(function)
    try:
        return ray.get(task.remote(*arguments))
    except RayError as error:
        cause = cause_of(error)
        raise cause if isinstance(cause, FuseLLMError) else FuseLLMError(summary_of(cause)) from error


def _score_untrained(study: Study, cell: Cell, documents: list[Document]) -> list[DocumentScore]:
    arm, base = cell.arm, study.config()
    if arm.kind == "model":
        return _score_model(study, study.model(arm), documents)
    teachers = study.teachers(arm)
    if arm.kind == "ensemble":
        target = ByteTokenizer.of_model(base.target)
        context = study.context or base.corpus.row_tokens
        try:
            return evaluate_ensemble(teachers, target, documents, row_tokens=context)
        finally:
            torch.cuda.empty_cache()
    assert arm.method is not None
    with _model_folder(study, cell.name) as folder:
        merge_models(
            arm.method,
            teachers,
            folder,
            base=base.target,
            parameters=arm.parameters,
            seed=cell.seed,
        )
        return _score_model(study, _made(study, folder), documents)


def _score_trained(study: Study, config: Config, documents: list[Document]) -> list[DocumentScore]:
    with _model_folder(study, config.run.name) as folder:
        shutil.rmtree(folder, ignore_errors=True)
        export_run(config, folder)
        return _score_model(study, _made(study, folder), documents)


def _made(study: Study, folder: Path) -> ModelConfig:
    """A model that was made from the target, and runs its code."""
    return ModelConfig(
        model=str(folder.absolute()), trust_remote_code=study.config().target.trust_remote_code
    )


def _drop_checkpoints(study: Study, config: Config) -> None:
    """What is left of the run are its metrics."""
    for checkpoint in (study.folder / "runs" / config.run.name).iterdir():
        if STEP_FOLDER.fullmatch(checkpoint.name) or BEST_FOLDER.fullmatch(checkpoint.name):
            shutil.rmtree(checkpoint)


@contextlib.contextmanager
def _model_folder(study: Study, name: str) -> Iterator[Path]:
    folder = study.folder / "models" / name
    folder.parent.mkdir(exist_ok=True)
    try:
        yield folder
    finally:
        if not study.keep_models:
            shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------------------------------- results


def _cells(study: Study, documents: Sequence[Document]) -> list[Cell]:
    """All arms with their seeds; those that draw nothing at random with the first seed only."""
    text = hashlib.sha256("\0".join(f"{d.domain} {d.text}" for d in documents).encode()).hexdigest()
    cells = []
    for arm in study.arms:
        for seed in study.seeds if arm.depends_on_seed else study.seeds[:1]:
            context = study.context or study.config().corpus.row_tokens
            content = [_content(study, arm), context, text, MEASURE]
            digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]
            cells.append(Cell(arm, seed, f"{_file_name(arm)}-{digest}-seed{seed}"))
    return cells


def _content(study: Study, arm: Arm) -> Any:
    """What an arm's scores depend on, seeds and held-out text apart."""
    if arm.kind == "train":
        config = study.config(arm)
        elsewhere = {"run", "checkpoint", "stream", "trainer", "evaluation"}
        tree = config.model_dump(mode="json", exclude=elsewhere)
        tree["target"] |= _identity(config.target)
        tree["teachers"] = [_answers(teacher) for teacher in config.active_teachers]
        for source in tree["corpus"]["sources"]:
            if source["path"] is not None:
                source["path"] = os.path.realpath(source["path"])
                with contextlib.suppress(CorpusError):  # of files that are not there, training says so
                    source["files"] = find_files(source["path"], source["format"])[0]
            else:
                source["dataset"] = _resolved(source["dataset"])
        return tree
    if arm.kind == "model":
        return _identity(study.model(arm))
    base, teachers = study.config().target, study.teachers(arm)
    if arm.kind == "ensemble":
        return [arm.kind, _identity(base), [_answers(teacher) for teacher in teachers]]
    return [arm.kind, arm.method, arm.parameters, _identity(base), [_identity(t) for t in teachers]]


def _identity(model: ModelConfig) -> dict[str, Any]:
    """Which model it is, and how it reads."""
    tree = model.model_dump(include={*ModelConfig.model_fields, "max_context", "add_bos"})
    return tree | {"model": _resolved(model.model)}


def _answers(teacher: TeacherConfig) -> dict[str, Any]:
    """What a teacher's answers depend on."""
    tree = teacher.model_dump(mode="json", exclude={"cache_bytes", "replicas", "resources"})
    if isinstance(teacher.engine, VllmEngine) and teacher.engine.lora is not None:
        tree["engine"]["lora"] = _resolved(teacher.engine.lora)
    return tree | _identity(teacher)


def _resolved(place: str) -> Any:
    """A folder with its files' sizes and times of change: `latest` points to another one later, and a folder may be
    written anew. A hub id is no place on this machine."""
    if not os.path.isdir(place):
        return place
    folder = Path(os.path.realpath(place))
    stats = {
        str(path.relative_to(folder)): path.stat() for path in sorted(folder.rglob("*")) if path.is_file()
    }
    return [str(folder), [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()]]


def _result(study: Study, cell: Cell) -> Path:
    return study.folder / "results" / f"{cell.name}.json"


def _keep(study: Study, cell: Cell, scores: Sequence[DocumentScore], seconds: float) -> None:
    record = {
        "arm": cell.arm.model_dump(mode="json"),
        "seed": cell.seed,
        "run": f"runs/{cell.name}" if cell.arm.kind == "train" else None,
        "seconds": round(seconds, 1),
        "domains": {name: score.bits_per_byte for name, score in by_domain(scores).items()},
        "documents": [asdict(score) for score in scores],
    }
    _write(_result(study, cell), json.dumps(record) + "\n")


def _read(study: Study, cells: Sequence[Cell], failures: Mapping[str, str]) -> Comparison:
    records = [json.loads(_result(study, cell).read_text(encoding="utf-8")) for cell in cells]
    return Comparison(
        name=study.name,
        against=study.against,
        scores={
            arm.name: {
                cell.seed: [DocumentScore(**score) for score in record["documents"]]
                for cell, record in zip(cells, records, strict=True)
                if cell.arm.name == arm.name
            }
            for arm in study.arms
            if any(cell.arm.name == arm.name for cell in cells)
        },
        details={
            arm.name: {
                "kind": arm.kind,
                "runs": {
                    str(r["seed"]): r["run"] for r in records if r["arm"]["name"] == arm.name and r["run"]
                },
                "seconds": {str(r["seed"]): r["seconds"] for r in records if r["arm"]["name"] == arm.name},
            }
            for arm in study.arms
        },
        num_resamples=study.resamples,
        fixed=frozenset(arm.name for arm in study.arms if not arm.depends_on_seed),
        failures=failures,
    )


def _write_reports(study: Study, cells: Sequence[Cell]) -> None:
    """A page for each trained arm, of its first seed."""
    (study.folder / "reports").mkdir(exist_ok=True)
    for cell in cells:
        if cell.arm.kind == "train" and cell.seed == study.seeds[0]:
            page = study.folder / "reports" / f"{_file_name(cell.arm)}.html"
            write_report(
                str(study.folder / "runs" / cell.name), page, scores=study.folder / "comparison.json"
            )


def _file_name(arm: Arm) -> str:
    return arm.name.replace(" ", "-")


def _write(path: Path, text: str) -> None:
    """Complete or not at all: a file that is there counts as done."""
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


class _StageLines:
    """A line when a stage of the build begins, and each quarter of it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._said: dict[str, int] = {}

    def __call__(self, stage: str, share: float, message: str) -> None:
        quarter = int(share * 4)
        if self._said.get(stage) != quarter:
            self._said[stage] = quarter
            self._console.print(f"building {stage}: {message}")
