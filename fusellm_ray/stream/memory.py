"""Nothing of the stream goes to disk: is that so on every node, and has it stayed so?

Ray moves objects to disk when its store is full, in two ways: it spills them, and it lays new ones in files
(the fallback). Both are settings of each node's raylet: from the environment of its process, which its workers
inherit, where that names them, else from the cluster's `_system_config`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
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

_NODE_S = 60.0
"""Given to all nodes to say how they are set; a worker process may have to start on each."""
_RPC_S = 5.0


def refuse_disk(checked: Iterable[str] = ()) -> set[str]:
    """Check every node of the cluster but those that were checked; give the ids of all that have been by now.

    Raises:
        ClusterError: naming the nodes that would write to disk, and what to set.
    """
    alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    nodes = {node_id: node for node_id, node in alive.items() if node_id not in checked}
    if not nodes:
        return set(alive)
    if any(child.name() == "raylet" for child in psutil.Process().children()):
        environments = dict.fromkeys(
            nodes, _ray_environment()
        )  # this process has started it, and gave it its own
    else:
        environments = _environments(list(nodes))
    found: list[str] = []
    silent: set[str] = set()
    for node_id, node in nodes.items():
        environment, system_config = environments.get(node_id), _system_config(node)
        if environment is None or system_config is None:
            logger.warning("node %s did not say whether it spills objects", node["NodeManagerAddress"])
            silent.add(node_id)
            continue
        ways = ways_to_disk(system_config, environment)
        if ways:
            found.append(f"node {node['NodeManagerAddress']} ({node_id[:8]}): {' and '.join(ways)}")
    if found:
        shown = found[:8] + [f"and {len(found) - 8} more"] * (len(found) > 8)
        settings = " ".join(f"{name}={value}" for name, value in NO_DISK_ENVIRONMENT.items())
        raise ClusterError(
            "a full object store would write the stream to disk:\n  "
            + "\n  ".join(shown)
            + f"\nstart Ray on every node with {settings} in its environment, or set stream.allow_spilling: true"
        )
    return set(alive) - silent


def ways_to_disk(system_config: Mapping[str, Any], environment: Mapping[str, str]) -> list[str]:
    """How a raylet that is set like this would write objects to disk."""

    def setting(name: str, default: str) -> str:
        return str(environment.get(f"RAY_{name}", system_config.get(name, default))).lower()

    ways = []
    if setting("automatic_object_spilling_enabled", "true") not in ("0", "false"):
        ways.append("object spilling is on (automatic_object_spilling_enabled)")
    threshold = setting("local_fs_capacity_threshold", "0.95")
    if float(threshold) > 0:
        ways.append(f"overflow goes to files (local_fs_capacity_threshold={threshold})")
    return ways


class DiskWatch:
    """Counts what the object stores have written to disk since this was made.

    Args:
        refuse: check every node as well when it is first seen, as `refuse_disk` does.
    """

    def __init__(self, refuse: bool = False) -> None:
        self._refuse = refuse
        self._checked: set[str] = set()
        self._before: dict[str, int] = {}
        self._latest: dict[str, int] = {}
        self.look()
        self._before = dict(self._latest)

    def look(self) -> int:
        """Check the nodes that are new, and count.

        Raises:
            ClusterError: a node that is refused.
        """
        if self._refuse:
            self._checked = refuse_disk(self._checked)
        return self.count()

    def count(self) -> int:
        """Ask every node; returns bytes, nodes that are gone by now included as they were last seen."""
        for node in ray.nodes():
            if not node["Alive"]:
                continue
            try:
                stats = _raylet(node).GetNodeStats(
                    _messages.GetNodeStatsRequest(include_memory_info=False), timeout=_RPC_S
                )
            except grpc.RpcError as error:
                logger.info("node %s gives no statistics: %s", node["NodeManagerAddress"], error.code())
                continue
            store = stats.store_stats
            written = store.spilled_bytes_total + store.object_store_bytes_fallback
            self._latest[node["NodeID"]] = max(written, self._latest.get(node["NodeID"], 0))
        return sum(seen - self._before.get(node, 0) for node, seen in self._latest.items())


def _environments(node_ids: list[str]) -> dict[str, dict[str, str]]:
    """RAY_ variables of a worker on each node, of those that answer."""
    asked = {
        ray.remote(_ray_environment)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False))
        .remote(): node_id
        for node_id in node_ids
    }
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_NODE_S)
    environments = {}
    for ref in answered:
        try:
            environments[asked[ref]] = ray.get(ref)
        except RayError as error:  # a node that leaves at this moment
            logger.info("node %s: %s", asked[ref], error)
    return environments


def _ray_environment() -> dict[str, str]:
    return {name: os.environ[name] for name in NO_DISK_ENVIRONMENT if name in os.environ}


def _system_config(node: Mapping[str, Any]) -> dict[str, Any] | None:
    """What its raylet was started with; None from one that does not answer."""
    try:
        reply = _raylet(node).GetSystemConfig(_messages.GetSystemConfigRequest(), timeout=_RPC_S)
    except grpc.RpcError as error:
        logger.info("node %s: %s", node["NodeManagerAddress"], error.code())
        return None
    return json.loads(reply.system_config or "{}")


def _raylet(node: Mapping[str, Any]) -> Any:
    address = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
    return node_manager_pb2_grpc.NodeManagerServiceStub(init_grpc_channel(address))
