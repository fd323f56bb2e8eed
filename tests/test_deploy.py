"""deploy/: every manifest against its schema, every setup against the rules that schemas cannot state; the image."""

from __future__ import annotations

import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests import rules_operation, rules_resources, rules_security
from tests.manifests import KUBERNETES, PROJECT, RULES, SETUPS, load

ROOT = KUBERNETES.parent.parent
DATA = Path(__file__).parent / "data"
KUBERAY_SCHEMAS = Path(
    os.environ.get("FUSELLM_KUBERAY_SCHEMAS", ROOT.parent / "shared" / "assets" / "kuberay-crds")
)
"""Holds the openAPIV3Schema of KubeRay 1.7's CRDs as rayclusters.v1.json and rayjobs.v1.json."""
CUSTOM_GROUPS = ("ray.io", "kueue.x-k8s.io", "monitoring.coreos.com")


# -------------------------------------------------------------------------------------------- schemas


def strict(schema: Any) -> Any:
    """The schema, refusing the fields it does not name (an API server drops them without a word)."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


def custom_schema(kind: str, api_version: str) -> dict[str, Any]:
    group, version = api_version.split("/")
    name = f"{kind.lower()}s.{version}"
    if group == "ray.io":
        path = KUBERAY_SCHEMAS / f"{name}.json"
        if not path.exists():
            pytest.skip(
                f"no {path}: let FUSELLM_KUBERAY_SCHEMAS name a folder with the schemas of KubeRay's CRDs"
            )
        return strict(json.loads(path.read_text()))
    return strict(yaml.safe_load((DATA / "crds" / f"{name}.yaml").read_text()))


def validate(o: dict[str, Any]) -> None:
    """Raise jsonschema's ValidationError unless the object is what its API asks for, and nothing else."""
    version = kubernetes_validate.latest_version()
    if o["apiVersion"].split("/")[0] not in CUSTOM_GROUPS:
        kubernetes_validate.validate(o, version, strict=True)
        return
    jsonschema.Draft202012Validator(custom_schema(o["kind"], o["apiVersion"])).validate(o)
    # A CRD's schema leaves the metadata to the API server.
    with_metadata = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": o["metadata"]}
    kubernetes_validate.validate(with_metadata, version, strict=True)


@pytest.mark.parametrize("name", SETUPS)
def test_every_manifest_is_valid_for_its_api(name: str):
    for o in load(name).objects:
        validate_once(json.dumps(o))


@cache
def validate_once(text: str) -> None:
    """Setups share most of their objects."""
    validate(json.loads(text))


def change_at(node: Any, path: str, value: Any) -> None:
    """Write into nested lists and dictionaries; None removes. A ~ stands for a slash in a key."""
    *parents, last = [int(p) if p.isdigit() else p.replace("~", "/") for p in path.split("/")]
    for part in parents:
        node = node[part]
    if value is None:
        del node[last]
    else:
        node[last] = value


@pytest.mark.parametrize(
    ("name", "kind", "path", "value"),
    [
        ("base", "RayCluster", "spec/headGroupSpec/template/spec/containers/0/livenesProbe", {}),
        ("base", "RayCluster", "spec/workerGroupSpecs/0/minReplica", 0),
        ("base", "RayCluster", "spec/workerGroupSpecs/0/groupName", None),
        ("base", "RayCluster", "spec/authOptions/mode", "password"),
        ("base", "RayCluster", "spec/autoscalerOptions/version", 2),
        ("base", "RayCluster", "metadata/label", {}),
        ("job", "RayJob", "spec/backofLimit", 3),
        ("job", "RayJob", "spec/submitterPodTemplate/spec/containers/0/resources/limits", ["cpu"]),
        ("base", "NetworkPolicy", "spec/podselector", {}),
        ("base", "PodDisruptionBudget", "spec/minAvailable", [1]),
        ("base", "PersistentVolumeClaim", "spec/accessMode", ["ReadWriteMany"]),
        ("base", "ServiceAccount", "automountServiceAccountToken", "no"),
        ("kueue", "ClusterQueue", "spec/resourceGroups/0/flavors/0/resources/0/quota", 1),
        ("kueue", "ClusterQueue", "spec/resourceGroups/0/flavors/0/resources/0/nominalQuota", None),
        ("kueue", "LocalQueue", "spec/clusterQueue", "Not A Name"),
        ("kueue", "ResourceFlavor", "spec", {"labels": {}}),
        ("monitoring", "PodMonitor", "spec/podMetricsEndpoints/0/interval", "soon"),
        ("monitoring", "PodMonitor", "spec/selector", None),
    ],
)
def test_schemas_refuse_what_an_api_server_would_refuse_or_drop(name: str, kind: str, path: str, value: Any):
    o = load(name).of_kind(kind)[0]
    validate(o)
    change_at(o, path, value)
    with pytest.raises(jsonschema.ValidationError):
        validate(o)


# ---------------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize("check", RULES)
@pytest.mark.parametrize("name", SETUPS)
def test_every_setup_keeps_every_rule(name: str, check: str):
    assert list(RULES[check](load(name))) == []


BREACHES = yaml.safe_load((DATA / "manifest_breaches.yaml").read_text())


