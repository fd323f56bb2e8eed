"""Where replicas run, and that what they send stays in memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import yaml

from fusellm_ray.config import Config, Resources
from fusellm_ray.errors import ClusterError
from fusellm_ray.job import places_for_ranks
from fusellm_ray.plan import require_resources
from fusellm_ray.stream.memory import NO_DISK_ENVIRONMENT, DiskWatch, Raylet, read_raylet, ways_to_disk
from fusellm_ray.teachers.service import _shortage, stop_pools, wait_ready
from fusellm_ray.teachers.supervisor import PoolSupervisor
from tests.runs import build_run

ON_A_CLUSTER_LIKE_RAYS_DEFAULT = """
import sys
import numpy, ray
from fusellm_ray.config_file import load_config
from fusellm_ray.errors import ClusterError
from fusellm_ray.job import run_job
from fusellm_ray.stream.memory import DiskWatch
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False,
         object_store_memory=80 << 20, _plasma_directory=sys.argv[3])
try:
    run_job(load_config(sys.argv[1]))
except ClusterError as error:
    print(error)
print("finished:", run_job(load_config(sys.argv[2])).is_finished)
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


def test_ranks_have_their_places_while_teachers_load_and_a_shortage_is_told_without_ray_s_names_for_them(
    ray_session: None,
) -> None:
    def train_slots() -> float:
        return ray.available_resources().get("train_slot", 0)

    def wait_for(slots: float) -> None:
        give_up = time.monotonic() + 60
        while train_slots() != slots and time.monotonic() < give_up:
            time.sleep(0.1)
        assert train_slots() == slots

    tree = run_config().model_dump() | {"trainer": {"resources_per_worker": {"train_slot": 1}}}
    wait_for(1)
    with places_for_ranks(Config.model_validate(tree)):
        wait_for(0)
        told = _shortage()
    wait_for(1)
    assert told == "The cluster has CPU 8, train_slot 1; free: CPU 8"


# ---------------------------------------------------------------------------------------- disk


def test_the_two_ways_to_disk_are_found_wherever_they_are_set() -> None:
    assert len(ways_to_disk({}, Raylet({}))) == 2
    assert ways_to_disk({}, Raylet(NO_DISK_ENVIRONMENT)) == []
    off = {"automatic_object_spilling_enabled": False, "local_fs_capacity_threshold": 0.0}
    assert ways_to_disk(off, Raylet({})) == []
    (way,) = ways_to_disk({}, Raylet({"RAY_automatic_object_spilling_enabled": "false"}))
    assert way == "overflow goes to files (local_fs_capacity_threshold=0.95)"
    # Ray itself writes the first one into the cluster's config, whatever the environment says.
    assert ways_to_disk({"automatic_object_spilling_enabled": True}, Raylet(NO_DISK_ENVIRONMENT)) == []


def test_an_object_store_that_is_not_in_shared_memory_is_a_way_to_disk() -> None:
    (way,) = ways_to_disk({}, Raylet(NO_DISK_ENVIRONMENT, store="/tmp/ray", filesystem="ext4"))
    assert way == "the object store is on disk (/tmp/ray is ext4)"
    assert ways_to_disk({}, Raylet(NO_DISK_ENVIRONMENT, store="/dev/shm", filesystem="tmpfs")) == []
    assert ways_to_disk({}, Raylet(NO_DISK_ENVIRONMENT)) == []  # not known


def test_a_cluster_that_keeps_objects_in_memory_passes_and_writes_nothing(
    ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_automatic_object_spilling_enabled", "1")  # here, not where Ray runs
    watch = DiskWatch(refuse=True)
    kept = [ray.put(bytes(1 << 20)) for _ in range(8)]
    assert watch.look() == 0
    del kept


def test_a_job_that_changes_its_workers_environment_does_not_change_what_is_read(ray_session: None) -> None:
    changed = {"env_vars": dict.fromkeys(NO_DISK_ENVIRONMENT, "1")}
    raylet = ray.get(ray.remote(read_raylet).options(num_cpus=0, runtime_env=changed).remote())
    assert raylet.is_own
    assert raylet.environment == NO_DISK_ENVIRONMENT
    if psutil.LINUX:
        assert raylet.store
        assert raylet.filesystem


def test_where_no_raylet_can_be_read_it_is_said() -> None:
    raylet = read_raylet()
    assert not raylet.is_own
    assert raylet.store is None


def poll_for(seconds: float, watch: DiskWatch) -> None:
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        watch.poll()
        time.sleep(0.05)


def test_a_silent_node_is_asked_again_then_refused_and_is_no_zero(
    ray_session: None, caplog: pytest.LogCaptureFixture
) -> None:
    (raylet,) = [child for child in psutil.Process().children() if child.name() == "raylet"]
    raylet.suspend()
    try:
        watch = DiskWatch(refuse=True, every_s=0.0, patience_s=0.5)
        assert "did not say whether it writes objects to disk; it is asked again" in caplog.text
        assert watch.count() is None
        began = time.monotonic()
        watch.poll()
        assert time.monotonic() - began < 0.4
        with pytest.raises(ClusterError, match=r"node [\d.]+ \(\w{8}\): asked twice.*allow_spilling: true"):
            poll_for(30, watch)
    finally:
        raylet.resume()
    assert DiskWatch(refuse=True).count() == 0


def test_a_run_on_a_cluster_that_spills_is_refused_unless_that_is_allowed_and_then_counts(
    tmp_path: Path, tokenizer_folders: dict[str, Path]
) -> None:
    tree = build_run(tmp_path, tokenizer_folders, training={"steps": 1}, trainer={"workers": 1})
    tree |= {"teachers": [], "objective": {"clm_weight": 1.0}, "fusion": {"rule": "none"}}
    for name, allow_spilling in {"refused": False, "allowed": True}.items():
        config = tree | {"run": tree["run"] | {"name": name}, "stream": {"allow_spilling": allow_spilling}}
        (tmp_path / name).write_text(yaml.safe_dump(config))
    environment = {k: v for k, v in os.environ.items() if k not in (*NO_DISK_ENVIRONMENT, "RAY_ADDRESS")}
    done = subprocess.run(
        [sys.executable, "-c", ON_A_CLUSTER_LIKE_RAYS_DEFAULT, "refused", "allowed", str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"node [\d.]+ \(\w{8}\): object spilling is on", done.stdout)
    assert "overflow goes to files" in done.stdout
    if psutil.LINUX:
        kind = subprocess.check_output(["stat", "-f", "-c", "%T", tmp_path], text=True).strip()
        # This process has started it: it is told, not refused.
        assert (f"which lies on disk ({tmp_path})" in done.stderr) == (kind != "tmpfs")
    assert "RAY_automatic_object_spilling_enabled=0" in done.stdout
    assert "finished: True" in done.stdout
    assert int(done.stdout.split("written:")[1]) > 64 << 20
