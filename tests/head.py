"""A Ray head as an operator starts one: a process of its own, token authentication, dashboard, metrics port."""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

# What the provider of `_autoscaling` calls the head and its type.
_FAKE_HEAD = "f" * 51 + "00000"
_FAKE_HEAD_TYPE = "ray.head.default"
_AUTOSCALED = {
    "RAY_enable_autoscaler_v2": "1",
    "RAY_FAKE_CLUSTER": "1",
    "RAY_CLOUD_INSTANCE_ID": _FAKE_HEAD,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _FAKE_HEAD,
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
}


@dataclass(frozen=True)
class Head:
    """A running head."""

    address: str
    dashboard: str
    folder: Path
    """Ray's temporary folder."""
    environment: dict[str, str] = field(repr=False)
    """For a process that may use the cluster: RAY_ADDRESS and the token."""
    token: str = field(repr=False)

    def ray(
        self, *args: str, cwd: Path | None = None, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """The ray command, with the dashboard as its address."""
        command = [sys.executable, "-m", "ray.scripts.scripts", *args]
        environment = self.environment | {"RAY_ADDRESS": self.dashboard}
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=timeout
        )


@contextlib.contextmanager
def running_head(num_cpus: int = 4, scaled_node: dict[str, int] | None = None) -> Iterator[Head]:
    """Start a head, wait for its job service, and end it with all its processes.

    Args:
        scaled_node: resources of the nodes that Ray's autoscaler may bring, at most four, each in processes of its own.
    """
    # Not pytest's folder: sockets lie below it, and their paths may have 107 bytes at most.
    folder = Path(tempfile.mkdtemp(prefix="ray_head_"))
    processes: list[psutil.Process] = []
    try:
        # Ray gives its processes 30 s to come up, which a busy machine may not grant.
        for attempt in range(3):
            head, process = _start(folder / str(attempt), num_cpus, scaled_node)
            processes.append(psutil.Process(process.pid))
            if _is_up(head, process):
                break
        log = (head.folder / "start.log").read_text
        assert process.poll() is None, f"the head does not start\n{log()}"
        processes += processes[-1].children(recursive=True)
        yield head
        assert process.poll() is None, f"the head has died\n{log()}"
    finally:
        for parent in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                processes = list({*processes, *parent.children(recursive=True)})
                parent.terminate()
        _, left = psutil.wait_procs(processes, timeout=10)
        for straggler in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                straggler.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _start(
    folder: Path, num_cpus: int, scaled_node: dict[str, int] | None
) -> tuple[Head, subprocess.Popen[bytes]]:
    from fusellm_ray.stream.memory import NO_DISK_ENVIRONMENT

    folder.mkdir()
    token = secrets.token_hex(32)
    token_file = folder / "token"
    token_file.touch(mode=0o600)
    token_file.write_text(token)
    gcs, dashboard, agent_http, agent_grpc, metrics, client = free_ports(6)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | NO_DISK_ENVIRONMENT
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_TMPDIR": str(folder),
        "RAY_metrics_report_interval_ms": "1000",  # 10 s by default
    }
    options = {
        "port": gcs,
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": agent_http,
        "dashboard-agent-grpc-port": agent_grpc,
        "ray-client-server-port": client,
        "metrics-export-port": metrics,
        "min-worker-port": 0,  # any free one
        "max-worker-port": 0,
        "num-cpus": num_cpus,
        "object-store-memory": 256 << 20,
        "temp-dir": folder,
    }
    if scaled_node:
        environment |= _AUTOSCALED
        options["autoscaling-config"] = folder / "nodes.json"
        (folder / "nodes.json").write_text(
            json.dumps(_autoscaling(f"127.0.0.1:{gcs}", num_cpus, scaled_node))
        )
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += ["--disable-usage-stats", *(f"--{name}={value}" for name, value in options.items())]
    with (folder / "start.log").open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
    head = Head(
        address=f"127.0.0.1:{gcs}",
        dashboard=f"http://127.0.0.1:{dashboard}",
        folder=folder,
        environment=environment | {"RAY_ADDRESS": f"127.0.0.1:{gcs}"},
        token=token,
    )
    return head, process


def _autoscaling(address: str, num_cpus: int, node: dict[str, int]) -> dict[str, Any]:
    most = 4
    return {
        "cluster_name": "processes",
        "provider": {
            # Of Ray's own tests; by its name, fake_multinode, it would ask for a file that wheels lack.
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": address,
            "launch_multiple": True,
            "disable_node_updaters": True,  # which would install Ray over SSH
        },
        "max_workers": most,
        "idle_timeout_minutes": 0.1,
        "head_node_type": _FAKE_HEAD_TYPE,
        "available_node_types": {
            _FAKE_HEAD_TYPE: {"resources": {"CPU": num_cpus}, "node_config": {}, "max_workers": 0},
            "node": {"resources": node, "node_config": {}, "max_workers": most},
        },
        # Required, though nothing is set up:
        "cluster_synced_files": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
    }


def _is_up(head: Head, process: subprocess.Popen[bytes]) -> bool:
    """Wait until the head takes a job, or has ended."""
    request = urllib.request.Request(
        f"{head.dashboard}/api/jobs/",
        data=json.dumps({"entrypoint": "true"}).encode(),
        headers={"Authorization": f"Bearer {head.token}", "Content-Type": "application/json"},
    )
    deadline = time.monotonic() + 180
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status == 200
        time.sleep(0.3)
    return False


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody uses now, below those that the system gives to connections."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            found += [port] if port not in found else []
    return found
