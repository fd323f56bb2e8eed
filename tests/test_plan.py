"""What `fusellm-ray check` estimates and refuses."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusellm_ray.config import Config
from fusellm_ray.config_file import parse_config
from fusellm_ray.errors import ClusterError, ConfigError, ModelError
from fusellm_ray.plan import _target_memory, make_plan, preflight, require_resources, unused_gpus
from tests.models import tiny_model
from tests.runs import build_run, named

VOCAB, WIDTH, RANK = 101, 32, 4


def memory(model: Path, **lora: Any) -> int:
    """Of one of two ranks."""
    tree = {
        "run": {"name": "r"},
        "target": {"model": str(model), "lora": {"rank": RANK, **lora} if lora else None},
        "corpus": {"sources": [{"name": "x", "path": "x.jsonl"}]},
        "fusion": {"rule": "none"},
        "training": {"steps": 1},
        "trainer": {"workers": 2},
    }
    return _target_memory(parse_config(tree))


def test_memory_counts_frozen_weights_at_their_width(tmp_path: Path):
    pytest.importorskip("peft")
    model = tiny_model("gpt2", VOCAB, tmp_path)  # its LM head is its embedding
    layers, positions = 2, 128
    linear = layers * 12 * WIDTH**2
    biases_and_norms = layers * (9 * WIDTH + 4 * WIDTH) + 2 * WIDTH
    rest = (VOCAB + positions) * WIDTH + biases_and_norms
    adapters = layers * RANK * (4 + 2 + 5 + 5) * WIDTH  # qkv, projection, up, down: their inputs and outputs
    assert memory(model) == (linear + rest) * 16 // 2
    assert memory(model, target_modules="all-linear") == ((linear + rest) * 4 + adapters * 16) // 2
    assert memory(model, quantise="nf4") == (rest * 4 + adapters * 16) // 2 + linear // 2


# ---------------------------------------------------------------------------------------- the cluster


def asking(trainer: dict[str, Any] | None = None, **teacher: Any) -> Config:
    """A run of a teacher and a rank; neither asks for anything that it is not told to."""
    tree = {
        "run": {"name": "r"},
        "target": {"model": "target"},
        "teachers": [{"name": "t", "model": "teacher", "resources": {"num_cpus": 0}} | teacher],
        "corpus": {"sources": [{"name": "x", "path": "x.jsonl"}]},
        "training": {"steps": 1},
        "trainer": {"resources_per_worker": {"CPU": 0.1}} | (trainer or {}),
    }
    return parse_config(tree)


def nodes(*resources: dict[str, float], **labels: str) -> list[dict[str, Any]]:
    return [{"Resources": {"CPU": 8, **own}, "Labels": labels} for own in resources]


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a cluster that may grow: what is missing is said, not refused."""
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")


@pytest.mark.parametrize(
    ("resources", "count", "room"),
    [
        ({"num_cpus": 0, "num_gpus": 8}, 1, 0),  # on no node, though there are nine
        ({"num_cpus": 0, "num_gpus": 3}, 3, 2),  # a node holds one
        ({"num_cpus": 0, "num_gpus": 0.6}, 10, 9),  # a GPU holds one
        ({"num_cpus": 5, "num_gpus": 1}, 3, 2),
    ],
)
def test_replicas_must_fit_into_nodes_one_by_one(
    joined: None, resources: dict[str, float], count: int, room: int
):
    cluster = nodes({"GPU": 4}, {"GPU": 5})
    config = asking(resources=resources, replicas={"min": count, "max": count})
    missing = require_resources(config, nodes=cluster)
    assert missing is not None
    assert missing.startswith(f"teacher t: asked {count} × (")
    assert missing.endswith(f"), room for {room}")
    if room:
        config = asking(resources=resources, replicas={"min": room, "max": count})
        assert require_resources(config, nodes=cluster) is None


def test_ranks_must_fit_into_nodes_one_by_one(joined: None):
    trainer = {"workers": 2, "use_gpu": True, "resources_per_worker": {"GPU": 2}}
    missing = require_resources(asking(trainer), nodes=nodes({"GPU": 3}, {"GPU": 1}))
    assert missing == "ranks: asked 2 × (GPU 2), room for 1"
    assert require_resources(asking(trainer), nodes=nodes({"GPU": 3}, {"GPU": 2})) is None


def test_replicas_fit_only_into_nodes_with_their_labels(joined: None):
    config = asking(resources={"num_cpus": 0, "num_gpus": 1, "labels": {"zone": "a"}})
    missing = require_resources(config, nodes=nodes({}, zone="a") + nodes({"GPU": 1}, zone="b"))
    assert missing == "teacher t: asked 1 × (GPU 1) on nodes with zone=a, room for 0"
    assert require_resources(config, nodes=nodes({"GPU": 1}, zone="a")) is None


