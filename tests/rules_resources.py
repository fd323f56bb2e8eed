"""Rules on deploy/: what Ray counts, what containers get, and whether the shipped runs fit."""

from __future__ import annotations

import json
from collections.abc import Iterator

import click
from ray.scripts.scripts import start as ray_start

from fusellm_ray.config import Config
from fusellm_ray.stream.memory import NO_DISK_ENVIRONMENT
from tests.manifests import Pod, Setup, amount, environment, node_types, rule

GPU = "nvidia.com/gpu"


@rule
def containers_have_limits_and_requests(setup: Setup) -> Iterator[str]:
    for where, container in setup.containers():
        resources = container.get("resources", {})
        limits, requests = resources.get("limits", {}), resources.get("requests", {})
        for name in ("cpu", "memory"):
            if name not in limits or name not in requests:
                yield f"{where}: no {name} in its limits and requests"
            elif amount(requests[name]) > amount(limits[name]):
                yield f"{where}: requests more {name} than its limit"
        if limits.get(GPU) != requests.get(GPU):
            yield f"{where}: GPUs requested ({requests.get(GPU)}) differ from the limit ({limits.get(GPU)})"


@rule
def heads_take_no_work(setup: Setup) -> Iterator[str]:
    for owner, cluster in setup.clusters():
        head = node_types(owner, cluster)["headgroup"]["resources"]
        if head["CPU"] != 0 or set(head) - {"CPU", "memory"}:
            yield f"{owner['metadata']['name']}: Ray would place work on the head ({head})"


@rule
def ray_counts_the_gpus_of_the_container(setup: Setup) -> Iterator[str]:
    for owner, cluster in setup.clusters():
        types = node_types(owner, cluster)
        for group in cluster["workerGroupSpecs"]:
            has = amount(group["template"]["spec"]["containers"][0]["resources"]["limits"].get(GPU, 0))
            counted = types[group["groupName"]]["resources"].get("GPU", 0)
            if has != counted:
                yield f"{group['groupName']}: Ray counts {counted} GPUs, the container has {has:g}"


@rule
def ray_starts_with_the_groups_parameters(setup: Setup) -> Iterator[str]:
    for pod in setup.ray_pods():
        # As KubeRay writes the command: ray-operator/controllers/ray/common/pod.go, generateRayStartCommand.
        words = ["--head"] if pod.role == "head" else ["--address=fusellm-head-svc:6379"]
        words += [f"--{name}={value}" for name, value in pod.group.get("rayStartParams", {}).items()]
        resources = {name: float(number) for name, number in pod.group.get("resources", {}).items()}
        words += [f"--resources={json.dumps(resources)}", "--block"]
        try:
            ray_start.make_context("ray start", words)
        except click.ClickException as error:
            yield f"{pod.name}: ray start {' '.join(words)}: {error.format_message()}"


@rule
def replicas_are_ordered(setup: Setup) -> Iterator[str]:
    for _, cluster in setup.clusters():
        for group in cluster["workerGroupSpecs"]:
            numbers = group["minReplicas"], group["replicas"], group["maxReplicas"]
            if not 0 <= numbers[0] <= numbers[1] <= numbers[2] or numbers[2] == 0:
                yield f"{group['groupName']}: min, replicas, max are {numbers}"
            if cluster.get("enableInTreeAutoscaling") and numbers[0] != 0:
                yield f"{group['groupName']}: would keep {numbers[0]} nodes that nobody uses"
            if not cluster.get("enableInTreeAutoscaling") and len(set(numbers)) > 1:
                yield f"{group['groupName']}: without an autoscaler nothing moves between {numbers}"


@rule
def the_run_fits_the_cluster(setup: Setup) -> Iterator[str]:
    for owner, cluster in setup.clusters():
        types = node_types(owner, cluster)
        for name, config in setup.configs().items():
            for actor, asks, number in _actors(config):
                room = sum(
                    types[group]["max_workers"] * _times(asks, types[group]["resources"]) for group in types
                )
                if room < number:
                    yield f"{name}: {actor} asks {number} × {asks}, there is room for {room}"


