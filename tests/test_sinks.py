"""What sinks were given can be read back through the services' own formats and clients."""

import struct

import pytest

from fusellm_ray.errors import ConfigError
from fusellm_ray.observe.sinks import Sinks, require_packages

FIRST = [
    {"event": "start", "step": 0, "ranks": 2},
    {"event": "step", "step": 1, "steps": 3, "loss": 4.0, "teacher/a/win_share": 0.25},
    {"event": "step", "step": 2, "steps": 3, "loss": float("nan"), "teacher/a/win_share": 0.5},
]
SECOND = [
    {"event": "step", "step": 2, "steps": 3, "loss": 3.0, "teacher/a/win_share": 0.5},
    {"event": "evaluation", "step": 2, "bits_per_byte": 1.5},
    {"event": "sample", "step": 2, "prompt": "a", "text": "b"},
    {"event": "end", "step": 3, "reason": "finished"},
]
WANTED = {
    "loss": [(1, 4.0), (2, 3.0)],
    "teacher/a/win_share": [(1, 0.25), (2, 0.5), (2, 0.5)],
    "bits_per_byte": [(2, 1.5)],
}
SETTINGS = {"training": {"lr": 0.5}, "teachers": [{"name": "a"}]}


def run_twice(kind, folder):
    """A run that stops and resumes; what went wrong."""
    problems = []
    for records in (FIRST, SECOND):
        with Sinks([kind], str(folder), SETTINGS, problems.append) as sinks:
            for record in records:
                sinks.write(record)
    return problems


def test_tensorboard_events_hold_every_figure(tmp_path):
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    assert run_twice("tensorboard", tmp_path / "run") == []
    seen, texts = {}, []
    for file in sorted((tmp_path / "run" / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:  # length, its checksum, the event, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    seen.setdefault(value.tag, []).append((event.step, value.simple_value))
                else:
                    texts += value.tensor.string_val
    assert seen == WANTED
    assert b'"lr": 0.5' in texts[0]


def test_mlflow_has_one_run_with_every_figure_and_the_settings(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file://{tmp_path}/mlruns")
    assert run_twice("mlflow", tmp_path / "run") == []
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("fusellm_ray")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "run"
    assert run.info.status == "FINISHED"
    assert run.data.params == {"training.lr": "0.5", "teachers.0.name": "a"}
    for name, values in WANTED.items():
        assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)] == values


def test_wandb_has_one_run_with_the_latest_figures_and_the_settings(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    problems, ids = [], set()
    for records, loss in ((FIRST, 4.0), (SECOND, 3.0)):
        with Sinks(["wandb"], str(tmp_path / "run"), SETTINGS, problems.append) as sinks:
            for record in records:
                sinks.write(record)
            ids.add((wandb.run.id, wandb.run.name, wandb.run.project))
            assert wandb.run.summary["loss"] == loss
            assert wandb.run.config["training"] == SETTINGS["training"]
    assert problems == []
    assert len(ids) == 1
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 2  # `wandb sync` joins them


def test_a_sink_that_fails_is_given_up_and_the_others_go_on(tmp_path):
    pytest.importorskip("tensorboardX")
    (tmp_path / "run").write_text("a file where a folder should be")
    problems = []
    with Sinks(["tensorboard"], str(tmp_path / "run"), {}, problems.append) as sinks:
        sinks.write(FIRST[1])
    (problem,) = problems
    assert "run.sinks: tensorboard is given up" in problem


def test_a_missing_package_is_named_before_a_run(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install mlflow-skinny"):
        require_packages(["mlflow"])