@pytest.mark.parametrize(
    ("check", "breach"),
    [
        pytest.param(c, b, id=f"{c}-{b['in']}-{b['says']}")
        for c, breaches in BREACHES.items()
        for b in breaches
    ],
)
def test_rules_refuse(check: str, breach: dict[str, Any]):
    setup = load(breach["in"])
    (o,) = (o for o in setup.objects if f"{o['kind']}/{o['metadata']['name']}" == breach["of"])
    change_at(o, breach["at"], breach.get("becomes"))
    problems = list(RULES[check](setup))
    assert any(breach["says"] in problem for problem in problems), problems


RUN_BREACHES: list[tuple[str, str, str, str]] = [
    ("the_run_fits_the_cluster", "workers: 8", "workers: 17", "a rank asks 17"),
    ("trainers_and_teachers_keep_apart", "{train_slot: 1}", "{CPU: 1}", "does not ask for train_slot"),
    (
        "trainers_and_teachers_keep_apart",
        "{teacher_slot: 1, l40s: 1}",
        "{l40s: 1}",
        "does not ask for teacher_slot",
    ),
    (
        "runs_are_kept_where_every_node_reaches_them",
        "s3://fusellm-runs",
        "/tmp/runs",
        "does not reach run.storage",
    ),
    (
        "ray_pods_are_let_out_to_the_object_store",
        "s3://fusellm-runs",
        "s3://fusellm-runs?endpoint_override=https://store:9000",
        "is not let out to port 9000",
    ),
]


@pytest.mark.parametrize(("check", "was", "now", "says"), RUN_BREACHES)
def test_rules_refuse_a_run_that_does_not_suit_the_cluster(check: str, was: str, now: str, says: str):
    setup = load("base")
    (run,) = setup.of_kind("ConfigMap")
    assert was in run["data"]["run.yaml"]
    run["data"]["run.yaml"] = run["data"]["run.yaml"].replace(was, now)
    problems = list(RULES[check](setup))
    assert any(says in problem for problem in problems), problems


def test_every_rule_was_seen_to_refuse():
    modules = (rules_operation, rules_resources, rules_security)
    assert {module.__name__ for module in modules} == {check.__module__ for check in RULES.values()}
    assert {*BREACHES, *(breach[0] for breach in RUN_BREACHES)} == set(RULES)


def test_the_example_secrets_hold_no_values():
    for secret in yaml.safe_load_all((KUBERNETES / "secrets.example.yaml").read_text()):
        validate(secret)
        assert set(secret["stringData"].values()) == {""}


# ---------------------------------------------------------------------------------------------- image


def dockerfile() -> list[tuple[str, str]]:
    """Instructions and arguments, lines joined, comments left out."""
    text = re.sub(r"(?m)^\s*#.*\n", "", (ROOT / "deploy" / "Dockerfile").read_text())
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines if line.strip()]


def test_the_image_runs_as_the_pods_user_and_pins_what_it_starts_from():
    steps = dockerfile()
    (user,) = (argument for instruction, argument in steps if instruction == "USER")
    uid, gid = (int(part) for part in user.split(":"))
    for pod in load("job").pods():
        security = pod.spec["securityContext"]
        assert (security["runAsUser"], security["runAsGroup"]) == (uid, gid)
    (base,) = (a.removeprefix("BASE=") for i, a in steps if i == "ARG" and a.startswith("BASE="))
    sources = [argument.split()[0] for instruction, argument in steps if instruction == "FROM"]
    for image in [base, *(source for source in sources if source != "${BASE}")]:
        assert re.search(r":[\w.-]*\d", image), f"{image} has no version"


def test_no_secret_is_asked_for_while_the_image_is_built():
    for instruction, argument in dockerfile():
        assert instruction not in ("ADD",)
        if instruction in ("ARG", "ENV"):
            assert not re.search(r"TOKEN|SECRET|PASSWORD|KEY", argument)
    ignored = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().split()
    assert ignored[0] == "*"  # what is not named below stays out of the build
    assert all((ROOT / kept[1:]).exists() for kept in ignored if kept.startswith("!"))


def test_the_image_installs_extras_of_ours():
    (install,) = (a for i, a in dockerfile() if i == "RUN" and "-r pyproject.toml" in a)
    (default,) = (a.removeprefix("EXTRA=") for i, a in dockerfile() if i == "ARG" and a.startswith("EXTRA="))
    extras = {default, *re.findall(r"--extra ([a-z]+)", install)}
    assert "gpu" in extras
    assert extras <= set(PROJECT["optional-dependencies"])


# --------------------------------------------------------------------------------------------- readme


def test_the_readme_applies_what_is_there_with_commands_of_ours():
    text = (ROOT / "deploy" / "README.md").read_text()
    folders = re.findall(r"-k (deploy/[\w/]+)", text)
    assert {*SETUPS} <= {Path(folder).name for folder in folders}
    for path in [*folders, *re.findall(r"-f (deploy/\S+)", text)]:
        assert (ROOT / path).exists(), path
    for words in re.findall(r"\bfusellm-ray ((?:train|check|export|teachers)[^`\n]*)", text):
        rules_operation.parse_command(["fusellm-ray", *words.split()])
    for key in re.findall(r"secret generic (\S+)", text):
        assert f"name: {key}" in (KUBERNETES / "secrets.example.yaml").read_text()


def test_the_readme_names_every_file_to_edit():
    text = (ROOT / "deploy" / "README.md").read_text()
    for path in KUBERNETES.rglob("*.yaml"):
        if "EDIT" in path.read_text():
            assert f"{path.parent.name}/{path.name}" in text
