"""`fusellm-ray quickstart`: the whole system on one machine, and the table that says whether fusing helped.

    build_zoo → Ray → the fused arm → the CLM arm, same rows and steps → export → bits per byte of every model

Both arms are ordinary runs of configs/quickstart.yaml: the second one is the first with fusion.rule=none.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import astuple
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

import fusellm_ray
from fusellm_ray.config import Config, ModelConfig
from fusellm_ray.config_file import parse_config, read_tree
from fusellm_ray.errors import ConfigError
from fusellm_ray.evaluate.table import as_json, mean_bits_per_byte, print_scores
from fusellm_ray.job import export_run, local_or_running_cluster, run_job
from fusellm_ray.models import use_cpu
from fusellm_ray.observe.progress import make_display
from fusellm_ray.perplexity import MEASURE, DomainScore, bits_per_byte, held_out_documents, load_model
from fusellm_ray.quickstart.zoo import DEFAULT_CACHE, Zoo, build_zoo, point_latest
from fusellm_ray.report.write import SCORES_FILE
from fusellm_ray.target.storage import Checkpoints

ARMS = {"fused": "fused", "clm": "CLM only"}
"""Suffix of a run's name → its name in the table."""


def run_quickstart(
    *, seed: int = 0, steps: int | None = None, cache: Path | None = None, json_path: Path | None = None
) -> bool:
    """Build what is missing, train both arms, print the table.

    Args:
        seed: order of the training documents.
        steps: optimiser steps of each arm; default: the config's.
        cache: folder of models and runs.
        json_path: where the table goes as JSON, with the seconds each stage took.

    Returns:
        False after a requested stop, from which the same command goes on.
    """
    console = Console(stderr=True)
    cache = (cache or DEFAULT_CACHE).expanduser()
    seconds: dict[str, float] = {}
    clock = _Clock(seconds)
    zoo = _build(cache, console)
    clock.lap("zoo")
    config = quickstart_config(cache, seed=seed, steps=steps)
    runs = {arm: _arm(config, arm, zoo) for arm in ARMS}
    _forget_finished(runs)
    console.print(f"training: {config.training.steps} steps an arm, seed {seed}")
    with local_or_running_cluster(config):
        clock.lap("ray")
        for arm, run in runs.items():
            outcome = run_job(run, display=make_display(ARMS[arm]))
            clock.lap(arm)
            if outcome.stop_requested:
                console.print(
                    f"stopped at step {outcome.step} of {ARMS[arm]}; the same command goes on from there"
                )
                return False
    scores = _evaluate(config, runs, zoo, console)
    clock.lap("evaluation")
    print_scores(scores, "bits per byte on held-out text (lower is better)")
    gain = mean_bits_per_byte(scores["CLM only"]) - mean_bits_per_byte(scores["fused"])
    verdict = "better" if gain > 0 else "WORSE"
    Console().print(
        f"fused is {abs(gain):.4f} bits per byte {verdict} than CLM only, on the mean over domains"
    )
    folder = Path(Checkpoints(runs["fused"].run.storage, runs["fused"].run.name).folder)
    (folder / SCORES_FILE).write_text(json.dumps({"models": as_json(scores)}), encoding="utf-8")
    console.print(f"the fused run as a page: fusellm-ray report {folder}")
    if json_path is not None:
        report = {"seed": seed, "scores": as_json(scores), "gain": gain, "seconds": seconds}
        json_path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return True


def quickstart_config(cache: Path, *, seed: int = 0, steps: int | None = None) -> Config:
    """configs/quickstart.yaml with the paths of this cache."""
    tree = _moved(read_tree(_shipped("quickstart.yaml")), cache)
    tree["run"]["seed"] = seed
    if steps is not None:
        tree["training"]["steps"] = steps
    return parse_config(tree, where="quickstart.yaml")


def _moved(tree: Any, cache: Path) -> Any:
    """A tree with `cache` in place of the default one, wherever a path begins with that."""
    if isinstance(tree, dict):
        return {key: _moved(value, cache) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_moved(value, cache) for value in tree]
    is_inside = isinstance(tree, str) and tree.startswith(f"{DEFAULT_CACHE}/")
    return f"{cache}{tree.removeprefix(str(DEFAULT_CACHE))}" if is_inside else tree