@rule
def trainers_and_teachers_keep_apart(setup: Setup) -> Iterator[str]:
    for owner, cluster in setup.clusters():
        slots = {"trainer": "train_slot", "teacher": "teacher_slot"}
        types = node_types(owner, cluster)
        for group in cluster["workerGroupSpecs"]:
            role = group["template"]["metadata"]["labels"]["app.kubernetes.io/component"]
            offered = set(types[group["groupName"]]["resources"]) & set(slots.values())
            if offered != {slots[role]}:
                yield f"{group['groupName']}: a {role} offers {sorted(offered)}"
    for name, config in setup.configs().items():
        for actor, asks, _ in _actors(config):
            wants = "train_slot" if actor == "a rank" else "teacher_slot"
            if wants not in asks:
                yield f"{name}: {actor} does not ask for {wants}"


@rule
def object_stores_hold_the_stream_and_fit_shared_memory(setup: Setup) -> Iterator[str]:
    for pod in setup.ray_pods():
        store = pod.group.get("rayStartParams", {}).get("object-store-memory")
        if store is None:
            yield f"{pod.name}: no object-store-memory"
            continue
        # KubeRay sizes /dev/shm by the memory limit, and what lies there counts against it.
        if not 80 << 20 <= int(store) <= amount(pod.ray["resources"]["limits"]["memory"]) / 2:
            yield f"{pod.name}: an object store of {store} bytes against its memory limit"
        for name, config in setup.configs().items():
            # As on a private cluster (job.py), on the nodes where frames are made and where they are read.
            most = config.trainer.workers.max
            ranks = min(most, _slots(pod, "train_slot") or most)
            if pod.role == "worker" and int(store) < 4 * config.stream.in_flight_bytes * ranks:
                yield f"{pod.name}, {name}: an object store of {store} bytes for {ranks} ranks"


@rule
def nothing_spills_to_disk(setup: Setup) -> Iterator[str]:
    for pod in setup.ray_pods():
        env = environment(pod.ray)
        for name, value in NO_DISK_ENVIRONMENT.items():
            if env.get(name) != value:
                yield f"{pod.name}: {name} is {env.get(name)}, not {value}"


@rule
def kueue_quotas_hold_the_job(setup: Setup) -> Iterator[str]:
    flavors = {
        f["metadata"]["name"]: f.get("spec", {}).get("nodeLabels", {})
        for f in setup.of_kind("ResourceFlavor")
    }
    for queue in setup.of_kind("ClusterQueue"):
        (group,) = queue["spec"]["resourceGroups"]
        free: dict[str, dict[str, float]] = {}
        for flavor in group["flavors"]:
            free[flavor["name"]] = {r["name"]: amount(r["nominalQuota"]) for r in flavor["resources"]}
            if list(free[flavor["name"]]) != group["coveredResources"]:
                yield f"{flavor['name']}: its resources are not the covered ones, in their order"
        for pod in setup.pods():
            selected = pod.spec.get("nodeSelector", {})
            needs = {
                name: sum(amount(c["resources"]["requests"].get(name, 0)) for c in pod.spec["containers"])
                * pod.max_count
                for name in group["coveredResources"]
            }
            for flavor, quota in free.items():
                if flavor not in flavors or any(selected.get(k) != v for k, v in flavors[flavor].items()):
                    continue
                if all(quota[name] >= needs[name] for name in needs):
                    quota.update({name: quota[name] - needs[name] for name in needs})
                    break
            else:
                yield f"{pod.name}: no flavor of {queue['metadata']['name']} has {needs} left"


def _actors(config: Config) -> Iterator[tuple[str, dict[str, float], int]]:
    """What the run places, what one of it asks of Ray, and how many there are at least."""
    for teacher in config.active_teachers:
        asks = {
            "CPU": teacher.resources.num_cpus,
            "GPU": teacher.resources.num_gpus,
        } | teacher.resources.custom
        yield teacher.name, {k: v for k, v in asks.items() if v}, teacher.replicas.min
    yield (
        "a rank",
        ({"GPU": 1.0} if config.trainer.use_gpu else {}) | config.trainer.resources_per_worker,
        config.trainer.workers.max,
    )


def _times(asks: dict[str, float], has: dict[str, float]) -> int:
    """How often the resources asked for fit into a node."""
    return min(int(has.get(name, 0) // much) for name, much in asks.items())


def _slots(pod: Pod, name: str) -> int:
    return int(pod.group.get("resources", {}).get(name, 0))
