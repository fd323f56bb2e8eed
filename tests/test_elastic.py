"""A worker group that grows and shrinks with the cluster: the same global batches on any number of ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fusellm_ray.job import run_job
from tests.faults import Injector
from tests.runs import build_run, named, of_event


@pytest.mark.slow
def test_a_run_that_grows_to_a_new_node_and_shrinks_again_takes_the_same_steps(
    tokenizer_folders: dict[str, Path], ray_session: None, tmp_path: Path
) -> None:
    tree = build_run(tmp_path, tokenizer_folders, training={"schedule": "constant", "warmup_ratio": 0.0})
    for teacher in tree["teachers"]:  # their actors stay while the worker group comes and goes
        teacher["engine"] = {"type": "simulated"}
    config = named(
        tree,
        "elastic",
        training={"steps": 5000},
        trainer={
            "workers": {"min": 1, "max": 2},
            "resources_per_worker": {"CPU": 0.2, "train_slot": 1},
            "max_failures": 1,
        },
        # Evaluations change no weight, and make steps last until the new node is seen.
        evaluation={"sources": tree["corpus"]["sources"], "every_steps": 1, "max_bytes": 10_000},
    )
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    done = subprocess.run(
        [sys.executable, "-m", "tests.growth", str(path)],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["ranks"] == [1, 2, 1]
    undisturbed = Injector({})
    assert run_job(
        named(tree, "undisturbed", training={"steps": told["step"]}), display=undisturbed
    ).is_finished
    wanted = {record["step"]: record for record in of_event(undisturbed.records, "step")}
    steps = of_event(told["records"], "step")
    assert {record["step"] for record in steps} == set(wanted)
    for record in steps:
        for part in ("loss", "loss/fusion"):
            assert record[part] == pytest.approx(wanted[record["step"]][part], rel=1e-6), record["step"]
