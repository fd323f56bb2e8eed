"""vLLM under a pool on a real Ray: an engine core that is killed, and one that is to join the run's cluster."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch

from fusellm_ray.config import Config, VllmEngine
from fusellm_ray.config_file import parse_config
from fusellm_ray.errors import ConfigError
from fusellm_ray.job import run_job
from fusellm_ray.plan import require_resources
from fusellm_ray.stream.frame import decode_frame, encode_request
from fusellm_ray.teachers.report import PoolStatus
from fusellm_ray.teachers.service import wait_ready
from tests.faults import Injector, kill, same_bits, weights
from tests.head import Head
from tests.runs import build_run, named
from tests.test_cache import five_segments
from tests.test_faults import PACE
from tests.test_leash import is_gone
from tests.test_stream import PATIENCE_S, Service
from tests.tokenizers import VOCAB_SIZE, build
from tests.vllm_host import build as build_model

TOP_K = 8

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]


GPUS = {"num_gpus": float(torch.cuda.is_available())}
"""Of a teacher in vLLM."""


def run_config(folder: Path, **settings: Any) -> Config:
    engine = {
        "type": "vllm",
        "dtype": "float32",
        "max_num_batched_tokens": 256,
        "max_num_seqs": 8,
        **settings,
    }
    teacher = {"name": "t", "model": str(folder), "top_k": TOP_K, "engine": engine, "cache_bytes": 0}
    if "args" not in settings:
        teacher["resources"] = GPUS
    return Config.model_validate(
        {
            "run": {"name": "test"},
            "target": {"model": str(folder)},
            "teachers": [teacher],
            "corpus": {"sources": [{"name": "none", "path": "none"}]},
            "training": {"steps": 1},
        }
    )


def engine_cores(service: Service, teacher: str = "t") -> list[int]:
    """Processes below the only replica's."""
    (replica,) = service.replicas(teacher)
    found = psutil.Process(replica.pid).children(recursive=True)
    return [p.pid for p in found if not any("resource_tracker" in part for part in p.cmdline())]


def gold_logprobs(service: Service, folder: Path) -> np.ndarray:
    segments = five_segments(folder)
    (handle,) = ray.get(service.pools["t"].table.remote("t")).handles.values()
    (replica,) = service.replicas("t")
    parts = decode_frame(
        ray.get(handle.score.remote(encode_request(segments))),
        teacher="t",
        fingerprint=replica.fingerprint,
        vocab_size=VOCAB_SIZE,
        top_k=TOP_K,
        num_positions=[s.num_positions for s in segments],
    )
    return np.concatenate([part.gold for part in parts])


def wait_for(service: Service, condition: Callable[[PoolStatus], bool]) -> PoolStatus:
    give_up = time.monotonic() + PATIENCE_S
    while not condition(status := ray.get(service.pools["t"].status.remote("t"))):
        assert time.monotonic() < give_up, status
        time.sleep(0.1)
    return status


def test_a_killed_engine_core_is_replaced_with_its_cause_told_and_answers_stay_the_same(
    ray_session: None, tmp_path: Path
) -> None:
    folder = build("llama", build_model("llama", tmp_path / "model", VOCAB_SIZE))
    with Service(run_config(folder)) as service:
        before = gold_logprobs(service, folder)
        first = engine_cores(service)
        assert first
        for pid in first:
            kill(pid)
        status = wait_for(service, lambda status: bool(status.problems))
        assert "its engine died; process " in status.problems[0]
        assert "SIGKILL" in status.problems[0]
        status = wait_for(service, lambda status: status.ready == 1)
        assert (status.restarts, status.problems) == (1, ())
        second = engine_cores(service)
        assert second
        assert not set(second) & set(first)
        np.testing.assert_allclose(gold_logprobs(service, folder), before, atol=1e-2)
        assert all(is_gone(pid, within_s=20) for pid in first)
    assert all(is_gone(pid, within_s=20) for pid in second)


def test_a_killed_engine_core_changes_no_bit_of_a_run(
    ray_session: None, tmp_path: Path, tokenizer_folders: dict[str, Path]
) -> None:
    tree = build_run(
        tmp_path,
        tokenizer_folders,
        training={"steps": 18},
        stream={"deadline_s": PATIENCE_S, "in_flight_tokens": 256},
    )
    folder = build("llama", build_model("llama", tmp_path / "vllm", VOCAB_SIZE))
    # One text at a time: how sums are rounded may depend on what is scored together.
    engine = {"type": "vllm", "dtype": "float32", "max_num_batched_tokens": 256, "max_num_seqs": 1}
    tree["teachers"][0] |= {"model": str(folder), "engine": engine, "cache_bytes": 0, "resources": GPUS}
    tree["teachers"][1] |= {
        "engine": PACE,
        "cache_bytes": 0,
    }  # steps last long enough for the kill to come between
    ran = {}
    with Service(parse_config(tree)) as service:
        first = engine_cores(service, "left")
        for name, faults in ("undisturbed", {}), ("killed", {2: lambda: [kill(pid) for pid in first]}):
            config, seen = named(tree, name), Injector(faults)
            assert run_job(config, display=seen, pools=service.pools).is_finished
            assert seen.faults == {}
            ran[name] = seen.losses, weights(config, tmp_path / name)
        assert ray.get(service.pools["left"].status.remote("left")).restarts == 1
        wait_ready(service.pools, PATIENCE_S)
        assert not set(engine_cores(service, "left")) & set(first)
    (losses, trained), (same_losses, same_trained) = ran.values()
    assert losses == same_losses
    assert same_bits(trained, same_trained)


@ray.remote(num_cpus=0.1)
def cluster_of_an_engine_core() -> str:
    """Which Ray a child of a replica joins that calls ray.init, as vLLM's Ray executor does."""
    from fusellm_ray.teachers.vllm import _set_environment

    _set_environment(VllmEngine(type="vllm", args={"distributed_executor_backend": "ray"}))
    code = "import ray; ray.init(log_to_driver=False); print(ray.get_runtime_context().gcs_address)"
    core = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100
    )
    return core.stdout.split()[-1]


def test_an_engine_core_with_workers_on_ray_joins_the_runs_cluster(ray_head: Head) -> None:
    code = (
        "import ray; ray.init(log_to_driver=False); from tests.test_engine_death import cluster_of_an_engine_core; "
        "print(ray.get(cluster_of_an_engine_core.remote()), ray.get_runtime_context().gcs_address)"
    )
    environment = ray_head.environment | {"PYTHONPATH": str(Path(__file__).parents[1])}
    driver = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=200
    )
    assert driver.returncode == 0, driver.stderr
    joined, own = driver.stdout.split()[-2:]
    assert joined == own


def test_workers_on_ray_are_refused_where_there_is_no_cluster_to_join(
    ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = run_config(Path("m"), args={"distributed_executor_backend": "ray"}, tensor_parallel_size=2)
    with pytest.raises(ConfigError, match=r"teachers\[0\] \(t\): .* needs a cluster.*resources.num_gpus=2"):
        require_resources(config)
    assert require_resources(config, has_teachers=True) is None
