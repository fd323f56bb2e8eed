"""The command line: parses first, imports torch, ray or transformers only when a command runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, Literal

import click

import fusellm_ray
from fusellm_ray.credentials import refuse_credentials
from fusellm_ray.errors import FuseLLMError
from fusellm_ray.folders import below, is_uri

INTERRUPTED = 130
"""Exit code after a requested stop: the run is saved, and not finished."""


_JSON_LOG_OF = f"{__name__}.json_log_of"
"""Key in click's context: the run whose log is JSON."""


class _Commands(click.Group):
    """Shows errors meant for people as one message, without a traceback."""

    def invoke(self, context: click.Context) -> object:
        try:
            return super().invoke(context)
        except FuseLLMError as error:
            run = context.meta.get(_JSON_LOG_OF)
            if run is None:
                click.secho(f"{type(error).__name__}: {error}", fg="red", err=True)
            else:
                from fusellm_ray.observe.progress import make_display

                said = {"event": "error", "error": type(error).__name__, "text": str(error)}
                make_display(run, "json").show(said)
            sys.exit(1)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)


class _Step(click.ParamType):
    name = "INTEGER|best"

    def convert(
        self, value: str, param: click.Parameter | None, context: click.Context | None
    ) -> int | Literal["best"]:
        if value == "best":
            return "best"
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a step nor 'best'", param, context)


