"""Gathers what a report shows, and writes it."""

from __future__ import annotations

import json
from pathlib import Path

from fusellm_ray.config_file import parse_config
from fusellm_ray.errors import ConfigError, FuseLLMError
from fusellm_ray.folders import absolute, is_uri, last_name
from fusellm_ray.observe.records import History, read_records
from fusellm_ray.report.page import Scores, render_page

SCORES_FILE = "scores.json"
"""In a run's folder: models to compare it with; the quickstart leaves one."""


def write_report(folder: str, out: Path | None = None, scores: Path | None = None) -> Path:
    """Write a run's page.

    Args:
        folder: of the run, a path or a URI.
        out: default: NAME.html where the command runs.
        scores: JSON of `fusellm-ray evaluate --json`; default: scores.json in the folder, if there is one.

    Returns:
        The file written.

    Raises:
        ConfigError: there is no record of a run, or the scores are none.
    """
    folder = absolute(folder)
    history = History.of(read_records(folder))
    name = last_name(folder)
    if scores is None and not is_uri(folder) and (Path(folder) / SCORES_FILE).is_file():
        scores = Path(folder) / SCORES_FILE
    page = render_page(
        name,
        history,
        scores=None if scores is None else _read_scores(scores),
        passages=_passages(history),
    )
    out = out or Path(f"{name}.html")
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--into {out}: cannot be written ({error.strerror}); name another file") from error
    return out


def _read_scores(path: Path) -> Scores:
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
        for score in scores["models"].values():
            float(score["mean"])
            for figures in score["domains"].values():
                float(figures["bits_per_byte"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path}: is no table of scores ({type(error).__name__}: {error}); give what "
            "`fusellm-ray evaluate --json` wrote"
        ) from error
    if not scores["models"]:
        raise ConfigError(f"{path}: compares no models; name some to `fusellm-ray evaluate`")
    return scores


def _passages(history: History) -> str:
    if history.config is None:
        return ""
    from fusellm_ray.report.passages import alignment_passages  # brings transformers

    try:
        config = parse_config(history.config)
    except FuseLLMError:  # written by another version
        return ""
    return alignment_passages(config)
