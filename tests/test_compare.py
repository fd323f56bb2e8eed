"""`fusellm-ray compare` on tiny models and real Ray: every kind of arm, and nothing twice."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fusellm_ray.compare import _by_teachers, run_comparison
from fusellm_ray.evaluate.models import evaluate_models
from fusellm_ray.study import Study, parse_study
from tests.runs import build_run, model_folder


def tiny_study(folder: Path, tokenizers: dict[str, Path], **changes: Any) -> Study:
    tree = build_run(folder / "run", tokenizers, training={"steps": 2}, checkpoint={"every_steps": 2})
    del tree["run"]
    siblings = [
        {
            "name": f"sibling{seed}",
            "model": str(model_folder("llama_tied", tokenizers["llama"], folder / f"s{seed}", seed=seed)),
        }
        for seed in (7, 8)
    ]
    tree["teachers"] += siblings
    tree["evaluation"] = {"sources": tree["corpus"]["sources"], "max_bytes": 6000}
    both = ["left", "right"]
    arms = [
        {"name": "untouched", "kind": "model"},
        {"name": "left alone", "kind": "model", "teacher": "left"},
        {"name": "ensemble", "kind": "ensemble", "teachers": both},
        {"name": "merge", "kind": "merge", "method": "linear", "teachers": ["sibling7", "sibling8"]},
        {"name": "clm", "set": {"fusion.rule": "none"}},
        {"name": "fused", "teachers": both},
    ]
    study = {"name": "tiny", "storage": str(folder), "against": "clm", "base": tree, "arms": arms}
    return parse_study(study | changes)


def test_a_study_compares_all_kinds_of_arms_and_is_not_made_twice(
    tmp_path: Path, tokenizer_folders: dict[str, Path], ray_session: None
):
    study = tiny_study(tmp_path, tokenizer_folders)
    assert run_comparison(study)
    told = json.loads((study.folder / "comparison.json").read_text())
    arms = told["models"]
    assert list(arms) == [arm.name for arm in study.arms]
    assert arms["fused"]["mean"] != arms["clm"]["mean"]
    assert told["differences"]["fused"]["mean"]["difference"] == pytest.approx(
        arms["fused"]["mean"] - arms["clm"]["mean"]
    )
    metrics = study.folder / arms["fused"]["runs"]["0"] / "metrics.jsonl"
    steps = [
        record for record in map(json.loads, metrics.read_text().splitlines()) if record["event"] == "step"
    ]
    assert [record["step"] for record in steps] == [1, 2]
    assert "teacher/left/win_share" in steps[0]
    # The same figures as `evaluate` gives.
    target = study.config().target.model
    corpora = [f"{s.name}={s.path}" for s in study.config().evaluation.sources]
    alone = evaluate_models([target], corpora, max_bytes=6000, context=64, num_resamples=10)
    assert arms["untouched"]["mean"] == pytest.approx(alone["models"][target]["mean"], rel=1e-5)
    assert "Models compared" in (study.folder / "reports" / "fused.html").read_text()
    # Models and checkpoints are gone, and a second call only reads.
    assert not list((study.folder / "models").iterdir())
    assert not list((study.folder / "runs").glob("*/step_*"))
    results = {path: os.stat(path).st_mtime_ns for path in (study.folder / "results").iterdir()}
    before = (study.folder / "comparison.json").read_text()
    assert run_comparison(study)
    assert {path: os.stat(path).st_mtime_ns for path in (study.folder / "results").iterdir()} == results
    assert (study.folder / "comparison.json").read_text() == before


def test_a_study_without_trained_arms_needs_no_ray(tmp_path: Path, tokenizer_folders: dict[str, Path]):
    study = tiny_study(tmp_path, tokenizer_folders)
    study = study.model_copy(
        update={"arms": [a for a in study.arms if a.kind != "train"], "against": "untouched"}
    )
    assert run_comparison(study)
    told = json.loads((study.folder / "comparison.json").read_text())
    assert list(told["models"]) == ["untouched", "left alone", "ensemble", "merge"]
    assert told["differences"].keys() == {"left alone", "ensemble", "merge"}
    assert len(list((study.folder / "results").iterdir())) == 4
    assert not list((study.folder / "models").iterdir())
    assert "| untouched |" in (study.folder / "comparison.md").read_text()


def test_runs_with_the_same_teachers_follow_each_other(tmp_path: Path, tokenizer_folders: dict[str, Path]):
    arms = [
        {"name": "a"},
        {"name": "clm", "set": {"fusion.rule": "none"}},
        {"name": "dtw", "set": {"alignment.sequence": "dtw"}},
        {"name": "b", "set": {"objective.clm_weight": 0.1}},
        {"name": "kd", "teachers": ["left"]},
    ]
    study = tiny_study(tmp_path, tokenizer_folders, arms=arms)
    configs = [study.config(arm, run=arm.name) for arm in study.arms]
    assert [config.run.name for config in _by_teachers(configs)] == ["a", "b", "clm", "dtw", "kd"]
