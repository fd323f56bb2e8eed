"""Checkpoints are written behind the training thread: what arrives is the state at the call, or an error."""

import shutil
import threading
from pathlib import Path

import pyarrow.fs
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from fusellm_ray.config import TargetConfig
from fusellm_ray.errors import CheckpointError
from fusellm_ray.target.checkpoint import STATE_FILE, export_model, read_state
from fusellm_ray.target.model import build_target, make_optimizer
from fusellm_ray.target.saving import CheckpointWriter, publish_best
from fusellm_ray.target.storage import Checkpoints
from tests.models import tiny_model
from tests.ranks import run_ranks
from tests.test_checkpoint import TRAINING, load, snapshot, step
from tests.tokenizers import build


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build("bytelevel", folder)
    return str(tiny_model("llama_tied", 1200, folder))


def training(mesh, folder):
    model = build_target(TargetConfig(model=folder), mesh)
    optimizer = make_optimizer(model, TRAINING)
    step(model, optimizer, 0)
    return model, optimizer


def train_while_writing(mesh, folder, out):
    """Steps during a write; the state when it was asked for."""
    model, optimizer = training(mesh, folder)
    has_trained = threading.Event()
    written = []

    def report(directory, number):
        has_trained.wait()
        shutil.copytree(directory, f"{out}/{number}", dirs_exist_ok=True)

    writer = CheckpointWriter(lambda number, seconds: written.append(number), report=report)
    wanted = snapshot(model, optimizer)
    writer.save(model, optimizer, {"step": 1}, is_due=True, is_best=False)
    step(model, optimizer, 1)
    step(model, optimizer, 2)
    assert snapshot(model, optimizer) != wanted
    has_trained.set()
    writer.wait()
    assert written == [1]
    return wanted


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_what_is_written_is_the_state_when_it_was_asked_for(num_ranks, model_folder, tmp_path):
    wanted, *_ = run_ranks(num_ranks, train_while_writing, model_folder, str(tmp_path))
    (loaded,) = run_ranks(1, load, model_folder, str(tmp_path / "1"))
    assert loaded == wanted


def write_into_a_file(mesh, folder, file):
    model, optimizer = training(mesh, folder)
    writer = CheckpointWriter(print, report=lambda directory, _: shutil.copytree(directory, f"{file}/1"))
    writer.save(model, optimizer, {"step": 7}, is_due=True, is_best=False)
    with pytest.raises(CheckpointError) as caught:
        writer.wait()
    with pytest.raises(CheckpointError):
        writer.save(model, optimizer, {"step": 8}, is_due=True, is_best=False)
    return str(caught.value)


def test_a_write_that_fails_is_the_training_threads_error(model_folder, tmp_path):
    (tmp_path / "file").write_text("")
    (message,) = run_ranks(1, write_into_a_file, model_folder, str(tmp_path / "file"))
    assert "checkpoint of step 7 cannot be written to run.storage (NotADirectoryError" in message


def keep_best_twice(mesh, folder, root):
    model, optimizer = training(mesh, folder)
    group = dist.new_group(backend="gloo")
    files = pyarrow.fs.LocalFileSystem()
    writer = CheckpointWriter(
        print, report_best=lambda directory, number: publish_best(directory, number, files, root, group)
    )
    for number in (1, 2, 2):  # the last as after a restart
        writer.save(model, optimizer, {"step": number}, is_due=False, is_best=True)
        if number == 1:
            step(model, optimizer, 1)
    writer.wait()
    return snapshot(model, optimizer)


def test_of_the_best_models_the_last_one_is_kept_and_exported(model_folder, tmp_path):
    root = tmp_path / "run"
    root.mkdir()
    checkpoints = Checkpoints(str(tmp_path), "run")
    with pytest.raises(CheckpointError, match=r"no best model was kept; set checkpoint\.keep_best"):
        checkpoints.local_copy("best").__enter__()
    wanted, _ = run_ranks(2, keep_best_twice, model_folder, str(root))
    assert [path.name for path in root.iterdir()] == ["best_00000002_1"]
    with checkpoints.local_copy("best") as directory:
        assert read_state(directory)["step"] == 2
        out = export_model(directory, TargetConfig(model=model_folder), tmp_path / "out")
    for name, parameter in AutoModelForCausalLM.from_pretrained(out).named_parameters():
        assert torch.equal(parameter, torch.tensor(wanted[name]))
    assert checkpoints.steps() == [], "a run does not resume from it"
    for file in Path(root / "best_00000002_1").glob("*.safetensors"):
        file.unlink()
        break
    with pytest.raises(CheckpointError, match="no best model"):
        checkpoints.local_copy("best").__enter__()


def fail_to_keep_the_best_again(mesh, folder, root):
    """The same step after a restart, its last file missing; then whole. What is there after each, complete or not."""
    model, optimizer = training(mesh, folder)
    group = dist.new_group(backend="gloo")
    files = pyarrow.fs.LocalFileSystem()
    there = []

    def publish(directory, number):
        publish_best(directory, number, files, root, group)
        there.append(sorted(path.name for path in Path(root).iterdir()))

    def fail(directory, number):
        (directory / STATE_FILE).unlink()
        with pytest.raises(FileNotFoundError):
            publish(directory, number)
        with Checkpoints(str(Path(root).parent), Path(root).name).local_copy("best") as best:
            there.append((best.name, read_state(best)["step"]))

    for report in (publish, fail, publish):
        writer = CheckpointWriter(print, report_best=report)
        writer.save(model, optimizer, {"step": 2}, is_due=False, is_best=True)
        writer.wait()
    return there


def test_a_best_model_is_there_until_another_one_of_the_same_step_is_complete(model_folder, tmp_path):
    ((first, best, last),) = run_ranks(1, fail_to_keep_the_best_again, model_folder, str(tmp_path / "run"))
    assert first == ["best_00000002"]
    assert best == ("best_00000002", 2)
    assert last == ["best_00000002_2"]
