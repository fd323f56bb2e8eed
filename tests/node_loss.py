"""A run on three nodes, one of which goes while a replica on it answers: `python -m tests.node_loss CONFIG EXPORT`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from fusellm_ray.config_file import load_config
from fusellm_ray.job import export_run, run_job
from fusellm_ray.stream.memory import NO_DISK_ENVIRONMENT
from tests.faults import Descendants, Injector


def main(config_path: str, export: str) -> None:
    os.environ.update(NO_DISK_ENVIRONMENT)
    config = load_config(config_path)
    store = {"object_store_memory": 128 << 20}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "resources": {"train_slot": 2}, "include_dashboard": False, **store},
    )
    nodes = [cluster.add_node(num_cpus=1, resources={"teacher_slot": 2}, **store) for _ in range(2)]
    os.environ["RAY_ADDRESS"] = cluster.address
    ray.init(address=cluster.address, log_to_driver=False)
    removed = []
    processes = Descendants()

    def remove_a_teachers_node() -> None:
        """The one on which slots are taken: both replicas, or one of two."""
        in_use = {
            node["NodeID"]: node["Resources"].get("teacher_slot", 0)
            for node in ray.nodes()
            if node["Alive"] and "teacher_slot" in node["Resources"]
        }
        free = ray._private.state.available_resources_per_node()
        victim = min(in_use, key=lambda node_id: free.get(node_id, {}).get("teacher_slot", 0.0))
        processes.look()
        node = next(node for node in nodes if node.node_id == victim)
        cluster.remove_node(node, allow_graceful=False)
        removed.append(victim)

    seen = Injector({4: remove_a_teachers_node})
    assert run_job(config, display=seen).is_finished
    processes.look()
    export_run(config, Path(export))
    ray.shutdown()
    cluster.shutdown()
    left = processes.left()
    print(json.dumps({"removed": len(removed), "losses": seen.losses, "processes_left": left}))


if __name__ == "__main__":
    main(*sys.argv[1:])
