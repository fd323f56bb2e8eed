"""Rules on deploy/: whether what is applied would start, be seen, survive and be kept."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import yaml

from fusellm_ray.cli import main
from tests.manifests import KUBERNETES, PROJECT, Pod, Setup, amount, environment, rule, selects

GPU = "nvidia.com/gpu"


@rule
def ray_pods_are_probed(setup: Setup) -> Iterator[str]:
    for pod in setup.ray_pods():
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            # Ray's dashboard agent: raylet, and GCS on the head; needs no token.
            if pod.ray.get(kind, {}).get("httpGet") != {"path": "/api/healthz", "port": 52365}:
                yield f"{pod.name}: no {kind} on the agent's health"


@rule
def budgets_protect_heads_and_trainers_only(setup: Setup) -> Iterator[str]:
    protected = set()
    for budget in setup.of_kind("PodDisruptionBudget"):
        least = budget["spec"].get("minAvailable")
        pods = [pod for pod in setup.pods() if selects(budget["spec"]["selector"], pod)]
        if not isinstance(least, int) or least < sum(pod.max_count for pod in pods):
            yield f"{budget['metadata']['name']}: minAvailable {least} (of pods without a scale, only a number counts)"
        protected |= {pod.labels["app.kubernetes.io/component"] for pod in pods}
    if any(True for _ in setup.clusters()) and protected != {"head", "trainer"}:
        yield f"protected: {sorted(protected)}"


@rule
def only_teachers_may_live_on_spot_nodes(setup: Setup) -> Iterator[str]:
    for pod in setup.ray_pods():
        if not amount(pod.ray["resources"]["limits"].get(GPU, 0)):
            continue
        spot = any("spot" in f"{t.get('key')}{t.get('value')}" for t in pod.spec.get("tolerations", []))
        if spot != (pod.labels["app.kubernetes.io/component"] == "teacher"):
            yield f"{pod.name}: tolerates spot nodes: {spot}"


@rule
def selectors_select(setup: Setup) -> Iterator[str]:
    for o in setup.of_kind("NetworkPolicy", "PodDisruptionBudget", "PodMonitor"):
        selector = o["spec"].get("podSelector") or o["spec"].get("selector")
        pods = [pod for pod in setup.pods() if selects(selector, pod)]
        if not pods:
            yield f"{o['kind']} {o['metadata']['name']} selects no pod"
        ports = [port for pod in pods for port in pod.ray.get("ports", [])]
        for endpoint in o["spec"].get("podMetricsEndpoints", []):
            if endpoint["port"] not in {port["name"] for port in ports}:
                yield f"PodMonitor {o['metadata']['name']}: no container has port {endpoint['port']}"
        if o["kind"] == "NetworkPolicy":
            for opening in o["spec"].get("ingress", []):
                for port in opening.get("ports", []):
                    if port["port"] not in {p["containerPort"] for p in ports}:
                        yield f"NetworkPolicy {o['metadata']['name']}: nothing listens on {port['port']}"


@rule
def what_is_named_exists(setup: Setup) -> Iterator[str]:
    secrets = {
        s["metadata"]["name"]: set(s["stringData"])
        for s in yaml.safe_load_all((KUBERNETES / "secrets.example.yaml").read_text())
    }
    there = {(o["kind"], o["metadata"]["name"]) for o in setup.objects}
    for where, kind, name in _references(setup):
        if kind == "Secret" and name not in secrets:
            yield f"{where}: secret {name} is not in secrets.example.yaml"
        if kind != "Secret" and (kind, name) not in there:
            yield f"{where}: no {kind} {name}"
    for where, container in setup.containers():
        for variable in container.get("env", []):
            key = variable.get("valueFrom", {}).get("secretKeyRef")
            if key and key["key"] not in secrets.get(key["name"], ()):
                yield f"{where}: secrets.example.yaml has no {key['name']}.{key['key']}"
    for _, cluster in setup.clusters():
        if "auth_token" not in secrets.get(cluster.get("authOptions", {}).get("secretName", ""), ()):
            yield "secrets.example.yaml has no auth_token"  # the key that KubeRay reads


@rule
def entrypoints_are_commands_of_ours(setup: Setup) -> Iterator[str]:
    for job in setup.of_kind("RayJob"):
        words = shlex.split(job["spec"]["entrypoint"])
        try:
            paths = parse_command(words)
        except click.ClickException as error:
            yield f"{job['metadata']['name']}: {shlex.join(words)}: {error.format_message()}"
            continue
        heads = [pod for pod in setup.ray_pods() if pod.role == "head"]
        if not heads or not all(_mounted(setup, pod, path) for pod in heads for path in paths):
            yield f"{job['metadata']['name']}: {paths} is not on the head"


@rule
def runs_are_kept_where_every_node_reaches_them(setup: Setup) -> Iterator[str]:
    for name, config in setup.configs().items():
        storage = config.run.storage
        for pod in setup.ray_pods():
            claims = {v["name"] for v in pod.spec.get("volumes", []) if "persistentVolumeClaim" in v}
            shared = [m["mountPath"] for m in pod.ray.get("volumeMounts", []) if m["name"] in claims]
            if not re.match(r"(s3|gs|abfss?)://", storage) and not any(
                storage.startswith(f"{m}/") for m in shared
            ):
                yield f"{name}: {pod.name} does not reach run.storage={storage}"


@rule
def versions_agree(setup: Setup) -> Iterator[str]:
    (ray,) = (re.search(r"==([\d.]+)\.\*", d) for d in PROJECT["dependencies"] if d.startswith("ray["))
    assert ray is not None
    for owner, cluster in setup.clusters():
        if not str(cluster.get("rayVersion")).startswith(f"{ray[1]}."):
            yield f"{owner['metadata']['name']}: rayVersion {cluster.get('rayVersion')}, pyproject.toml has {ray[1]}"
    for where, container in setup.containers():
        image = container.get("image")
        if image is not None and not image.endswith(f"/fusellm-ray:{PROJECT['version']}"):
            yield f"{where}: image {image} is not of version {PROJECT['version']}"


@rule
def the_operators_accept_it(setup: Setup) -> Iterator[str]:
    """What KubeRay 1.7 (utils/validation.go) and Kueue 0.20 (jobs/raycluster/raycluster_webhook.go) refuse."""
    for o in setup.of_kind("RayCluster", "RayJob"):
        name = o["metadata"]["name"]
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", name):
            yield f"{name}: not a name for it"
    for owner, cluster in setup.clusters():
        groups = cluster["workerGroupSpecs"]
        names = [g["groupName"] for g in groups]
        if len(set(names)) < len(names) or len(names) > 7 or {"head", "headgroup"} & set(names):
            yield f"groups {names}"
        for group in [cluster["headGroupSpec"], *groups]:
            params = set(group.get("rayStartParams", {}))
            if group.get("resources") and params & {"num-cpus", "num-gpus", "memory", "resources"}:
                yield f"{group.get('groupName', 'head')}: resources and {sorted(params)} both"
            if "labels" in params or group["template"]["spec"].get("restartPolicy", "Never") != "Never":
                yield f"{group.get('groupName', 'head')}: labels in rayStartParams, or a restartPolicy"
            if "RAY_enable_autoscaler_v2" in environment(group["template"]["spec"]["containers"][0]):
                yield "RAY_enable_autoscaler_v2 is set beside autoscalerOptions.version"
        if (
            cluster.get("enableInTreeAutoscaling")
            and cluster.get("autoscalerOptions", {}).get("version") != "v2"
        ):
            yield f"{owner['metadata']['name']}: not the autoscaler v2"
    for job in setup.of_kind("RayJob"):
        spec, name = job["spec"], job["metadata"]["name"]
        if ("clusterSelector" in spec) == ("rayClusterSpec" in spec):
            yield f"{name}: needs a cluster of its own or a selector of one"
        if spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
            yield f"{name}: ttlSecondsAfterFinished without shutdownAfterJobFinishes"
        if spec["submitterPodTemplate"]["spec"].get("restartPolicy") not in ("Never", "OnFailure"):
            yield f"{name}: the submitter is a Job's pod and needs a restartPolicy"
        if "kueue.x-k8s.io/queue-name" in job["metadata"].get("labels", {}):
            own = spec.get("rayClusterSpec", {})
            if own.get("enableInTreeAutoscaling") or not spec.get("shutdownAfterJobFinishes"):
                yield f"{name}: Kueue wants a fixed cluster that ends with the job"
            if "suspend" in spec:
                yield f"{name}: suspend is Kueue's; a second `kubectl apply` would stop the job"


def _references(setup: Setup) -> Iterator[tuple[str, str, str]]:
    for pod in setup.pods():
        if "serviceAccountName" in pod.spec:
            yield pod.name, "ServiceAccount", pod.spec["serviceAccountName"]
        for volume in pod.spec.get("volumes", []):
            if "configMap" in volume:
                yield pod.name, "ConfigMap", volume["configMap"]["name"]
            if "persistentVolumeClaim" in volume:
                yield pod.name, "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]
            if "secret" in volume:
                yield pod.name, "Secret", volume["secret"]["secretName"]
        for container in pod.spec["containers"]:
            for variable in container.get("env", []):
                if "secretKeyRef" in variable.get("valueFrom", {}):
                    yield pod.name, "Secret", variable["valueFrom"]["secretKeyRef"]["name"]
            for source in container.get("envFrom", []):
                kind = "Secret" if "secretRef" in source else "ConfigMap"
                yield pod.name, kind, (source.get("secretRef") or source["configMapRef"])["name"]
    for _, cluster in setup.clusters():
        yield "authOptions", "Secret", cluster.get("authOptions", {}).get("secretName", "")
    for job in setup.of_kind("RayJob"):
        if "clusterSelector" in job["spec"]:
            yield job["metadata"]["name"], "RayCluster", job["spec"]["clusterSelector"]["ray.io/cluster"]
        if queue := job["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name"):
            yield job["metadata"]["name"], "LocalQueue", queue
    for queue in setup.of_kind("LocalQueue"):
        yield queue["metadata"]["name"], "ClusterQueue", queue["spec"]["clusterQueue"]
    for queue in setup.of_kind("ClusterQueue"):
        for group in queue["spec"]["resourceGroups"]:
            for flavor in group["flavors"]:
                yield queue["metadata"]["name"], "ResourceFlavor", flavor["name"]


def parse_command(words: list[str]) -> list[Path]:
    """The paths that one of our commands is given; click.ClickException if it is none."""
    if words[0] not in PROJECT["scripts"]:
        raise click.UsageError(f"{words[0]} is not installed by this project")
    command: click.Command = main
    context = click.Context(main)
    rest = words[1:]
    while isinstance(command, click.Group):
        name, found, rest = command.resolve_command(context, rest)
        assert found is not None
        command, context = found, click.Context(found, parent=context, info_name=name)
    command.parse_args(context, rest)
    return [value for value in context.params.values() if isinstance(value, Path)]


def _mounted(setup: Setup, pod: Pod, path: Path) -> bool:
    """Whether a ConfigMap puts a file there."""
    volumes = {v["name"]: v["configMap"]["name"] for v in pod.spec.get("volumes", []) if "configMap" in v}
    data = {o["metadata"]["name"]: o["data"] for o in setup.of_kind("ConfigMap")}
    return any(
        Path(mount["mountPath"]) == path.parent and path.name in data.get(volumes.get(mount["name"], ""), {})
        for mount in pod.ray.get("volumeMounts", [])
    )
