"""Nothing of the stream goes to disk: is that so on every node, and has it stayed so?

Ray moves objects to disk when its store is full, in two ways: it spills them, and it lays new ones in files
(the fallback). Both are settings of each node's raylet: from the environment of its process where that names them,
else from the cluster's `_system_config`. And the store itself lies on disk where /dev/shm is too small for it. What
a raylet was started with is read on its node: a job may give its workers another environment.

    driver      DiskWatch.poll() every half second, count() at the end
    disk watch  a thread for each look: a task on every node that is new, then a question to every raylet
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import psutil
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated import node_manager_pb2, node_manager_pb2_grpc
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fusellm_ray.errors import ClusterError

logger = logging.getLogger(__name__)
_messages: Any = node_manager_pb2  # its members are made when it is imported

NO_DISK_ENVIRONMENT = {
    "RAY_automatic_object_spilling_enabled": "0",
    "RAY_local_fs_capacity_threshold": "0.0",
}
"""Of a raylet that never writes objects to disk: a full store is an error instead."""

LOOK_S = 10.0
"""Between two looks: a node that leaves takes its count along, one that comes may not be set right."""
PATIENCE_S = 60.0
"""Given to all nodes to say how they are set; a worker process may have to start on each."""
_RPC_S = 5.0
_IN_MEMORY = ("tmpfs", "devtmpfs", "ramfs", "hugetlbfs")


@dataclass(frozen=True, slots=True)
class Raylet:
    """What a node's raylet was started with."""

    environment: Mapping[str, str]
    """Those of its variables that NO_DISK_ENVIRONMENT names."""
    is_own: bool = True
    """False: its environment cannot be read, and this is that of the process that tried."""
    store: str | None = None
    """The directory of its object store."""
    filesystem: str | None = None
    """The type of the store's file system, on Linux."""

    @property
    def is_on_disk(self) -> bool:
        return self.filesystem is not None and self.filesystem not in _IN_MEMORY


def ways_to_disk(system_config: Mapping[str, Any], raylet: Raylet) -> list[str]:
    """How a raylet that is set like this writes objects to disk, or would."""

    def setting(name: str, default: str) -> str:
        return str(raylet.environment.get(f"RAY_{name}", system_config.get(name, default))).lower()

    ways = []
    if setting("automatic_object_spilling_enabled", "true") not in ("0", "false"):
        ways.append("object spilling is on (automatic_object_spilling_enabled)")
    threshold = setting("local_fs_capacity_threshold", "0.95")
    if float(threshold) > 0:
        ways.append(f"overflow goes to files (local_fs_capacity_threshold={threshold})")
    if raylet.is_on_disk:
        ways.append(f"the object store is on disk ({raylet.store} is {raylet.filesystem})")
    return ways


def refuse_disk(
    nodes: Mapping[str, Mapping[str, Any]], patience_s: float, closed: threading.Event
) -> set[str]:
    """Refuse nodes that would write to disk; returns the ids of those that did not answer.

    Args:
        nodes: as `ray.nodes` gives them, by id.
        closed: once set, no more answers are waited for.

    Raises:
        ClusterError: naming the nodes, and what to set.
    """
    raylets = {node_id: read_raylet(own) for node_id, own in _own_raylets().items() if node_id in nodes}
    for node_id, raylet in raylets.items():
        if raylet.is_on_disk:  # a container's /dev/shm is often small: no reason not to try things out
            logger.warning(
                "this machine's /dev/shm is too small for the object store, which lies on disk (%s); give a container "
                "a larger one (docker: --shm-size)",
                raylet.store,
            )
            raylets[node_id] = replace(raylet, filesystem=None)
    raylets |= _ask_workers([node_id for node_id in nodes if node_id not in raylets], patience_s, closed)
    if closed.is_set():
        return set(nodes)
    configs = _ask_raylets(nodes, "GetSystemConfig", _messages.GetSystemConfigRequest(), patience_s)
    found: list[str] = []
    for node_id in raylets.keys() & configs.keys():
        raylet, where = raylets[node_id], _name(nodes[node_id])
        if not raylet.is_own:
            logger.warning(
                "%s: its raylet's environment cannot be read; another process's is taken for it", where
            )
        ways = ways_to_disk(json.loads(configs[node_id].system_config or "{}"), raylet)
        if ways:
            found.append(f"{where}: {' and '.join(ways)}")
    if found:
        shown = sorted(found)[:8] + [f"and {len(found) - 8} more"] * (len(found) > 8)
        settings = " ".join(f"{name}={value}" for name, value in NO_DISK_ENVIRONMENT.items())
        raise ClusterError(
            "a full object store would write the stream to disk:\n  "
            + "\n  ".join(shown)
            + f"\nstart Ray on every node with {settings} in its environment and a /dev/shm as large as its "
            "object store (docker: --shm-size), or set stream.allow_spilling: true"
        )
    return set(nodes) - (raylets.keys() & configs.keys())