class _OutFile(click.Path):
    """A file to write at the end of what may take hours: whether it can be is seen before."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False, writable=True)

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        path = Path(os.fsdecode(super().convert(value, param, context)))
        if not os.access(path.parent, os.W_OK) or not path.parent.is_dir():
            self.fail(f"{path.parent} is no folder that can be written to", param, context)
        return path


class _NewFolder(click.Path):
    """A folder to write, which holds nothing yet."""

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        path = Path(os.fsdecode(super().convert(value, param, context)))
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            self.fail(f"{path} exists and is not an empty folder", param, context)
        if path.resolve() == Path.cwd():  # it would be replaced under the user's feet
            self.fail("is where this command runs; name another folder", param, context)
        return path


@click.group(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(fusellm_ray.__version__)
def main() -> None:
    """Fuse the knowledge of several language models into one, live, on Ray."""


@main.command()
@click.option("--seed", default=0, show_default=True, help="Seed of the data order.")
@click.option("--steps", type=click.IntRange(min=1), help="Optimiser steps of each arm.")
@click.option("--cache", type=click.Path(path_type=Path), help="Where the models are kept.")
@click.option("--json", "json_path", type=_OutFile(), help="Write the table as JSON, too.")
def quickstart(seed: int, steps: int | None, cache: Path | None, json_path: Path | None) -> None:
    """Build three small experts from text on this machine, and fuse them into a fourth model."""
    # Small local models: transformers' bars would only break up ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from fusellm_ray.quickstart.run import run_quickstart

    is_finished = run_quickstart(seed=seed, steps=steps, cache=cache, json_path=json_path)
    sys.exit(0 if is_finished else INTERRUPTED)


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[a.b=value ...]")
@click.option(
    "--allow-changes", is_flag=True, help="Resume even if models, tokenizers or corpus have changed."
)
@click.option(
    "--attach", is_flag=True, help="Use the teachers that `teachers up` started; leave them running."
)
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="json: an object a line, of the driver and of Ray's processes; what libraries print stays as it is.",
)
@click.pass_context
def train(
    context: click.Context,
    config: Path,
    overrides: tuple[str, ...],
    allow_changes: bool,
    attach: bool,
    log_format: Literal["text", "json"],
) -> None:
    """Train the target of CONFIG with its teachers; run it again to resume."""
    from fusellm_ray.config_file import load_config

    if log_format == "json":
        context.meta[_JSON_LOG_OF] = str(config)  # until its name is known
    settings = load_config(config, overrides)  # refuse before the seconds that the imports below take
    if log_format == "json":
        context.meta[_JSON_LOG_OF] = settings.run.name
        os.environ["RAY_LOGGING_CONFIG_ENCODING"] = "JSON"  # Ray reads it once, when it is imported
    from fusellm_ray.job import run_job
    from fusellm_ray.observe.progress import make_display

    title = settings.run.name if log_format == "json" else "training"
    outcome = run_job(
        settings, allow_changes=allow_changes, attached=attach, display=make_display(title, log_format)
    )
    sys.exit(0 if outcome.is_finished else INTERRUPTED)


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[a.b=value ...]")
@click.option("--no-cluster", is_flag=True, help="Do not compare with a cluster's resources.")
def check(config: Path, overrides: tuple[str, ...], no_cluster: bool) -> None:
    """Refuse what cannot work before anything starts, and print the plan of the run."""
    from fusellm_ray.config_file import load_config

    settings = load_config(config, overrides)
    from fusellm_ray.plan import make_plan, print_plan

    print_plan(make_plan(settings, with_cluster=not no_cluster))


@main.group()
def teachers() -> None:
    """Teachers that outlive a run, on the cluster that RAY_ADDRESS names; `train --attach` uses them."""


@teachers.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[a.b=value ...]")
def up(config: Path, overrides: tuple[str, ...]) -> None:
    """Start the teachers of CONFIG and wait until they are ready."""
    from fusellm_ray.config_file import load_config

    settings = load_config(config, overrides)
    from fusellm_ray.observe.progress import make_display
    from fusellm_ray.plan import preflight
    from fusellm_ray.teachers.attach import bring_up, running_cluster

    display = make_display()
    with running_cluster():
        bring_up(settings, preflight(settings)["teachers"], display)
    display.note("teachers are up; `fusellm-ray train CONFIG --attach` uses them")


@teachers.command("status")
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[a.b=value ...]")
def teachers_status(config: Path, overrides: tuple[str, ...]) -> None:
    """Show how the teachers of CONFIG stand."""
    from fusellm_ray.config_file import load_config

    settings = load_config(config, overrides)
    from fusellm_ray.teachers.attach import print_statuses, running_cluster, statuses

    with running_cluster():
        print_statuses(statuses(settings))


@teachers.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[a.b=value ...]")
def down(config: Path, overrides: tuple[str, ...]) -> None:
    """End the teachers of CONFIG and all their processes."""
    from fusellm_ray.config_file import load_config

    settings = load_config(config, overrides)
    from fusellm_ray.teachers.attach import running_cluster, take_down

    with running_cluster():
        ended = take_down(settings)
    click.echo(f"ended: {', '.join(ended)}" if ended else "none of them ran")


@main.command()
@click.argument("run", metavar="CONFIG|RUN_FOLDER")
@click.argument("overrides", nargs=-1, metavar="[a.b=value ...]")
@click.option("--watch", is_flag=True, help="Show it again and again until the run is over.")
def status(run: str, overrides: tuple[str, ...], watch: bool) -> None:
    """How a run stands: teachers, queues, win shares, waits, losses, time left. From any terminal."""
    from fusellm_ray.observe.records import History, read_records
    from fusellm_ray.observe.status import show_status

    folder = _run_folder(run, overrides)
    state = show_status(folder, lambda: History.of(read_records(folder)), watch=watch)
    sys.exit(1 if state.word == "failed" else 0)


@main.command()
@click.argument("run", metavar="CONFIG|RUN_FOLDER")
@click.argument("overrides", nargs=-1, metavar="[a.b=value ...]")
@click.option("--into", "out", type=_OutFile(), help="File to write (default: ./NAME.html).")
@click.option(
    "--scores", type=click.Path(path_type=Path), help="Models to compare: what `evaluate --json` wrote."
)
def report(run: str, overrides: tuple[str, ...], out: Path | None, scores: Path | None) -> None:
    """A run as one HTML page that needs no network: losses, teachers, waits, alignment, comparison."""
    folder = _run_folder(run, overrides)
    from fusellm_ray.report.write import write_report

    click.echo(f"wrote {write_report(folder, out, scores)}")


@main.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--corpus",
    "corpora",
    multiple=True,
    metavar="NAME=PATH",
    help="Held-out text: files, or NAME=dataset:PLACE[,subset=S][,split=S][,revision=R][,streaming=true] with a hub id "
    "or a folder that Dataset.save_to_disk wrote.",
)
@click.option("--tasks", metavar="NAME,...", help="Tasks of lm-evaluation-harness (extra `harness`).")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Folder of the tasks' data, TASK/SPLIT.jsonl, where no hub can be reached; and of own tasks, *.yaml.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Examples of each task (default: all).")
@click.option(
    "--allow-code-execution",
    is_flag=True,
    help="Run the Python that models write in code tasks (humaneval, mbpp), here and without a sandbox.",
)
@click.option(
    "--add-bos",
    multiple=True,
    metavar="MODEL",
    help="Begin each text with BOS for this model, whose tokenizer lost it (Gemma from GGUF, for instance).",
)
@click.option(
    "--field", default="text", show_default=True, help="Key of the text in JSONL or Parquet records."
)
@click.option("--max-bytes", default=200_000, show_default=True, help="Bytes of each corpus that are scored.")
@click.option("--context", type=click.IntRange(min=2), help="Tokens read at once (default: at most 2048).")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.")
@click.option(
    "--ensemble",
    "ensembles",
    multiple=True,
    metavar="MODEL,MODEL,...",
    help="Score the mean of these models' distributions, too, at the first MODEL's tokens.",
)
@click.option("--against", metavar="MODEL", help="Compare the others with this one (default: the first).")
@click.option(
    "--resamples", type=click.IntRange(min=1), default=2000, show_default=True, help="Bootstrap draws."
)
@click.option("--seed", default=0, show_default=True, help="Seed of the bootstrap.")
@click.option("--json", "json_path", type=_OutFile(), help="Write the figures as JSON, too.")
@click.option("--markdown", "markdown_path", type=_OutFile(), help="Write the tables, too.")
def evaluate(
    models: tuple[str, ...],
    corpora: tuple[str, ...],
    tasks: str | None,
    data: Path | None,
    limit: int | None,
    allow_code_execution: bool,
    add_bos: tuple[str, ...],
    field: str,
    max_bytes: int,
    context: int | None,
    dtype: str,
    threads: int | None,
    ensembles: tuple[str, ...],
    against: str | None,
    resamples: int,
    seed: int,
    json_path: Path | None,
    markdown_path: Path | None,
) -> None:
    """Bits per byte of Hugging Face models on text, with paired intervals, and lm-evaluation-harness tasks."""
    from fusellm_ray.evaluate.models import evaluate_models

    evaluate_models(
        models,
        corpora,
        field=field,
        max_bytes=max_bytes,
        context=context,
        dtype=dtype,
        threads=threads,
        ensembles=ensembles,
        tasks=tasks.split(",") if tasks else (),
        data=data,
        limit=limit,
        allow_code_execution=allow_code_execution,
        add_bos=add_bos,
        against=against,
        num_resamples=resamples,
        seed=seed,
        json_path=json_path,
        markdown_path=markdown_path,
    )


@main.command()
@click.argument("study", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[a.b=value ...]")
def compare(study: Path, overrides: tuple[str, ...]) -> None:
    """Train the arms of STUDY at equal tokens and steps, and compare them; run it again to go on."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from fusellm_ray.study import load_study

    settings = load_study(study, overrides)
    from fusellm_ray.compare import run_comparison

    sys.exit(0 if run_comparison(settings) else INTERRUPTED)


