"""Whole runs whose teachers are killed, hang or answer wrongly: what is trained stays the same, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
import yaml
from safetensors.torch import load_file

from fusellm_ray.config_file import parse_config
from fusellm_ray.errors import TeacherLostError
from fusellm_ray.job import run_job
from fusellm_ray.teachers.service import start_pools, stop_pools, wait_ready
from tests.faults import FaultyPool, Injector, kill, own_processes, replica_pids, same_bits, weights
from tests.runs import build_run, named, of_event

STEPS = 18
PACE = {"type": "simulated", "tokens_per_s": 1500}
"""A step asks for 256 tokens, so it takes at least a sixth of a second, and faults come while requests are out."""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, tokenizer_folders: dict[str, Path]) -> dict[str, Any]:
    tree = build_run(
        tmp_path_factory.mktemp("run"),
        tokenizer_folders,
        training={"steps": STEPS},
        stream={"deadline_s": 300, "in_flight_tokens": 256},
    )
    left, right = tree["teachers"]
    # Nothing is kept, so that every run asks for everything.
    tree["teachers"] = [
        left | {"replicas": {"min": 2, "max": 2}, "cache_bytes": 0},
        right | {"engine": PACE, "cache_bytes": 0},
    ]
    return tree


@pytest.fixture(scope="module")
def pools(tree: dict[str, Any], ray_session: None) -> Iterator[dict[str, Any]]:
    pools = start_pools(parse_config(tree))
    wait_ready(pools, 300)
    yield pools
    stop_pools(pools)


@pytest.fixture(scope="module")
def undisturbed(
    tree: dict[str, Any], pools: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses by step, and final weights."""
    config, seen = named(tree, "undisturbed"), Injector({})
    assert run_job(config, display=seen, pools=pools).is_finished
    return seen.losses, weights(config, tmp_path_factory.mktemp("undisturbed") / "export")


def test_killed_replicas_a_killed_supervisor_and_wrong_answers_change_no_bit(
    tree: dict[str, Any],
    pools: dict[str, Any],
    undisturbed: tuple[list[float], dict[str, torch.Tensor]],
    tmp_path: Path,
) -> None:
    faulty: Any = ray.remote(FaultyPool).options(num_cpus=0).remote(pools["right"])
    seen = Injector(
        {
            2: lambda: kill(replica_pids("left", pools["left"])[0]),
            6: lambda: [kill(pid) for pid in own_processes("ray::PoolSupervisor")],  # replicas go with them
        }
    )
    config = named(tree, "disturbed")
    assert run_job(config, display=seen, pools={"left": pools["left"], "right": faulty}).is_finished
    counted = ray.get(faulty.counted.remote())
    assert counted["nan"] >= 5
    assert counted["error"] >= 5
    assert seen.faults == {}
    losses, wanted = undisturbed
    assert seen.losses == losses  # every step once, on the same text and the same distributions
    assert same_bits(weights(config, tmp_path / "export"), wanted)


def test_late_answers_and_those_that_come_twice_change_no_bit(
    tree: dict[str, Any],
    pools: dict[str, Any],
    undisturbed: tuple[list[float], dict[str, torch.Tensor]],
    tmp_path: Path,
) -> None:
    faulty: Any = ray.remote(FaultyPool).options(num_cpus=0).remote(pools["left"], is_late=True)
    ray.get(faulty.table.remote("left"))
    ray.get(faulty.counted.remote())  # its actors are up: their start makes no answer slow
    came: list[dict[str, int]] = []
    seen = Injector({STEPS - 1: lambda: came.append(ray.get(faulty.counted.remote()))})
    config = named(tree, "late")
    assert run_job(config, display=seen, pools={"left": faulty, "right": pools["right"]}).is_finished
    assert came[0]["late"] >= 1  # while the run went on
    losses, wanted = undisturbed
    assert seen.losses == losses
    assert same_bits(weights(config, tmp_path / "export"), wanted)


