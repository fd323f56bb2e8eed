"""Nodes come with a teacher's replicas and go with them: Ray's autoscaler is real, its nodes are processes here."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from fusellm_ray.config import Config
from fusellm_ray.stream.memory import DiskWatch
from fusellm_ray.teachers.service import start_pools, stop_pools, wait_ready
from tests.head import running_head
from tests.models import tiny_model
from tests.tokenizers import VOCAB_SIZE, build

PATIENCE_S = 200.0


def config_of(model: str) -> Config:
    teacher = {
        "name": "scaled",
        "model": model,
        "engine": {"type": "simulated"},
        "replicas": {"min": 2, "max": 2},
        "resources": {"num_cpus": 0, "custom": {"teacher_slot": 1}},
    }
    return Config.model_validate(
        {
            "run": {"name": "scaled"},
            "target": {"model": model},
            "teachers": [teacher],
            "corpus": {"sources": [{"name": "none", "path": "none"}]},
            "training": {"steps": 1},
        }
    )


def num_teacher_nodes() -> int:
    return sum(node["Alive"] and "teacher_slot" in node["Resources"] for node in ray.nodes())


def drive(model: str) -> None:
    """Print how many nodes there are for teachers before, while and after there are any."""
    ray.init(log_to_driver=False)
    seen = [num_teacher_nodes()]
    pools = start_pools(config_of(model))
    try:
        wait_ready(pools, PATIENCE_S)
        seen.append(num_teacher_nodes())
        DiskWatch(refuse=True)
    finally:
        stop_pools(pools)
    give_up = time.monotonic() + PATIENCE_S
    while num_teacher_nodes() and time.monotonic() < give_up:
        time.sleep(0.5)
    print(json.dumps([*seen, num_teacher_nodes()]))


@pytest.mark.slow
def test_the_autoscaler_brings_nodes_for_replicas_and_takes_them_when_these_are_gone(tmp_path: Path) -> None:
    model = build("llama", tiny_model("llama", VOCAB_SIZE, tmp_path / "model"))
    with running_head(num_cpus=1, scaled_node={"teacher_slot": 1, "object_store_memory": 80 << 20}) as head:
        command = [sys.executable, "-m", "tests.test_autoscaling", str(model)]
        done = subprocess.run(command, capture_output=True, text=True, env=head.environment, timeout=500)
        log = (head.folder / "session_latest" / "logs" / "monitor.log").read_text()
    decisions = "\n".join(line for line in log.splitlines() if "WARNING util.py" not in line)  # one a second
    assert done.returncode == 0, f"{done.stderr[-4000:]}\n{decisions[-4000:]}"
    assert json.loads(done.stdout.splitlines()[-1]) == [0, 2, 0], decisions[-4000:]


if __name__ == "__main__":
    drive(sys.argv[1])
