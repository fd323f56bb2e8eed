"""`fusellm-ray compare` on tiny models and real Ray: every kind of arm, and nothing twice."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fusellm_ray import compare
from fusellm_ray.compare import _by_teachers, _cells, run_comparison
from fusellm_ray.config import ModelConfig
from fusellm_ray.errors import ConfigError, FuseLLMError, ModelError
from fusellm_ray.evaluate.models import evaluate_models
from fusellm_ray.folders import try_lock
from fusellm_ray.job import Outcome
from fusellm_ray.perplexity import held_out_documents
from fusellm_ray.study import Study, parse_study
from tests.runs import build_run, model_folder, of_event


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
    steps = of_event(map(json.loads, metrics.read_text().splitlines()), "step")
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


def test_a_study_is_made_by_one_process(tmp_path: Path, tokenizer_folders: dict[str, Path]):
    study = tiny_study(tmp_path, tokenizer_folders)
    study.folder.mkdir()
    with (study.folder / ".lock").open("w") as lock:
        assert try_lock(lock)
        with pytest.raises(ConfigError, match="another process is making this study"):
            run_comparison(study)
    assert [path.name for path in study.folder.iterdir()] == [".lock"]


def test_arms_that_fail_are_named_and_cost_no_other(
    tmp_path: Path, tokenizer_folders: dict[str, Path], ray_session: None
):
    arms = [
        {"name": "untouched", "kind": "model"},
        {"name": "gone", "kind": "model", "model": str(tmp_path / "absent")},
        {"name": "greedy", "teachers": ["left"], "set": {"teachers.0.top_k": 100_000}},
        {"name": "clm", "set": {"fusion.rule": "none"}},
    ]
    study = tiny_study(tmp_path, tokenizer_folders, arms=arms)
    with pytest.raises(
        FuseLLMError, match=r"2 of 4 results could not be made \(gone, seed 0; greedy, seed 0\)"
    ):
        run_comparison(study)
    told = json.loads((study.folder / "comparison.json").read_text())
    assert list(told["models"]) == ["untouched", "clm"]
    assert told["differences"].keys() == {"untouched"}
    assert "top_k=100000 exceeds the vocabulary" in told["failures"]["greedy, seed 0"]
    assert "- gone, seed 0: ModelError" in (study.folder / "comparison.md").read_text()


def test_a_study_stopped_during_a_step_goes_on_there_with_each_seed_once(
    tmp_path: Path, tokenizer_folders: dict[str, Path], ray_session: None
):
    arms = [
        {"name": "untouched", "kind": "model"},
        {"name": "kd", "teachers": ["left"], "set": {"fusion.rule": "mean"}},
    ]
    study = tiny_study(tmp_path, tokenizer_folders, arms=arms, seeds=[0, 1], against="untouched")
    steps = 80  # the stop reaches a rank about a second after the first of them
    study.base["training"]["steps"] = study.base["checkpoint"]["every_steps"] = steps
    study.base["trainer"]["workers"] = 1

    def stop_after_a_step() -> None:
        logs = (study.folder / "runs").glob
        while not any('"event": "step"' in log.read_text() for log in logs("kd-*/metrics.jsonl")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    stopper = threading.Thread(target=stop_after_a_step, daemon=True)
    stopper.start()
    assert not run_comparison(study)
    stopper.join()
    (log,) = (study.folder / "runs").glob("*/metrics.jsonl")
    (checkpoint,) = log.parent.glob("step_*")
    assert 0 < int(checkpoint.name.removeprefix("step_")) < steps
    assert [path.name.split("-")[0] for path in (study.folder / "results").iterdir()] == ["untouched"]

    assert run_comparison(study)
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [record["step"] for record in of_event(records, "step")] == list(range(1, steps + 1))
    told = json.loads((study.folder / "comparison.json").read_text())
    kd, untouched = told["models"]["kd"], told["models"]["untouched"]
    assert kd["seeds"]["0"]["mean"] != kd["seeds"]["1"]["mean"]
    assert kd["mean"] < untouched["mean"]
    assert told["differences"]["kd"]["mean"]["difference"] == pytest.approx(kd["mean"] - untouched["mean"])


def test_a_task_scores_elsewhere_and_fails_with_the_error_of_its_own(
    tmp_path: Path, tokenizer_folders: dict[str, Path], ray_session: None
):
    slot = {"train_slot": 1.0}
    assert compare._as_a_task(slot, lambda: os.getpid()) != os.getpid()
    config = tiny_study(tmp_path, tokenizer_folders).config()
    documents = held_out_documents(config.evaluation.sources, 6000)
    scores = compare._as_a_task(slot, compare._score, config.target, documents, 64)
    assert [score.nats for score in scores] == pytest.approx(
        [score.nats for score in compare._score(config.target, documents, 64)]
    )
    gone = ModelConfig(model=str(tmp_path / "gone"))
    with pytest.raises(ModelError, match="gone"):
        compare._as_a_task(slot, compare._score, gone, documents, 64)
    with pytest.raises(FuseLLMError, match="WorkerCrashedError"):
        compare._as_a_task(slot, lambda: os._exit(1))


def test_idle_teachers_make_room_where_the_cluster_cannot_hold_both(
    tmp_path: Path, tokenizer_folders: dict[str, Path], ray_session: None
):
    stopped: list[str] = []
    arms = [{"name": name, "teachers": [name]} for name in ("left", "right")]
    for cpus, expected in ((0.1, []), (5, ["left"])):
        study = tiny_study(tmp_path / str(cpus), tokenizer_folders, arms=arms, against="left")
        for teacher in study.base["teachers"]:
            teacher["resources"] = {"num_cpus": cpus}
        left, right = (study.config(arm) for arm in study.arms)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compare, "supervise", lambda _, teachers: teachers[0].name)
            patch.setattr(compare, "stop_pools", lambda pools: stopped.extend(pools.values()))
            teachers = compare._Teachers()
            teachers.up(left)
            assert teachers.up(right) == {"right": "right"}
            assert stopped == expected


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


# ------------------------------------------------------------------------------------ what a result is of

HUB: dict[str, Any] = {
    "name": "hub",
    "against": "clm",
    "base": {
        "target": {"model": "org/target"},
        "teachers": [{"name": "a", "model": "org/a"}, {"name": "b", "model": "org/b"}],
        "corpus": {"sources": [{"name": "x", "path": "/nowhere/x.jsonl"}]},
        "training": {"steps": 10},
        "evaluation": {"sources": [{"name": "x", "path": "/nowhere/y.jsonl"}]},
    },
    "arms": [
        {"name": "untouched", "kind": "model"},
        {"name": "a alone", "kind": "model", "teacher": "a"},
        {"name": "home", "kind": "model", "model": "~/model"},
        {"name": "ensemble", "kind": "ensemble"},
        {"name": "merge", "kind": "merge", "method": "linear"},
        {"name": "clm", "set": {"fusion.rule": "none"}},
        {"name": "fused"},
    ],
}


def names(**sections: Any) -> dict[str, str]:
    """Arm → the name of its result, with sections of the base changed."""
    tree = copy.deepcopy(HUB)
    tree["base"] |= sections
    return {cell.arm.name: cell.name for cell in _cells(parse_study(tree), [])}


def changed(**sections: Any) -> set[str]:
    before, after = names(), names(**sections)
    return {arm for arm in before if before[arm] != after[arm]}


def test_a_result_belongs_to_a_revision():
    assert changed(target={"model": "org/target", "revision": "v2"}) == {
        "untouched",
        "ensemble",
        "merge",
        "clm",
        "fused",
    }
    teachers = copy.deepcopy(HUB["base"]["teachers"])
    teachers[0]["revision"] = "v2"
    assert changed(teachers=teachers) == {"a alone", "ensemble", "merge", "fused"}


def test_a_result_stays_where_only_speed_and_place_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    teachers = copy.deepcopy(HUB["base"]["teachers"])
    teachers[0] |= {"cache_bytes": 0, "replicas": {"max": 3}, "resources": {"num_cpus": 0.5}}
    assert not changed(teachers=teachers)
    assert not changed(trainer={"workers": 2, "max_failures": 0, "threads": 3})
    before = names()
    monkeypatch.chdir(tmp_path)
    assert names() == before


def test_evaluations_during_training_are_no_part_of_a_result():
    assert not changed(evaluation=HUB["base"]["evaluation"] | {"every_steps": 5})


def test_a_result_belongs_to_what_files_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.jsonl").write_text("{}\n")
    (tmp_path / "model").mkdir()
    sources = [{"name": "x", "path": str(tmp_path / "*.jsonl")}]
    before = names(corpus={"sources": sources})
    assert names(corpus={"sources": sources}) == before
    (tmp_path / "x.jsonl").write_text('{"text": "more"}\n')
    (tmp_path / "model" / "config.json").write_text("{}")
    after = names(corpus={"sources": sources})
    assert {arm for arm in before if before[arm] != after[arm]} == {"home", "clm", "fused"}


def test_a_result_belongs_to_what_latest_points_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    sources = [{"name": "x", "path": str(tmp_path / "latest" / "x.jsonl")}]
    for version in ("one", "two"):
        (tmp_path / version).mkdir()
    (tmp_path / "latest").symlink_to("one")
    (tmp_path / "model").symlink_to("one")
    before = names(corpus={"sources": sources})
    for link in ("latest", "model"):
        (tmp_path / link).unlink()
        (tmp_path / link).symlink_to("two")
    after = names(corpus={"sources": sources})
    assert {arm for arm in before if before[arm] != after[arm]} == {"home", "clm", "fused"}


def test_checkpoints_stay_until_their_scores_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    study = parse_study(HUB | {"storage": str(tmp_path)})
    (cell,) = (cell for cell in _cells(study, []) if cell.arm.name == "clm")
    checkpoint = study.folder / "runs" / cell.name / "step_00000010"
    checkpoint.mkdir(parents=True)
    kept: list[bool] = []
    monkeypatch.setattr(compare, "local_or_running_cluster", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(compare, "_require_resources", lambda *_: None)
    monkeypatch.setattr(compare._Teachers, "up", lambda *_: {})
    monkeypatch.setattr(compare, "run_job", lambda *_, **__: Outcome(10, is_finished=True))
    monkeypatch.setattr(compare, "export_run", lambda _, folder: folder.mkdir(parents=True))
    monkeypatch.setattr(compare, "evaluate_model", lambda *_, **__: [])
    monkeypatch.setattr(compare, "_keep", lambda *_: kept.append(checkpoint.is_dir()))
    assert compare._make(study, [cell], [], compare.Console(quiet=True), {})
    assert kept == [True]
    assert not checkpoint.exists()


def test_a_stop_during_an_arms_last_step_keeps_the_arm_and_begins_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    study = parse_study(HUB | {"storage": str(tmp_path)})
    cells = [cell for cell in _cells(study, []) if cell.arm.kind == "train"]
    assert len(cells) > 1
    kept: list[str] = []
    monkeypatch.setattr(compare, "local_or_running_cluster", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(compare, "_require_resources", lambda *_: None)
    monkeypatch.setattr(compare._Teachers, "up", lambda *_: {})
    monkeypatch.setattr(
        compare, "run_job", lambda *_, **__: Outcome(10, is_finished=True, stop_requested=True)
    )
    monkeypatch.setattr(compare, "_score_trained", lambda *_: [])
    monkeypatch.setattr(compare, "_drop_checkpoints", lambda *_: None)
    monkeypatch.setattr(compare, "_keep", lambda study, cell, *_: kept.append(cell.name))
    assert not compare._make(study, cells, [], compare.Console(quiet=True), {})
    assert kept == [cells[0].name]