class DiskWatch:
    """Counts what the object stores have written to disk since this was made.

    Args:
        refuse: check every node as well when it is first seen. One that does not answer is asked again.
        every_s: from the end of a look to the next.
        patience_s: given to nodes to answer.

    Raises:
        ClusterError: a node that would write to disk.
    """

    def __init__(
        self, refuse: bool = False, *, every_s: float = LOOK_S, patience_s: float = PATIENCE_S
    ) -> None:
        self._refuse = refuse
        self._every_s = every_s
        self._patience_s = patience_s
        self._checked: set[str] = set()
        self._silent: set[str] = set()
        self._gone = {node["NodeID"] for node in ray.nodes() if not node["Alive"]}
        self._before: dict[str, int] = {}
        self._latest: dict[str, int] = {}
        self._counting = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self.look()
        self._before = dict(self._latest)
        self._looked_at = time.monotonic()

    def poll(self) -> None:
        """Begin a look in the background when it is time; never waits.

        Raises:
            ClusterError: what the last look has found.
        """
        if self._thread is not None and self._thread.is_alive():
            return
        if self._error is not None:
            raise self._error
        if time.monotonic() - self._looked_at >= self._every_s:
            self._thread = threading.Thread(target=self._look_behind, name="disk watch", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End a look that is under way."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(_RPC_S + 2)

    def look(self) -> int | None:
        """Check the nodes that are new, and count.

        Raises:
            ClusterError: a node that would write to disk, or was silent twice.
        """
        if self._refuse:
            nodes = _alive()
            new = {node_id: node for node_id, node in nodes.items() if node_id not in self._checked}
            silent = refuse_disk(new, self._patience_s, self._closed) if new else set()
            self._checked |= new.keys() - silent
            if self._closed.is_set():
                return None
            if silent:
                # No task may begin on a node that drains: it is about to go.
                staying = _alive().keys() - ray._private.state.state.get_draining_nodes().keys()
                self._refuse_silent({node_id: new[node_id] for node_id in silent & staying})
        return self.count()

    def count(self) -> int | None:
        """Ask every node; returns bytes, nodes that are gone by now included as they were last seen.

        None: a node that was there in the meantime was never heard.
        """
        nodes = {node["NodeID"]: node for node in ray.nodes() if node["NodeID"] not in self._gone}
        alive = {node_id: node for node_id, node in nodes.items() if node["Alive"]}
        request = _messages.GetNodeStatsRequest(include_memory_info=False)
        replies = _ask_raylets(alive, "GetNodeStats", request, self._patience_s)
        with self._counting:
            for node_id, reply in replies.items():
                store = reply.store_stats
                written = store.spilled_bytes_total + store.object_store_bytes_fallback
                self._latest[node_id] = max(written, self._latest.get(node_id, 0))
            if nodes.keys() - self._latest.keys():
                return None
            return sum(seen - self._before.get(node_id, 0) for node_id, seen in self._latest.items())

    def _look_behind(self) -> None:
        try:
            self.look()
        except Exception as error:
            self._error = error
        self._looked_at = time.monotonic()

    def _refuse_silent(self, silent: Mapping[str, Mapping[str, Any]]) -> None:
        twice = [_name(node) for node_id, node in silent.items() if node_id in self._silent]
        if twice:
            raise ClusterError(
                f"{', '.join(sorted(twice))}: asked twice, without an answer, whether objects are written to "
                "disk there; see what keeps a task from running there (`ray status`, the raylet's log), or set "
                "stream.allow_spilling: true to run without this check"
            )
        for node in silent.values():
            logger.warning("%s did not say whether it writes objects to disk; it is asked again", _name(node))
        self._silent |= silent.keys()


def read_raylet(process: psutil.Process | None = None) -> Raylet:
    """What a raylet was started with; default: the one that this worker process belongs to."""
    environment: Mapping[str, str] = os.environ
    store, is_own = None, False
    with contextlib.suppress(psutil.Error, StopIteration):
        raylet = process or next(p for p in psutil.Process().parents() if p.name() == "raylet")
        store = _argument(raylet, "plasma_directory")
        environment, is_own = raylet.environ(), True
    named = {name: environment[name] for name in NO_DISK_ENVIRONMENT if name in environment}
    return Raylet(named, is_own, store, _filesystem(store) if store and psutil.LINUX else None)


def _own_raylets() -> dict[str, psutil.Process]:
    """Those that this process has started, by node id."""
    found = {}
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            node_id = _argument(child, "node_id") if child.name() == "raylet" else None
            if node_id is not None:
                found[node_id] = child
    return found


def _argument(process: psutil.Process, name: str) -> str | None:
    prefix = f"--{name}="
    return next((a.removeprefix(prefix) for a in process.cmdline() if a.startswith(prefix)), None)


def _filesystem(directory: str) -> str | None:
    where = Path(directory).resolve()
    mounts = [m for m in psutil.disk_partitions(all=True) if where.is_relative_to(m.mountpoint)]
    # Of two mounts at one place the later hides the earlier; max takes the first of equals.
    nearest = max(reversed(mounts), key=lambda m: len(m.mountpoint), default=None)
    return nearest.fstype if nearest else None


def _ask_workers(node_ids: list[str], patience_s: float, closed: threading.Event) -> dict[str, Raylet]:
    """What the raylets of these nodes were started with, of those that answer."""
    asked = {
        ray.remote(read_raylet)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False))
        .remote(): node_id
        for node_id in node_ids
    }
    waiting = list(asked)
    give_up = time.monotonic() + patience_s
    while waiting and not closed.is_set() and time.monotonic() < give_up:
        _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=1.0)
    for ref in waiting:
        ray.cancel(ref)
    raylets = {}
    for ref in asked.keys() - set(waiting):
        try:
            raylets[asked[ref]] = ray.get(ref)
        except RayError as error:  # a node that leaves at this moment
            logger.info("node %s: %s", asked[ref], error)
    return raylets


def _ask_raylets(
    nodes: Mapping[str, Mapping[str, Any]], method: str, request: Any, patience_s: float
) -> dict[str, Any]:
    """The replies of those that answer, all asked at once."""
    calls = {}
    for node_id, node in nodes.items():
        channel = init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
        stub = node_manager_pb2_grpc.NodeManagerServiceStub(channel)
        calls[node_id] = getattr(stub, method).future(request, timeout=min(_RPC_S, patience_s))
    replies = {}
    for node_id, call in calls.items():
        try:
            replies[node_id] = call.result()
        except grpc.RpcError as error:
            logger.info("%s does not answer %s: %s", _name(nodes[node_id]), method, error.code())
    return replies


def _alive() -> dict[str, dict[str, Any]]:
    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}


def _name(node: Mapping[str, Any]) -> str:
    return f"node {node['NodeManagerAddress']} ({node['NodeID'][:8]})"
