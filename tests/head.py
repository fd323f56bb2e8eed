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

import psutil


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
def running_head(num_cpus: int = 4) -> Iterator[Head]:
    """Start a head, wait for its dashboard, and end it with all its processes."""
    from fusellm_ray.job import LOCAL_RAY_ENVIRONMENT

    # Not pytest's folder: sockets lie below it, and their paths may have 107 bytes at most.
    folder = Path(tempfile.mkdtemp(prefix="ray_head_"))
    token = secrets.token_hex(32)
    token_file = folder / "token"
    token_file.touch(mode=0o600)
    token_file.write_text(token)
    gcs, dashboard, agent_http, agent_grpc, metrics, client = free_ports(6)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | LOCAL_RAY_ENVIRONMENT
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_TMPDIR": str(folder),
        "RAY_metrics_report_interval_ms": "1000",  # 10 s by default
        "RAY_raylet_start_wait_time_s": "240",  # for busy machines
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
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        "--block",
        "--disable-usage-stats",
    ]
    command += [f"--{name}={value}" for name, value in options.items()]
    log = folder / "start.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
    head = Head(
        address=f"127.0.0.1:{gcs}",
        dashboard=f"http://127.0.0.1:{dashboard}",
        folder=folder,
        environment=environment | {"RAY_ADDRESS": f"127.0.0.1:{gcs}"},
        token=token,
    )
    own = [psutil.Process(process.pid)]
    try:
        _wait_for_jobs_api(head, process, log)
        own += own[0].children(recursive=True)
        yield head
        assert process.poll() is None, f"the head has died\n{log.read_text()}"
    finally:
        process.terminate()
        _, left = psutil.wait_procs(own, timeout=10)
        for child in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.wait(timeout=10)
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody uses now, below those that the system gives to connections."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            found += [port] if port not in found else []
    return found


def _wait_for_jobs_api(head: Head, process: subprocess.Popen[bytes], log: Path) -> None:
    request = urllib.request.Request(
        f"{head.dashboard}/api/jobs/", headers={"Authorization": f"Bearer {head.token}"}
    )
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
            assert isinstance(json.load(answer), list)
            return
        time.sleep(0.3)
    raise AssertionError(f"the head's job service did not come up\n{log.read_text()}")
