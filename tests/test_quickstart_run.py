"""The quickstart from its command to its table, on the smallest zoo."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fusellm_ray.cli import main
from fusellm_ray.config_file import parse_config
from fusellm_ray.quickstart import run
from fusellm_ray.quickstart.run import quickstart_config
from fusellm_ray.quickstart.text import DOMAINS
from fusellm_ray.quickstart.zoo import Plan, Zoo, build_zoo
from fusellm_ray.report.write import SCORES_FILE
from tests.test_quickstart_zoo import small, small_plan


def test_arms_are_forgotten_only_once_there_is_a_table(tmp_path: Path) -> None:
    base = quickstart_config(tmp_path, steps=2).model_dump(mode="json")
    base["run"]["storage"] = str(tmp_path)
    runs = {arm: parse_config(base | {"run": base["run"] | {"name": arm}}) for arm in run.ARMS}
    for arm in runs:
        checkpoint = tmp_path / arm / "step_00000002"
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.json").write_text(json.dumps({"step": 2, "files": {}}))
    run._forget_finished(runs)
    assert all((tmp_path / arm).is_dir() for arm in runs)
    (tmp_path / "fused" / SCORES_FILE).write_text("{}")
    run._forget_finished(runs)
    assert not any((tmp_path / arm).exists() for arm in runs)


def test_any_cache_takes_the_place_of_the_default_one(tmp_path: Path) -> None:
    cache = tmp_path / "a, b: #c"
    config = quickstart_config(cache)
    places = [config.run.storage, config.target.model, *(t.model for t in config.teachers)]
    places += [str(s.path) for s in (*config.corpus.sources, *config.evaluation.sources)]
    assert len(places) == 11
    assert all(place.startswith(f"{cache}/") for place in places)


@pytest.mark.slow
def test_the_command_trains_both_arms_and_compares_them(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Plan()
    reads_rows = {"row_tokens": 256, "steps": 4}
    plan = replace(
        small_plan(),
        experts={domain: replace(small(recipe), **reads_rows) for domain, recipe in full.experts.items()},
        target=replace(small(full.target), **reads_rows),
    )

    def build(cache: Path, **options: Any) -> Zoo:
        return build_zoo(cache, plan=plan, **options)

    monkeypatch.setattr(run, "build_zoo", build)
    report = tmp_path / "report.json"
    command = ["quickstart", "--cache", str(tmp_path), "--steps", "2", "--json", str(report)]
    done = CliRunner().invoke(main, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    models = ["target before", "CLM only", "fused", *(f"teacher {domain}" for domain in DOMAINS)]
    assert all(name in done.output for name in models)
    scores = json.loads(report.read_text())["scores"]
    assert list(scores) == models
    for by_domain in scores.values():
        assert {*by_domain["domains"]} == {*DOMAINS}
    # Two steps change a model, and another way with teachers than without.
    assert scores["target before"] != scores["CLM only"] != scores["fused"]
    for arm in ("fused", "clm"):
        (folder,) = (tmp_path / "runs").glob(f"quickstart-{arm}-*-model")
        assert (folder / "model.safetensors").is_file()
