"""Replicas on nodes that Ray's autoscaler brings and takes: `python -m tests.autoscaled MODEL`.

The autoscaler is real, its provider starts nodes as processes of this machine (fake_multinode).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import ray

from fusellm_ray.config import Config
from fusellm_ray.stream.memory import NO_DISK_ENVIRONMENT
from fusellm_ray.teachers.service import start_pools, stop_pools, wait_ready

HEAD = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
REPLICAS = 2
PATIENCE_S = 240.0
NODES = {
    "cluster_name": "fake",
    "max_workers": 4,
    "idle_timeout_minutes": 0.05,
    "upscaling_speed": 10.0,
    "provider": {"type": "fake_multinode", "head_node_id": HEAD, "launch_multiple": True},
    "auth": {"ssh_user": "nobody"},
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "teacher": {
            "resources": {"CPU": 1, "teacher_slot": 1},
            "node_config": {},
            "min_workers": 0,
            "max_workers": 4,
        },
    },
}


def num_teacher_nodes() -> int:
    return sum(node["Alive"] and "teacher_slot" in node["Resources"] for node in ray.nodes())


def run_config(model: str) -> Config:
    teacher = {
        "name": "scaled",
        "model": model,
        "engine": {"type": "simulated"},
        "replicas": {"min": REPLICAS, "max": REPLICAS},
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


def main(model: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="fr") as folder:
        nodes = Path(folder) / "nodes.json"
        nodes.write_text(json.dumps(NODES))
        command = [
            "start",
            "--head",
            "--block",
            f"--port={port}",
            "--num-cpus=0",
            "--include-dashboard=false",
        ]
        command += [
            "--object-store-memory=134217728",
            f"--autoscaling-config={nodes}",
            f"--temp-dir={folder}/ray",
        ]
        environment = os.environ | NO_DISK_ENVIRONMENT
        environment |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        environment |= {"RAY_enable_autoscaler_v2": "1"}
        environment |= {"RAY_CLOUD_INSTANCE_ID": HEAD, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD}
        head = subprocess.Popen(
            [sys.executable, "-c", "from ray.scripts.scripts import main; main()", *command],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            print(json.dumps({"nodes": scale(f"127.0.0.1:{port}", run_config(model))}))
        finally:
            processes = psutil.Process(head.pid).children(recursive=True)
            head.send_signal(signal.SIGTERM)
            _, left = psutil.wait_procs([psutil.Process(head.pid), *processes], timeout=15)
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def scale(address: str, config: Config) -> list[int]:
    """Nodes for teachers before there are any, while they are up, and after."""
    give_up = time.monotonic() + PATIENCE_S
    while True:
        try:
            ray.init(address=address, log_to_driver=False)
            break
        except Exception:  # the head is starting
            if time.monotonic() > give_up:
                raise
            time.sleep(1)
    seen = [num_teacher_nodes()]
    pools = start_pools(config)
    try:
        wait_ready(pools, PATIENCE_S)
        seen.append(num_teacher_nodes())
    finally:
        stop_pools(pools)
    give_up = time.monotonic() + PATIENCE_S
    while num_teacher_nodes() and time.monotonic() < give_up:
        time.sleep(0.5)
    seen.append(num_teacher_nodes())
    ray.shutdown()
    return seen


if __name__ == "__main__":
    main(sys.argv[1])
