"""The manifests of deploy/ as `kubectl apply -k` applies them, the pods that KubeRay makes of them, and the rules."""

from __future__ import annotations

import copy
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.kuberay.utils import parse_quantity

from fusellm_ray.config import Config
from fusellm_ray.config_file import parse_config

KUBERNETES = Path(__file__).parent.parent / "deploy" / "kubernetes"

PROJECT = tomllib.loads((KUBERNETES.parent.parent / "pyproject.toml").read_text())["project"]

SETUPS = {
    "base": ["base"],
    "job": ["overlays/job"],
    "kueue": ["overlays/kueue"],
    "local": ["overlays/local"],
    "teachers": ["overlays/teachers"],
    "attached": ["overlays/teachers", "overlays/attached"],
    "monitoring": ["base", "monitoring"],
}
"""What is applied together, by name."""


@dataclass(frozen=True)
class Pod:
    """One kind of pod in a setup."""

    name: str
    role: str
    """head, worker or submitter."""
    labels: dict[str, str]
    spec: dict[str, Any]
    max_count: int
    group: dict[str, Any]
    """The head's or the worker group's spec; empty for submitters."""
    cluster: dict[str, Any]
    """The RayCluster's spec; empty for submitters."""

    @property
    def ray(self) -> dict[str, Any]:
        """The container that runs Ray, or submits."""
        return self.spec["containers"][0]


class Setup:
    """The objects of one setup."""

    def __init__(self, objects: list[dict[str, Any]]) -> None:
        self.objects = objects

    def of_kind(self, *kinds: str) -> list[dict[str, Any]]:
        return [o for o in self.objects if o["kind"] in kinds]

    def clusters(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Each RayCluster's spec with the object that holds it."""
        for o in self.of_kind("RayCluster", "RayJob"):
            if o["kind"] == "RayCluster":
                yield o, o["spec"]
            elif "rayClusterSpec" in o["spec"]:
                yield o, o["spec"]["rayClusterSpec"]

    def pods(self) -> Iterator[Pod]:
        """The pods that KubeRay would make, with the labels that it gives them.

        Source: KubeRay 1.7, ray-operator/controllers/ray/common/pod.go, labelPod.
        """
        for owner, cluster in self.clusters():
            head = cluster["headGroupSpec"]
            groups = [
                ("headgroup", "head", head),
                *((g["groupName"], "worker", g) for g in _workers(cluster)),
            ]
            for name, role, group in groups:
                template = group["template"]
                labels = {
                    "app.kubernetes.io/name": "kuberay",
                    "app.kubernetes.io/created-by": "kuberay-operator",
                    **template.get("metadata", {}).get("labels", {}),
                    **group.get("labels", {}),
                    "ray.io/is-ray-node": "yes",
                    "ray.io/cluster": owner["metadata"]["name"],
                    "ray.io/node-type": role,
                    "ray.io/group": name,
                }
                count = group["maxReplicas"] if role == "worker" else 1
                where = f"{owner['metadata']['name']}/{name}"
                yield Pod(where, role, labels, template["spec"], count, group, cluster)
        for job in self.of_kind("RayJob"):
            template = job["spec"]["submitterPodTemplate"]
            labels = template.get("metadata", {}).get("labels", {})
            yield Pod(
                f"{job['metadata']['name']}/submitter", "submitter", labels, template["spec"], 1, {}, {}
            )

    def ray_pods(self) -> Iterator[Pod]:
        return (pod for pod in self.pods() if pod.role != "submitter")

    def containers(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every container whose settings are ours, the autoscaler's among them."""
        for pod in self.pods():
            for container in pod.spec["containers"]:
                yield f"{pod.name}/{container['name']}", container
        for owner, cluster in self.clusters():
            if cluster.get("enableInTreeAutoscaling"):
                yield f"{owner['metadata']['name']}/autoscaler", cluster.get("autoscalerOptions", {})

    def configs(self) -> dict[str, Config]:
        """Every run's configuration that a ConfigMap holds, by the ConfigMap's name."""
        return {
            o["metadata"]["name"]: parse_config(
                yaml.safe_load(o["data"]["run.yaml"]), where=o["metadata"]["name"]
            )
            for o in self.of_kind("ConfigMap")
            if "run.yaml" in o["data"]
        }


def _workers(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return cluster.get("workerGroupSpecs", [])


def load(name: str) -> Setup:
    """A fresh copy of the setup's objects; skips where nothing can render them."""
    return copy.deepcopy(_load(name))


@cache
def _load(name: str) -> Setup:
    objects: dict[tuple[str, str], dict[str, Any]] = {}
    for folder in SETUPS[name]:
        for o in yaml.safe_load_all(_render(folder)):
            objects[o["kind"], o["metadata"]["name"]] = o
    return Setup(list(objects.values()))


@cache
def _render(folder: str) -> str:
    for command in (["kubectl", "kustomize"], ["kustomize", "build"]):
        if shutil.which(command[0]):
            done = subprocess.run([*command, KUBERNETES / folder], capture_output=True, text=True)
            assert done.returncode == 0, f"{folder}: {done.stderr}"
            return done.stdout
    pytest.skip("neither kubectl nor kustomize is installed: deploy/'s manifests cannot be rendered")


RULES: dict[str, Callable[[Setup], Iterator[str]]] = {}
"""What must hold and no schema can say; each yields the problems it sees."""


def rule(check: Callable[[Setup], Iterator[str]]) -> Callable[[Setup], Iterator[str]]:
    RULES[check.__name__] = check
    return check


def amount(quantity: Any) -> float:
    return float(parse_quantity(str(quantity)))


def node_types(owner: dict[str, Any], cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What Ray's own autoscaler reads from the cluster: resources and numbers of each group's nodes."""
    cr = {"metadata": {"name": owner["metadata"]["name"], "namespace": "fusellm"}, "spec": cluster}
    return _derive_autoscaling_config_from_ray_cr(cr)["available_node_types"]


def environment(container: dict[str, Any]) -> dict[str, str | None]:
    return {v["name"]: v.get("value") for v in container.get("env", [])}


def selects(selector: dict[str, Any], pod: Pod) -> bool:
    return all(pod.labels.get(k) == v for k, v in selector["matchLabels"].items())
