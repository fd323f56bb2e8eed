"""Teachers that outlive a run: brought up by one process, used by runs of another, taken down."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from fusellm_ray.config import Config
from fusellm_ray.config_file import parse_config
from fusellm_ray.errors import ClusterError, ConfigError
from fusellm_ray.job import run_job
from fusellm_ray.plan import preflight
from fusellm_ray.teachers.attach import attach, bring_up, find_pool, statuses, take_down
from fusellm_ray.teachers.report import PoolStatus
from tests.runs import build_run


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, tokenizer_folders: dict[str, Path]) -> dict[str, Any]:
    tree = build_run(tmp_path_factory.mktemp("run"), tokenizer_folders, training={"steps": 2})
    for teacher in tree["teachers"]:
        teacher["engine"] = {"type": "simulated"}
    return tree


@pytest.fixture
def cluster(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """The tests' cluster, as one that RAY_ADDRESS names."""
    address: str = ray.get_runtime_context().gcs_address
    monkeypatch.setenv("RAY_ADDRESS", address)
    return address


def command(*arguments: Any) -> dict[str, Any]:
    """Of `fusellm-ray` on the tests' cluster, for subprocess."""
    environment = (
        os.environ
        | {
            "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # whatever its name: look for Ray on the loopback, where it is
        }
    )
    run = [sys.executable, "-c", "from fusellm_ray.cli import main; main()", *map(str, arguments)]
    return {"args": run, "env": environment}


@pytest.fixture(scope="module")
def up(ray_session: None, tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """What `fusellm-ray teachers up` says, run in a process that is gone by now."""
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    done = subprocess.run(**command("teachers", "up", path), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    yield done.stderr
    take_down(parse_config(tree))


def pids(config: Config) -> dict[str, list[int]]:
    tables = {t.name: ray.get(find_pool(t.name).table.remote(t.name)) for t in config.active_teachers}
    return {
        name: [d.pid for d in ray.get([h.describe.remote() for h in table.handles.values()])]
        for name, table in tables.items()
    }


def identities(config: Config) -> dict[str, Any]:
    return preflight(config)["teachers"]


def test_up_waits_until_all_replicas_are_ready(up: str, tree: dict[str, Any], cluster: str) -> None:
    assert "teachers are up" in up
    found = statuses(parse_config(tree))
    for name in ("left", "right"):
        status = found[name]
        assert isinstance(status, PoolStatus)
        assert (status.ready, status.wanted, status.problems) == (1, 1, ())


def test_two_runs_at_once_share_the_teachers_and_leave_them_running(
    up: str, tree: dict[str, Any], cluster: str, tmp_path: Path
) -> None:
    config = parse_config(tree)
    before = pids(config)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    runs = [
        subprocess.Popen(
            **command(
                "train", path, "--attach", f"run.name=sweep-{weight}", f"objective.clm_weight={weight}"
            ),
            stderr=subprocess.PIPE,
            text=True,
        )
        for weight in (0.3, 0.7)
    ]
    for run in runs:
        _, said = run.communicate(timeout=300)
        assert run.returncode == 0, said
    for name in ("left", "right"):  # both asked for the same text
        (stats,) = ray.get(find_pool(name).stats.remote(name)).values()
        assert stats.cache_hits > 0
        assert stats.positions < stats.answered
    assert pids(config) == before
    bring_up(config, identities(config))  # they are, so nothing happens
    assert pids(config) == before


def test_other_settings_are_refused_by_name(
    up: str, tree: dict[str, Any], cluster: str, tokenizer_folders: dict[str, Path]
) -> None:
    left, right = tree["teachers"]
    changed = parse_config(
        tree | {"teachers": [left | {"top_k": 9}, right], "alignment": {"straddle": "mask"}}
    )
    for ask in (attach, lambda config: bring_up(config, identities(config))):
        with pytest.raises(ConfigError) as refused:
            ask(changed)
        assert "teacher left runs with other settings" in str(refused.value)
        assert "top_k: it runs with 8, this config wants 9" in str(refused.value)
        assert "alignment.straddle: it runs with 'condition', this config wants 'mask'" in str(refused.value)


def test_a_deadline_that_comes_before_the_pools_own_is_refused(
    up: str, tree: dict[str, Any], cluster: str
) -> None:
    def config(**stream: Any) -> Config:
        return parse_config(tree | {"stream": stream})

    with pytest.raises(ConfigError, match=r"stream.deadline_s=60: the running teacher left .* after 60 s"):
        attach(config(deadline_s=60))
    assert attach(config(deadline_s=60, on_teacher_loss="fail")).keys() == {"left", "right"}
    assert attach(config(deadline_s=61)).keys() == {"left", "right"}


def test_another_tokenizer_of_the_target_is_refused(up: str, tree: dict[str, Any], cluster: str) -> None:
    config = parse_config(tree)
    other = {name: {**identity, "target_tokenizer": "other"} for name, identity in identities(config).items()}
    message = r"teacher left on .*\n  target_tokenizer: it runs with '.*', this config wants 'other'"
    with pytest.raises(ConfigError, match=message):
        bring_up(config, other)


def test_weights_and_numbers_of_replicas_are_each_runs_own_affair(
    up: str, tree: dict[str, Any], cluster: str
) -> None:
    left, right = tree["teachers"]
    config = parse_config(
        tree | {"teachers": [left | {"weight": 3.0, "replicas": {"min": 2, "max": 2}}, right]}
    )
    assert attach(config).keys() == {"left", "right"}


def test_a_teacher_that_does_not_run_is_said(up: str, tree: dict[str, Any], cluster: str) -> None:
    config = parse_config(tree | {"teachers": [tree["teachers"][0] | {"name": "absent"}]})
    with pytest.raises(ClusterError, match="teacher absent does not run on this cluster; start it with"):
        attach(config)
    assert statuses(config) == {"absent": "does not run"}


def test_without_a_cluster_nothing_is_brought_up(
    ray_session: None, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="RAY_ADDRESS names no cluster"):
        run_job(parse_config(tree), attached=True)


def test_what_does_not_come_up_is_taken_down_again(ray_session: None, tree: dict[str, Any]) -> None:
    config = parse_config(tree | {"teachers": [tree["teachers"][0] | {"name": "hopeless", "top_k": 5000}]})
    with pytest.raises(ConfigError, match="top_k=5000"):
        bring_up(config, {})
    assert find_pool("hopeless") is None


def test_down_ends_all_processes(up: str, tree: dict[str, Any], cluster: str) -> None:
    config = parse_config(tree)
    processes = [pid for group in pids(config).values() for pid in group]
    assert take_down(config) == ["left", "right"]
    give_up = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in processes):
        assert time.monotonic() < give_up
        time.sleep(0.1)
    assert statuses(config) == {"left": "does not run", "right": "does not run"}
    assert take_down(config) == []
