"""Nodes come with replicas and ranks and go with them: Ray's autoscaler is real, its nodes are processes here."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from fusellm_ray.config import Config
from fusellm_ray.job import places_for_ranks
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
        "resources": {"num_cpus": 0, "custom": {"slot": 1}},
    }
    return Config.model_validate(
        {
            "run": {"name": "scaled"},
            "target": {"model": model},
            "teachers": [teacher],
            "corpus": {"sources": [{"name": "none", "path": "none"}]},
            "training": {"steps": 1},
            "trainer": {"resources_per_worker": {"slot": 1}},
        }
    )


def num_nodes() -> int:
    return sum(node["Alive"] and "slot" in node["Resources"] for node in ray.nodes())


def wait_for_nodes(count: int) -> int:
    """How many there are once there are so many, or the time is up."""
    give_up = time.monotonic() + PATIENCE_S
    while num_nodes() != count and time.monotonic() < give_up:
        time.sleep(0.5)
    return num_nodes()


def drive(model: str) -> None:
    """Print how many nodes there are before, while and after a teacher and a rank ask for one each."""
    ray.init(log_to_driver=False)
    config = config_of(model)
    seen = [num_nodes()]
    pools = start_pools(config)
    try:
        with places_for_ranks(config):
            wait_ready(pools, PATIENCE_S)
            seen.append(wait_for_nodes(2))
            DiskWatch(refuse=True)
    finally:
        stop_pools(pools)
    print(json.dumps([*seen, wait_for_nodes(0)]))


@pytest.mark.slow
def test_the_autoscaler_brings_nodes_for_replicas_and_ranks_and_takes_them_when_these_are_gone(
    tmp_path: Path,
) -> None:
    model = build("llama", tiny_model("llama", VOCAB_SIZE, tmp_path / "model"))
    with running_head(num_cpus=1, scaled_node={"slot": 1, "object_store_memory": 80 << 20}) as head:
        command = [sys.executable, "-m", "tests.test_autoscaling", str(model)]
        done = subprocess.run(command, capture_output=True, text=True, env=head.environment, timeout=500)
        log = (head.folder / "session_latest" / "logs" / "monitor.log").read_text()
    decisions = "\n".join(line for line in log.splitlines() if "WARNING util.py" not in line)  # one a second
    assert done.returncode == 0, f"{done.stderr[-4000:]}\n{decisions[-4000:]}"
    assert json.loads(done.stdout.splitlines()[-1]) == [0, 2, 0], decisions[-4000:]


if __name__ == "__main__":
    drive(sys.argv[1])