def test_a_teacher_that_hangs_and_one_that_restarts_with_another_tokenizer_change_no_bit(
    tree: dict[str, Any],
    undisturbed: tuple[list[float], dict[str, torch.Tensor]],
    tokenizer_folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    left, right = tree["teachers"]
    folder = shutil.copytree(left["model"], tmp_path / "left")
    # A replica that has answered nothing for half the deadline is restarted.
    teachers = [left | {"model": str(folder)}, right]
    config = named(tree | {"teachers": teachers}, "hanging", stream={"deadline_s": 80})
    pools = start_pools(config)
    try:
        wait_ready(pools, 300)
        changed = replica_pids("left", pools["left"])[0]
        (hanging,) = replica_pids("right", pools["right"])

        def restart_with_another_tokenizer() -> None:
            shutil.copytree(tokenizer_folders["llama"], folder, dirs_exist_ok=True)
            kill(changed)

        seen = Injector({2: restart_with_another_tokenizer, 6: lambda: os.kill(hanging, signal.SIGSTOP)})
        assert run_job(config, display=seen, pools=pools).is_finished
        problems = ray.get(pools["left"].status.remote("left")).problems
    finally:
        stop_pools(pools)
    assert len(problems) == 1
    assert "tokenizer: it runs with" in problems[0]
    assert not psutil.pid_exists(hanging)
    losses, wanted = undisturbed
    assert seen.losses == losses
    assert same_bits(weights(config, tmp_path / "export"), wanted)


class Thawing(Injector):
    """Lets frozen processes go on once their teacher is missed, and stops the run once it is back."""

    def __init__(self, frozen: list[int]) -> None:
        super().__init__({2: lambda: self.signal_all(signal.SIGSTOP)})
        self._frozen = frozen
        self._was_missed = False

    def signal_all(self, number: int) -> None:
        for pid in self._frozen:
            os.kill(pid, number)

    def show(self, record: dict[str, Any]) -> None:
        super().show(record)
        if record["event"] != "step":
            return
        is_missed = "teacher/left/dropped_tokens" in record
        if is_missed and not self._was_missed:
            self.signal_all(signal.SIGCONT)
        if self._was_missed and not is_missed:
            self._was_missed = False
            signal.raise_signal(signal.SIGTERM)
        self._was_missed = is_missed


def test_a_run_goes_on_without_a_lost_teacher_and_takes_it_back(
    tree: dict[str, Any], pools: dict[str, Any], undisturbed: tuple[list[float], dict[str, torch.Tensor]]
) -> None:
    wait_ready(pools, 300)
    seen = Thawing(replica_pids("left", pools["left"]))
    lossy = {"on_teacher_loss": "drop", "loss_deadline_s": 2}
    # What pools do about a hanging replica waits for half of deadline_s, 150 s here.
    config = named(tree, "dropping", stream=lossy, training={"steps": 5000})
    try:
        assert not run_job(config, display=seen, pools=pools).is_finished
    finally:
        seen.signal_all(signal.SIGCONT)
    steps = of_event(seen.records, "step")
    assert steps[0]["loss"] == undisturbed[0][0]
    dropped = {
        r["step"]: r["teacher/left/dropped_tokens"] for r in steps if "teacher/left/dropped_tokens" in r
    }
    assert min(dropped) > 2
    tokens = {r["step"]: r["tokens"] for r in steps}
    assert all(0 < count <= tokens[step] for step, count in dropped.items())
    said = "\n".join(seen.notes)
    assert "teacher left is LOST" in said
    assert "teacher left is back" in said
    end = seen.records[-1]
    assert end["event"] == "end"
    assert end["dropped_tokens"] == {"left": sum(dropped.values())}
    assert end["spilled_bytes"] == 0


def test_under_fail_the_run_ends_with_the_cause(tree: dict[str, Any], pools: dict[str, Any]) -> None:
    wait_ready(pools, 300)
    (frozen,) = replica_pids("right", pools["right"])
    seen = Injector({2: lambda: os.kill(frozen, signal.SIGSTOP)})
    config = named(tree, "failing", stream={"on_teacher_loss": "fail", "loss_deadline_s": 3})
    try:
        with pytest.raises(TeacherLostError, match=r"teacher right: no answer .*stream\.loss_deadline_s"):
            run_job(config, display=seen, pools=pools)
    finally:
        os.kill(frozen, signal.SIGCONT)


def test_a_stop_while_ranks_wait_for_a_teacher_saves_the_last_step_at_once(
    tree: dict[str, Any], pools: dict[str, Any], undisturbed: tuple[list[float], dict[str, torch.Tensor]]
) -> None:
    wait_ready(pools, 300)
    (frozen,) = replica_pids("right", pools["right"])
    stop_after_s = 12.0  # ranks have used up by then what had been answered
    timer = threading.Timer(stop_after_s, os.kill, (os.getpid(), signal.SIGTERM))
    frozen_at = []

    def freeze() -> None:
        os.kill(frozen, signal.SIGSTOP)
        frozen_at.append(time.monotonic())
        timer.start()

    config = named(tree, "waiting", checkpoint={"every_steps": 1000})
    seen = Injector({2: freeze})
    try:
        outcome = run_job(config, display=seen, pools=pools)
        took_s = time.monotonic() - frozen_at[0] - stop_after_s
    finally:
        timer.cancel()
        os.kill(frozen, signal.SIGCONT)
    assert not outcome.is_finished
    assert outcome.step == len(seen.losses) < STEPS
    assert took_s < 60  # deadline_s is 300
    again = Injector({})
    assert run_job(config, display=again, pools=pools).is_finished
    assert seen.losses + again.losses == undisturbed[0]


@pytest.mark.slow
def test_a_removed_node_changes_no_bit(
    tree: dict[str, Any], undisturbed: tuple[list[float], dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """On a cluster of three nodes with token authentication, in a process of its own."""
    teachers = [
        t | {"resources": {"num_cpus": 0.1, "custom": {"teacher_slot": 1}}, "replicas": {"min": 1, "max": 1}}
        for t in tree["teachers"]
    ]
    changed = tree | {
        "teachers": teachers,
        "run": tree["run"] | {"name": "node-loss"},
        "trainer": tree["trainer"] | {"resources_per_worker": {"CPU": 0.2, "train_slot": 1}},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(changed))
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.node_loss", str(path), str(tmp_path / "export")],
        capture_output=True,
        text=True,
        env=environment | {"RAY_AUTH_MODE": "token"},
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["removed"] == 1
    assert told["processes_left"] == []
    losses, wanted = undisturbed
    assert told["losses"] == losses
    assert same_bits(load_file(tmp_path / "export" / "model.safetensors"), wanted)