@main.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL MODEL...")
@click.option(
    "--method",
    type=click.Choice(["linear", "slerp", "ties", "dare", "sce"]),
    default="linear",
    show_default=True,
)
@click.option("--base", required=True, help="What the models continue; gives the tokenizer, too.")
@click.option("--into", "out", type=_NewFolder(), required=True, help="Folder to write.")
@click.option(
    "--parameter",
    "parameters",
    multiple=True,
    type=(str, float),
    metavar="NAME NUMBER",
    help="mergekit's own.",
)
@click.option("--seed", default=0, show_default=True, help="Of dare's draws.")
def merge(
    models: tuple[str, ...],
    method: str,
    base: str,
    out: Path,
    parameters: tuple[tuple[str, float], ...],
    seed: int,
) -> None:
    """Merge the weights of models that continue one base: what fusing must be better than."""
    from fusellm_ray.config import ModelConfig
    from fusellm_ray.evaluate.merge import merge_models

    merge_models(
        method,  # type: ignore[arg-type]
        [ModelConfig(model=model) for model in models],
        out,
        base=ModelConfig(model=base),
        parameters=dict(parameters),
        seed=seed,
    )
    click.echo(f"wrote {out}")


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[a.b=value ...]")
@click.option("--into", "out", type=_NewFolder(), required=True, help="Folder to write.")
@click.option("--step", type=_Step(), help="Checkpoint of this step, or best (default: the latest).")
def export(config: Path, overrides: tuple[str, ...], out: Path, step: int | Literal["best"] | None) -> None:
    """Write a run's checkpoint as a folder that AutoModelForCausalLM loads, tokenizer included."""
    from fusellm_ray.config_file import load_config

    settings = load_config(config, overrides)
    from fusellm_ray.job import export_run

    folder = export_run(settings, out, step=step)
    click.echo(f"wrote {folder}")


