"""A run's record, and what `fusellm-ray status` makes of it."""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from fusellm_ray.errors import ConfigError
from fusellm_ray.observe.records import History, RecordLog, read_records
from fusellm_ray.observe.status import duration, render, state_of
from fusellm_ray.teachers.attach import print_statuses
from fusellm_ray.teachers.report import PoolStatus
from fusellm_ray.teachers.service import PoolWatch


def step(number: int, **figures: Any) -> dict[str, Any]:
    return {
        "time": 100.0 + number,
        "event": "step",
        "step": number,
        "steps": 10,
        "loss": 1.0,
        "time/step_s": 1.0,
    } | figures


def start(number: int = 0) -> dict[str, Any]:
    return {"time": 100.0, "event": "start", "step": number, "ranks": 2}


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_a_log_opened_again_goes_on_and_reads_back_in_a_folder_and_under_a_uri(tmp_path: Path, prefix: str):
    folder = f"{prefix}{tmp_path}/run"
    if prefix:  # an object store has no folders to make
        (tmp_path / "run").mkdir()
    for number in (1, 2):
        with RecordLog(folder) as log:
            log.write(step(number))
    assert [r["step"] for r in read_records(folder)] == [1, 2]
    assert all(r["time"] > 0 for r in read_records(folder))


def test_a_run_has_one_driver(tmp_path: Path):
    with RecordLog(str(tmp_path)) as log:
        log.write(step(1))
        with (
            pytest.raises(ConfigError, match="another process is training this run"),
            RecordLog(str(tmp_path)),
        ):
            pass
        log.write(step(2))
    with RecordLog(str(tmp_path)) as log:
        log.write(step(3))
    assert [r["step"] for r in read_records(str(tmp_path))] == [1, 2, 3]


def test_a_store_out_of_reach_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def unreachable(uri: str) -> None:
        raise OSError("no answer")

    with RecordLog(f"file://{tmp_path}") as log:
        monkeypatch.setattr("pyarrow.fs.FileSystem", SimpleNamespace(from_uri=unreachable))
        log.write(step(1))


def test_a_line_that_is_being_written_is_not_read_yet(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(step(1)) + "\n" + json.dumps(step(2))[:20])
    assert [r["step"] for r in read_records(str(tmp_path))] == [1]


@pytest.mark.parametrize("text", ["{\n", "3\n", '{"a": 1}\n'])
def test_a_file_without_any_record_is_refused_with_its_first_line(tmp_path: Path, text: str):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ConfigError, match="line 1"):
        read_records(str(tmp_path))


@pytest.mark.parametrize(
    "torn", [json.dumps(step(2))[:20].encode(), b"\x00\xff", json.dumps(step(2)).encode()]
)
def test_a_line_cut_off_costs_that_record_only_and_is_counted(tmp_path: Path, torn: bytes):
    (tmp_path / "metrics.jsonl").write_bytes(json.dumps(step(1)).encode() + b"\n" + torn)
    with RecordLog(str(tmp_path)) as log:
        log.write(step(3))
        log.write(step(4))
    history = History.of(read_records(str(tmp_path)))
    is_whole = torn.endswith(b"}")  # only its end of line was missing
    assert [r["step"] for r in history.steps] == ([1, 2, 3, 4] if is_whole else [1, 3, 4])
    assert history.num_unreadable == (0 if is_whole else 1)
    console = Console(width=120)
    with console.capture() as capture:
        console.print(render("my-run", history, 105.0))
    assert ("lines of the record that cannot be read: 1" in capture.get()) is not is_whole


def test_a_disk_without_room_costs_records_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "metrics.jsonl"
    with RecordLog(str(tmp_path)) as log:
        log.write(step(1))
        with a_file_may_hold(path.stat().st_size + 20):
            log.write(step(2))
            log.write(step(3))
        log.write(step(4))
    assert [r.get("step") for r in read_records(str(tmp_path))] == [1, None, 4]
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert "goes on without being recorded" in told[0]
    assert "2 records are missing" in told[1]


