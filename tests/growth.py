"""A run that a second node joins and leaves again, and that is then stopped: `python -m tests.growth CONFIG`."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.train import ScalingConfig

from fusellm_ray import job
from fusellm_ray.config_file import load_config
from fusellm_ray.stream.memory import NO_DISK_ENVIRONMENT
from tests.faults import Injector

SLOT = {"num_cpus": 1, "resources": {"train_slot": 1}, "object_store_memory": 128 << 20}


class Visitor(Injector):
    """A display that adds a node once a rank trains, removes it once two do, and stops the run when one does again."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__({})
        self._cluster = cluster
        self._node: Any = None
        self.num_ranks: list[int] = []
        self._steps = 0
        """Since the latest start."""

    def show(self, record: dict[str, Any]) -> None:
        super().show(record)
        if record["event"] == "start":
            self.num_ranks.append(record["ranks"])
            self._steps = 0
        self._steps += record["event"] == "step"
        if self._steps != 5 or record["event"] != "step":
            return
        if self.num_ranks == [1]:
            self._node = self._cluster.add_node(**SLOT)
        if self.num_ranks == [1, 2]:
            self._cluster.remove_node(self._node, allow_graceful=False)
        if self.num_ranks == [1, 2, 1]:
            signal.raise_signal(signal.SIGINT)  # for SIGTERM add_node has a handler of its own


def main(config_path: str) -> None:
    os.environ.update(NO_DISK_ENVIRONMENT)
    # Ray looks once a minute whether a group can grow.
    job.ScalingConfig = functools.partial(ScalingConfig, elastic_resize_monitor_interval_s=2)  # type: ignore[misc]
    cluster = Cluster(initialize_head=True, head_node_args=SLOT | {"include_dashboard": False})
    os.environ["RAY_ADDRESS"] = cluster.address
    ray.init(address=cluster.address, log_to_driver=False)
    seen = Visitor(cluster)
    outcome = job.run_job(load_config(config_path), display=seen)
    ray.shutdown()
    cluster.shutdown()
    told = {"step": outcome.step, "ranks": seen.num_ranks, "records": seen.records}
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