def test_what_would_compute_on_cpus_beside_gpus_is_named():
    config = asking({"use_gpu": False})
    (warning,) = unused_gpus(config, nodes=nodes({"GPU": 4}))
    assert warning == (
        "computes on CPUs, though there are 4 GPUs: teacher t (resources.num_gpus=0), ranks (trainer.use_gpu=false)"
    )
    assert unused_gpus(config, nodes=nodes({})) == []
    own = {"type": "vllm", "args": {"distributed_executor_backend": "ray"}}
    assert unused_gpus(asking({"use_gpu": True}, engine=own), nodes=nodes({"GPU": 4})) == []


# ---------------------------------------------------------------------------------------- check


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, tokenizer_folders: dict[str, Path]) -> dict[str, Any]:
    return build_run(tmp_path_factory.mktemp("run"), tokenizer_folders)


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"trainer": {"resources_per_worker": {"CPUs": 1}}}, "CPUs: asked 2, there 0"),
        ({"trainer": {"resources_per_worker": {"train_slot": 1}}}, "train_slot: asked 2, there 0"),
        ({"trainer": {"resources_per_worker": {"CPU": 1000}}}, "CPU: asked 2000.2, there "),
    ],
)
def test_check_refuses_what_this_machine_cannot_give_as_train_does(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch, section: dict[str, Any], says: str
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ClusterError, match=says):
        make_plan(named(tree, "greedy", **section))


def test_check_refuses_labels_and_slots_that_this_machine_lacks(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for asked in ({"labels": {"zone": "moon"}}, {"custom": {"teacher_slot": 1}}):
        teacher = tree["teachers"][0] | {"resources": {"num_cpus": 0.1} | asked}
        with pytest.raises(ClusterError, match=r"teacher left: asked 1 × \(CPU 0\.1.*room for 0"):
            make_plan(parse_config(tree | {"teachers": [teacher]}))


def test_check_refuses_adapters_of_modules_that_are_not_there(tree: dict[str, Any]):
    pytest.importorskip("peft")
    target = tree["target"] | {"lora": {"target_modules": ["q_prj"]}}
    with pytest.raises(ConfigError, match="did you mean 'q_proj'"):
        make_plan(parse_config(tree | {"target": target}), with_cluster=False)


@pytest.mark.parametrize(
    ("architecture", "says"),
    [
        ("bloom", "BloomForCausalLM: takes no position_ids"),
        ("gemma2", r"Gemma2ForCausalLM: its config sets final_logit_softcapping=30\.0.*choose another"),
    ],
)
def test_an_architecture_that_the_objective_cannot_train_is_refused_before_anything_starts(
    tree: dict[str, Any], tmp_path: Path, architecture: str, says: str
):
    model = str(tiny_model(architecture, VOCAB, tmp_path))
    with pytest.raises(ModelError, match=says):
        preflight(named(tree, "unfit", target={"model": model}))


def test_check_warns_of_a_tokenizer_that_cannot_spell_every_text(tree: dict[str, Any], tmp_path: Path):
    left, right = tree["teachers"]
    folder = shutil.copytree(right["model"], tmp_path / "right")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["byte_fallback"] = False
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = named(tree | {"teachers": [left, right | {"model": str(folder)}]}, "unspelt")
    (warning,) = make_plan(config, with_cluster=False).warnings
    assert "teacher right: its tokenizer has no token for " in warning
    assert "'🜁'" in warning


# In another process: to import vllm takes ten seconds and leaves much behind.
VLLM_CHECK = """
import os, sys
from fusellm_ray.config_file import load_config
from fusellm_ray.errors import FuseLLMError
from fusellm_ray.plan import preflight
before = dict(os.environ)
for change in ({"args": {"max_model_length": 9}}, {"args": {"seed": 1}, "lora": "none"}, {"args": {"seed": 1}}):
    try:
        preflight(load_config(sys.argv[1], [f"teachers.0.engine={{type: vllm, **}}".replace("**", str(change)[1:-1])]))
    except FuseLLMError as error:
        print(type(error).__name__, error)
print("accepted" if "vllm" in sys.modules and dict(os.environ) == before else "changed")
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_check_refuses_arguments_vllm_does_not_know_and_adapters_that_are_not_there(
    tree: dict[str, Any], tmp_path: Path
):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-c", VLLM_CHECK, str(path)]
    said = subprocess.run(
        command, capture_output=True, text=True, timeout=500, check=True
    ).stdout.splitlines()
    wanted = "ConfigError teacher left: engine.args.max_model_length: vLLM has no such engine argument"
    assert said[-3].startswith(f"{wanted}; did you mean 'max_model_len'?")
    assert said[-2].startswith("ModelError adapter none: expected adapter_config.json")
    assert said[-1] == "accepted"


def test_local_is_no_cluster_to_join(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", "local")
    with pytest.raises(ClusterError, match="this machine is too small"):
        make_plan(named(tree, "greedy", trainer={"resources_per_worker": {"CPU": 1000}}))


@pytest.mark.parametrize("address", ["127.0.0.1:9", "nonsense", "host:0x1", "http://127.0.0.1:9"])
def test_a_cluster_out_of_reach_is_said_at_once(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch, address: str
):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ClusterError, match=f"RAY_ADDRESS={address}: there is no cluster to join"):
        make_plan(parse_config(tree))
