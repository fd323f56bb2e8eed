"""Only a checkpoint all of whose files have arrived counts, whatever order they arrive in."""

import json

import pytest
from ray.train import CheckpointConfig
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext

from fusellm_ray.errors import CheckpointError
from fusellm_ray.folders import below, last_name
from fusellm_ray.target.checkpoint import FORMAT, STATE_FILE
from fusellm_ray.target.snapshot import SNAPSHOT_FILE, restore_snapshot
from fusellm_ray.target.storage import Checkpoints, step_folder

FILES = {"shard-00001-of-00002.safetensors": b"one", "shard-00002-of-00002.safetensors": b"three"}


def write(root, step, files=FILES):
    """A finished checkpoint, in everything but the tensors."""
    folder = root / "run" / step_folder(step)
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / STATE_FILE).write_text(state_text(step, files))
    return folder


def state_text(step, files=FILES):
    sizes = {name: len(content) for name, content in files.items()}
    return json.dumps({"format": FORMAT, "step": step, "files": sizes})


@pytest.mark.parametrize(
    ("folder", "inside", "name"),
    [
        ("/runs/", "/runs/a", "runs"),
        ("what?/runs", "what?/runs/a", "runs"),
        ("gs://bucket/runs", "gs://bucket/runs/a", "runs"),
        ("s3://bucket/runs/?scheme=http&a=http://h:1", "s3://bucket/runs/a?scheme=http&a=http://h:1", "runs"),
    ],
)
def test_the_query_of_a_uri_stays_behind_the_path(folder, inside, name):
    assert below(folder, "a") == inside
    assert last_name(folder) == name
    assert last_name(inside) == "a"


def steps_and_latest(root):
    checkpoints = Checkpoints(str(root), "run")
    state = checkpoints.latest_state()
    return checkpoints.steps(), state and state["step"]


def test_a_run_that_saved_nothing_has_no_checkpoint(tmp_path):
    assert steps_and_latest(tmp_path) == ([], None)
    with (
        pytest.raises(CheckpointError, match="no checkpoint"),
        Checkpoints(str(tmp_path), "run").local_copy(),
    ):
        pass


def test_complete_checkpoints_are_listed_by_step(tmp_path):
    for step in (300, 100_000_000, 20):
        write(tmp_path, step)
    (tmp_path / "run" / "old_step_00000007").mkdir()
    (tmp_path / "run" / "checkpoint_manager_snapshot.json").write_text("{}")
    assert steps_and_latest(tmp_path) == ([20, 300, 100_000_000], 100_000_000)
    with Checkpoints(f"file://{tmp_path}", "run").local_copy() as folder:
        assert folder == tmp_path / "run" / "step_100000000"


def test_a_run_of_another_version_is_refused_rather_than_begun_again(tmp_path):
    folder = write(tmp_path, 3)
    (folder / STATE_FILE).write_text(state_text(3).replace(f'"format": {FORMAT}', '"format": 2'))
    with pytest.raises(CheckpointError, match=f"step_00000003/{STATE_FILE}: format 2, this version reads"):
        steps_and_latest(tmp_path)


@pytest.mark.parametrize("first", [[STATE_FILE], [*FILES], [STATE_FILE, next(iter(FILES))]])
def test_a_checkpoint_counts_once_its_last_file_has_arrived(first, tmp_path):
    write(tmp_path, 1)
    folder = write(tmp_path, 2)
    waiting = {path: path.read_bytes() for path in folder.iterdir() if path.name not in first}
    for path in waiting:
        path.unlink()
    for path, content in waiting.items():
        for arrived in (content[: len(content) // 2], content):
            assert steps_and_latest(tmp_path) == ([1], 1)
            path.write_bytes(arrived)
    assert steps_and_latest(tmp_path) == ([1, 2], 2)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"files": 3}', b"\xff"])
def test_a_checkpoint_with_a_damaged_state_file_does_not_count(text, tmp_path):
    write(tmp_path, 1)
    path = write(tmp_path, 2) / STATE_FILE
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert steps_and_latest(tmp_path) == ([1], 1)


def test_files_that_the_state_does_not_name_change_nothing(tmp_path):
    folder = write(tmp_path, 1)
    (folder / "shard-00003-of-00003.safetensors").write_bytes(b"left by more ranks")
    assert steps_and_latest(tmp_path) == ([1], 1)


def test_an_incomplete_checkpoint_is_not_handed_out(tmp_path):
    write(tmp_path, 1)
    folder = write(tmp_path, 2)
    (folder / next(iter(FILES))).unlink()
    checkpoints = Checkpoints(str(tmp_path), "run")
    with checkpoints.local_copy() as latest:
        assert latest.name == step_folder(1)
    with (
        pytest.raises(CheckpointError, match=r"no step 2; complete checkpoints: \[1\]"),
        checkpoints.local_copy(2),
    ):
        pass


def resumed_from(root):
    """What Ray Train would give to the ranks, and keep."""
    lost = restore_snapshot(Checkpoints(str(root), "run"))
    manager = CheckpointManager(CheckpointConfig(), StorageContext(str(root), "run"))
    kept = [result.checkpoint.path.rpartition("/")[2] for result in manager.best_checkpoint_results]
    latest = manager.latest_checkpoint_result
    return kept, latest and latest.checkpoint.path.rpartition("/")[2], lost


def test_ray_resumes_from_the_latest_complete_checkpoint_whatever_it_remembers(tmp_path):
    snapshot = tmp_path / "run" / SNAPSHOT_FILE
    (tmp_path / "run").mkdir()
    assert resumed_from(tmp_path) == ([], None, [])
    assert not snapshot.exists()
    older, newer = write(tmp_path, 10), write(tmp_path, 20)
    assert resumed_from(tmp_path) == ([older.name, newer.name], newer.name, [])
    text = snapshot.read_text()
    snapshot.write_text(text[: len(text) // 2])  # the controller was killed as it wrote
    assert resumed_from(tmp_path) == ([older.name, newer.name], newer.name, [])
    next(newer.glob("shard-00002*")).unlink()
    assert resumed_from(tmp_path) == ([older.name], older.name, [newer.name])
    for file in older.iterdir():
        file.unlink()
    older.rmdir()
    assert resumed_from(tmp_path) == ([], None, [older.name])


def test_a_list_that_is_true_is_left_alone(tmp_path):
    write(tmp_path, 10)
    resumed_from(tmp_path)
    snapshot = tmp_path / "run" / SNAPSHOT_FILE
    told = json.loads(snapshot.read_text()) | {"current_report_index": 7}
    snapshot.write_text(json.dumps(told))
    resumed_from(tmp_path)
    assert json.loads(snapshot.read_text()) == told