@contextlib.contextmanager
def a_file_may_hold(size: int) -> Iterator[None]:
    """Lets this process's files grow to so many bytes, as a full disk would."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_folder_without_a_record_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no metrics\.jsonl"):
        read_records(str(tmp_path))


def test_a_resume_takes_back_the_steps_after_its_checkpoint():
    history = History.of([start(), step(1), step(2), step(3), start(1), step(2, loss=5.0)])
    assert [(r["step"], r["loss"]) for r in history.steps] == [(1, 1.0), (2, 5.0)]


def test_the_configuration_is_that_of_the_latest_start():
    runs = [{"time": 1.0, "event": "run", "config": {"n": n}} for n in (1, 2)]
    assert History.of([runs[0], start(), step(1), runs[1]]).config == {"n": 2}


@pytest.mark.parametrize(
    ("records", "now", "word", "text"),
    [
        ([start()], 101.0, "starting", "no step yet"),
        ([start(), step(1), step(4)], 105.0, "training", "step 4 of 10 (40.0%), 1 s a step, about 6 s left"),
        ([start(), step(1)], 1000.0, "stale", "no record for 14 min 59 s"),
        ([step(10), {"time": 120.0, "event": "end", "step": 10, "reason": "finished"}], 1e6, "finished", "step 10"),
        ([step(5), {"time": 120.0, "event": "end", "step": 5, "reason": "SIGTERM"}], 1e6, "stopped", "SIGTERM"),
        (
            [{"time": 120.0, "event": "end", "step": 5, "reason": "SIGTERM"}, {"event": "teachers", "pools": {}}],
            1e6,
            "stopped",
            "SIGTERM",
        ),
        ([step(5), {"time": 120.0, "event": "end", "step": 5, "reason": "stopped early"}], 1e6, "finished", "early"),
        ([step(5), {"time": 120.0, "event": "failed", "error": "out of memory"}], 1e6, "failed", "out of memory"),
        ([{"time": 9.0, "event": "end", "step": 5, "reason": "SIGTERM"}, start(5), step(6)], 107.0, "training", "6 of"),
    ],
)  # fmt: skip
def test_a_run_is_in_the_state_that_its_latest_records_say(
    records: list[dict[str, Any]], now: float, word: str, text: str
):
    state = state_of(History.of(records), now)
    assert state.word == word
    assert text in state.text


def test_long_steps_are_not_taken_for_silence():
    slow = {"time/step_s": 60.0}
    assert state_of(History.of([start(), step(1, **slow)]), 700.0).word == "training"


def pools(time: float, **ready: int) -> dict[str, Any]:
    states = {
        name: {"ready": count, "wanted": 1, "queued_tokens": 0, "restarts": 0, "problems": []}
        for name, count in ready.items()
    }
    return {"time": time, "event": "teachers", "pools": states}


@pytest.mark.parametrize(
    ("ready", "text"),
    [
        ({"left": 1, "right": 0}, "waiting: ranks got no further for 8 min 19 s; teacher right (0 of 1 replicas"),
        ({"left": 1, "right": 1}, "waiting: ranks got no further for 8 min 19 s; its teachers are ready"),
    ],
)  # fmt: skip
def test_a_run_without_progress_whose_driver_lives_waits_for_a_teacher(ready: dict[str, int], text: str):
    state = state_of(History.of([start(), step(1), pools(595.0, **ready)]), 600.0)
    assert state.word == "waiting"
    assert state.text.startswith(text)
    assert "left" not in state.text.replace("teacher left", "")  # no ETA
    assert state_of(History.of([start(), step(1), pools(125.0, **ready)]), 130.0).word == "training"
    after_evaluation = {"time": 590.0, "event": "evaluation", "step": 1}
    assert state_of(History.of([start(), step(1), after_evaluation]), 600.0).word == "training"


def test_teachers_are_shown_with_their_pool_and_the_means_of_their_figures():
    figures = [{"teacher/left/win_share": share, "teacher/left/coverage": 1.0} for share in (0.25, 0.75)]
    pool = {"ready": 1, "wanted": 2, "queued_tokens": 1234, "restarts": 3, "problems": ["replica 1: no GPU"]}
    records = [start(), step(1, **figures[0]), step(2, **figures[1])]
    records.append({"time": 103.0, "event": "teachers", "pools": {"left": pool}})
    console = Console(width=120)
    with console.capture() as capture:
        console.print(render("my-run", History.of(records), 104.0))
    text = capture.get()
    for shown in (
        "my-run",
        "1/2",
        "1,234",
        "0.500",
        "1.000",
        "teacher left: replica 1: no GPU",
        "last record 1 s ago, last step 2 s ago",
    ):
        assert shown in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.4, "59 s"), (200, "3 min 20 s"), (18720, "5 h 12 min"), (183600, "2 d 3 h")],
)
def test_durations_have_the_two_units_that_matter(seconds: float, text: str):
    assert duration(seconds) == text


def test_a_pool_that_died_is_reported_and_the_others_are_still_asked(ray_session: None):
    import ray

    @ray.remote
    class Pool:
        """As much of a pool as is asked."""

        def status(self, teacher: str) -> PoolStatus:
            return PoolStatus(
                name="a",
                wanted=2,
                most=2,
                ready=1,
                tokens_per_s=0.0,
                cache_hit_share=0.0,
                settings={},
                asks={},
                labels={},
                hang_s=300.0,
                problems=("replica 1: no GPU",),
                description=None,
                queued_tokens=7,
                restarts=3,
            )

    pools = {"alive": Pool.remote(), "dead": Pool.remote()}
    ray.get([pool.status.remote(name) for name, pool in pools.items()])
    ray.kill(pools["dead"])
    with contextlib.suppress(ray.exceptions.RayActorError):
        while True:  # the kill takes its time
            ray.get(pools["dead"].status.remote("dead"))
    watch = PoolWatch(pools, every_s=30)
    deadline = time.monotonic() + 60
    while not (states := watch.poll()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert states is not None
    assert states["alive"] == {
        "ready": 1,
        "wanted": 2,
        "queued_tokens": 7,
        "restarts": 3,
        "problems": ["replica 1: no GPU"],
    }
    assert states["dead"]["ready"] == 0
    assert "ActorDiedError" in states["dead"]["problems"][0]
    assert watch.poll() is None
    for pool in pools.values():
        ray.kill(pool)


def test_the_table_of_teachers_shows_brackets_as_they_are(capsys: pytest.CaptureFixture[str]):
    print_statuses({"left": "[/x]"})
    assert "[/x]" in capsys.readouterr().out
