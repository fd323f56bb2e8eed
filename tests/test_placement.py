"""Where replicas run, and that what they send stays in memory."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import ray

from fusellm_ray.config import Config, Resources
from fusellm_ray.errors import ClusterError
from fusellm_ray.plan import require_resources
from fusellm_ray.stream.memory import NO_DISK_ENVIRONMENT, DiskWatch, refuse_disk, ways_to_disk
from fusellm_ray.teachers.service import stop_pools, wait_ready
from fusellm_ray.teachers.supervisor import PoolSupervisor

ON_A_CLUSTER_LIKE_RAYS_DEFAULT = """
import numpy, ray
from fusellm_ray.errors import ClusterError
from fusellm_ray.stream.memory import DiskWatch, refuse_disk
ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
try:
    refuse_disk()
except ClusterError as error:
    print(error)
watch = DiskWatch()
kept = [ray.put(numpy.zeros(16 << 20, numpy.uint8)) for _ in range(10)]
print("written:", watch.look())
"""


def run_config(**resources: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "test"},
            "target": {"model": "none"},
            "teachers": [
                {
                    "name": "placed",
                    "model": "none",
                    "engine": {"type": "simulated"},
                    "resources": {"num_cpus": 0.1, **resources},
                }
            ],
            "corpus": {"sources": [{"name": "none", "path": "none"}]},
            "training": {"steps": 1},
            "trainer": {"resources_per_worker": {"CPU": 0.1}},
        }
    )


# ---------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("selector", "fits"),
    [("a", {"a"}), ("!a", {"b", None}), ("in(a, b)", {"a", "b"}), ("!in(a,b)", {None}), ("c", set())],
)
def test_selectors_mean_what_they_mean_to_ray(selector: str, fits: set[str | None]) -> None:
    resources = Resources(labels={"zone": selector})
    for value in ("a", "b", None):
        labels = {"other": "a"} | ({} if value is None else {"zone": value})
        assert resources.label_matches(labels) == (value in fits)


@pytest.mark.parametrize("selector", ["", "a b", "in()", "in(a", "!!a", "a,b"])
def test_a_selector_that_ray_could_not_read_is_refused(selector: str) -> None:
    with pytest.raises(ValueError, match="is no label selector; write a, !a, in"):
        Resources(labels={"zone": selector})


@pytest.mark.parametrize(
    ("custom", "message"),
    [
        ({"CPU": 1}, "CPU is no custom resource; use num_cpus"),
        ({"teacher_slot": -1}, "teacher_slot: -1.0 is below 0"),
    ],
)
def test_custom_resources_that_ray_would_refuse_are_refused(custom: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Resources(custom=custom)


def test_labels_that_no_node_has_are_missing_at_the_start(ray_session: None) -> None:
    assert require_resources(run_config()) is None
    with pytest.raises(
        ClusterError, match=r"teacher placed: asked 1 × \(CPU 0\.1\) on nodes with zone=moon, room for 0"
    ):
        require_resources(run_config(labels={"zone": "moon"}))
    node = ray.nodes()[0]["Labels"]["ray.io/node-id"]
    assert require_resources(run_config(labels={"ray.io/node-id": node})) is None
    assert require_resources(run_config(labels={"zone": "!moon"})) is None


def test_replicas_wait_for_a_node_with_their_labels(ray_session: None) -> None:
    config = run_config(labels={"zone": "moon"})
    options = {"target": config.target, "alignment": config.alignment, "hang_s": 60}
    pools = {"placed": ray.remote(PoolSupervisor).options(num_cpus=0).remote(config.teachers, **options)}
    try:
        ray.get(pools["placed"].status.remote("placed"))
        with pytest.raises(ClusterError, match=r"asks for CPU 0\.1 on a node with zone=moon"):
            wait_ready(pools, 1)
    finally:
        stop_pools(pools)


# ---------------------------------------------------------------------------------------- disk


def test_the_two_ways_to_disk_are_found_wherever_they_are_set() -> None:
    assert len(ways_to_disk({}, {})) == 2
    assert ways_to_disk({}, NO_DISK_ENVIRONMENT) == []
    off = {"automatic_object_spilling_enabled": False, "local_fs_capacity_threshold": 0.0}
    assert ways_to_disk(off, {}) == []
    (way,) = ways_to_disk({}, {"RAY_automatic_object_spilling_enabled": "false"})
    assert way == "overflow goes to files (local_fs_capacity_threshold=0.95)"
    # Ray itself writes the first one into the cluster's config, whatever the environment says.
    assert ways_to_disk({"automatic_object_spilling_enabled": True}, NO_DISK_ENVIRONMENT) == []


def test_a_cluster_that_keeps_objects_in_memory_passes_and_writes_nothing(ray_session: None) -> None:
    watch = DiskWatch()
    refuse_disk()
    kept = [ray.put(bytes(1 << 20)) for _ in range(8)]
    assert watch.look() == 0
    del kept


def test_a_cluster_that_spills_is_refused_and_what_it_writes_is_counted() -> None:
    environment = {k: v for k, v in os.environ.items() if k not in (*NO_DISK_ENVIRONMENT, "RAY_ADDRESS")}
    done = subprocess.run(
        [sys.executable, "-c", ON_A_CLUSTER_LIKE_RAYS_DEFAULT],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "object spilling is on" in done.stdout
    assert "overflow goes to files" in done.stdout
    assert "RAY_automatic_object_spilling_enabled=0" in done.stdout
    assert int(done.stdout.split("written:")[1]) > 64 << 20