def _shipped(name: str) -> Path:
    """A config of this package: inside it when installed, beside it in a checkout."""
    package = Path(fusellm_ray.__file__).parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(f"configs/{name} is not where this package was installed ({package}); install it again")


def _arm(config: Config, arm: str, zoo: Zoo) -> Config:
    """One arm's run; its name holds all that makes it another study."""
    tree = config.model_dump(mode="json")
    name = f"{config.run.name}-{arm}-{zoo.folder.resolve().name[:8]}-{config.training.steps}-seed{config.run.seed}"
    tree["run"]["name"] = name
    tree["evaluation"]["sources"] = []  # what is evaluated is the exported model, beside all others
    if arm == "clm":
        tree["fusion"]["rule"] = "none"
    return parse_config(tree)


def _forget_finished(runs: dict[str, Config]) -> None:
    """What has its table begins anew; what was interrupted goes on."""
    folders = {arm: Path(Checkpoints(run.run.storage, run.run.name).folder) for arm, run in runs.items()}
    if (folders["fused"] / SCORES_FILE).is_file():
        for folder in filter(Path.is_dir, folders.values()):
            shutil.rmtree(folder)


def _build(cache: Path, console: Console) -> Zoo:
    with Progress(
        TextColumn("{task.description:>8}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[message]}"),
        console=console,
    ) as progress:
        tasks: dict[str, TaskID] = {}
        said: dict[str, int] = {}

        def on_progress(stage: str, share: float, message: str) -> None:
            if console.is_terminal:
                if stage not in tasks:
                    tasks[stage] = progress.add_task(stage, total=1.0, message="")
                progress.update(tasks[stage], completed=share, message=message)
            elif int(4 * share) > said.get(stage, -1):  # in a log: a line a quarter
                said[stage] = int(4 * share)
                console.print(f"{stage}: {share:.0%}, {message}")

        zoo = build_zoo(cache, on_progress=on_progress)
    # A fixed name for the configuration file, so that `fusellm-ray train configs/quickstart.yaml` works, too.
    point_latest(zoo.folder)
    return zoo


def _evaluate(
    config: Config, runs: dict[str, Config], zoo: Zoo, console: Console
) -> dict[str, dict[str, DomainScore]]:
    """Bits per byte of the zoo's models (kept beside them, they do not change) and of both exported arms."""
    documents = held_out_documents(config.evaluation.sources, config.evaluation.max_bytes)
    kept = zoo.folder / f"scores-{MEASURE}-{config.corpus.row_tokens}-{config.evaluation.max_bytes}.json"
    fixed = {"target before": zoo.target} | {f"teacher {name}": path for name, path in zoo.experts.items()}
    scores: dict[str, dict[str, DomainScore]] = {}
    models: dict[str, Path] = {}
    if kept.is_file():
        for name, by_domain in json.loads(kept.read_text(encoding="utf-8")).items():
            scores[name] = {domain: DomainScore(*sums) for domain, sums in by_domain.items()}
    else:
        models |= fixed
    for arm, run in runs.items():
        folder = Path(run.run.storage) / f"{run.run.name}-model"
        shutil.rmtree(folder, ignore_errors=True)
        models[ARMS[arm]] = export_run(run, folder)

    # One thread a model: torch's own threads get in each other's way on few cores.
    use_cpu(threads=1)
    with ThreadPoolExecutor(os.cpu_count()) as pool, Progress(console=console, transient=True) as progress:
        answers = {}
        for name, folder in models.items():
            model, tokenizer, _ = load_model(ModelConfig(model=str(folder)))
            answers[name] = pool.submit(
                bits_per_byte, model, tokenizer, documents, row_tokens=config.corpus.row_tokens, batch_rows=4
            )
        for _ in progress.track(as_completed(answers.values()), total=len(answers), description="evaluate"):
            pass
    scores |= {name: answer.result() for name, answer in answers.items()}
    partial = kept.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps({n: {d: astuple(v) for d, v in scores[n].items()} for n in fixed}))
    partial.replace(kept)
    teachers = [name for name in fixed if name != "target before"]
    return {name: scores[name] for name in ["target before", "CLM only", "fused", *teachers]}


class _Clock:
    """Seconds by stage."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self._seconds[stage] = round(now - self._last, 1)
        self._last = now