@main.command()
@click.option("--target", required=True, help="Folder or hub id of the target (its tokenizer is read).")
@click.option("--teacher", required=True, help="Folder or hub id of the teacher.")
@click.option("--text", "file", type=click.Path(path_type=Path), required=True, help="A UTF-8 text file.")
@click.option("--model", "with_model", is_flag=True, help="Load the teacher's model, too: mass and fidelity.")
@click.option("--sequence", type=click.Choice(["span", "dtw"]), default="span", show_default=True)
@click.option(
    "--straddle", type=click.Choice(["mask", "onehot", "condition"]), default="condition", show_default=True
)
@click.option(
    "--projection", type=click.Choice(["exact", "mined", "prefix"]), default="prefix", show_default=True
)
@click.option("--top-k", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--max-bytes", type=click.IntRange(min=1), default=100_000, show_default=True)
@click.option("--json", "json_path", type=_OutFile(), help="Write the figures as JSON, too.")
def align(
    target: str,
    teacher: str,
    file: Path,
    with_model: bool,
    sequence: str,
    straddle: str,
    projection: str,
    top_k: int,
    max_bytes: int,
    json_path: Path | None,
) -> None:
    """Measure how well a teacher's distributions would reach a target, and show it on a passage."""
    from fusellm_ray.config import AlignmentConfig
    from fusellm_ray.evaluate.alignment import show_alignment

    settings = {"sequence": sequence, "straddle": straddle, "projection": projection}
    show_alignment(
        target,
        teacher,
        file,
        config=AlignmentConfig.model_validate(settings),
        with_model=with_model,
        top_k=top_k,
        max_bytes=max_bytes,
        json_path=json_path,
    )


def _run_folder(run: str, overrides: tuple[str, ...]) -> str:
    """The folder of a run, which may be given by its config."""
    if is_uri(run) or Path(run).is_dir():
        refuse_credentials(run, "the run's folder")  # it is printed
        return run
    from fusellm_ray.config_file import load_config

    settings = load_config(run, overrides).run
    return below(settings.storage, settings.name)


if __name__ == "__main__":
    main()
