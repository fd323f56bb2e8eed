"""Rules on deploy/: who may do what, and who may reach whom."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from urllib.parse import parse_qs, urlsplit

from tests.manifests import Setup, rule, selects


@rule
def containers_are_restricted(setup: Setup) -> Iterator[str]:
    """Kubernetes' pod security standard "restricted", which the namespace enforces."""
    for pod in setup.pods():
        security = pod.spec.get("securityContext", {})
        if not security.get("runAsNonRoot") or not security.get("runAsUser") or pod.spec.get("hostNetwork"):
            yield f"{pod.name}: may run as root, or on the node's network"
    for where, container in setup.containers():
        security = container.get("securityContext", {})
        if (
            security.get("allowPrivilegeEscalation") is not False
            or security.get("runAsNonRoot") is not True
            or security.get("runAsUser") == 0
            or security.get("capabilities") != {"drop": ["ALL"]}
            or security.get("seccompProfile") != {"type": "RuntimeDefault"}
        ):
            yield f"{where}: not restricted ({security})"
    for namespace in setup.of_kind("Namespace"):
        if namespace["metadata"]["labels"].get("pod-security.kubernetes.io/enforce") != "restricted":
            yield "the namespace does not enforce it"


@rule
def clusters_ask_for_the_token(setup: Setup) -> Iterator[str]:
    for owner, cluster in setup.clusters():
        auth = cluster.get("authOptions", {})
        if auth.get("mode") != "token" or not auth.get("secretName"):
            yield f"{owner['metadata']['name']}: authOptions are {auth}"


@rule
def no_secret_is_written_down(setup: Setup) -> Iterator[str]:
    for o in setup.of_kind("Secret"):
        yield f"Secret {o['metadata']['name']} is part of the manifests"
    for where, container in setup.containers():
        for variable in container.get("env", []):
            if re.search(r"TOKEN|SECRET|PASSWORD|KEY", variable["name"]) and "value" in variable:
                yield f"{where}: {variable['name']} has a value"
    text = json.dumps(setup.objects)
    for kind, pattern in (
        ("Hugging Face", r"\bhf_\w{20,}"),
        ("AWS", r"\bAKIA\w{16}"),
        ("PEM", r"BEGIN \w* ?PRIVATE"),
    ):
        if re.search(pattern, text):
            yield f"a {kind} key"


@rule
def only_heads_with_an_autoscaler_reach_the_api_server(setup: Setup) -> Iterator[str]:
    for pod in setup.pods():
        may = pod.spec.get("automountServiceAccountToken", True)
        if may and not (pod.role == "head" and pod.cluster.get("enableInTreeAutoscaling")):
            yield f"{pod.name}: mounts a service account's token and has no use for it"


@rule
def network_policies_cover_every_pod(setup: Setup) -> Iterator[str]:
    for pod in setup.pods():
        types = {
            direction
            for policy in setup.of_kind("NetworkPolicy")
            if selects(policy["spec"]["podSelector"], pod)
            for direction in policy["spec"]["policyTypes"]
        }
        if types != {"Ingress", "Egress"}:
            yield f"{pod.name}: its {sorted({'Ingress', 'Egress'} - types)} is not limited"
    for policy in setup.of_kind("NetworkPolicy"):
        name = policy["metadata"]["name"]
        for opening in policy["spec"].get("ingress", []):
            if not opening.get("from") or any("ipBlock" in peer for peer in opening["from"]):
                yield f"{name}: lets in whoever comes"
        for opening in policy["spec"].get("egress", []):
            if not opening.get("to") and not opening.get("ports"):
                yield f"{name}: lets out to everywhere"
    allowed = {
        port["port"]
        for policy in setup.of_kind("NetworkPolicy")
        for opening in policy["spec"].get("egress", [])
        for port in opening.get("ports", [])
    }
    for needed, port in (("DNS", 53), ("the API server, the hub and the bucket", 443)):
        if port not in allowed:
            yield f"no way out to {needed}"


@rule
def ray_pods_are_let_out_to_the_object_store(setup: Setup) -> Iterator[str]:
    for name, config in setup.configs().items():
        storage = urlsplit(config.run.storage)
        if not storage.scheme:  # a volume
            continue
        endpoint = parse_qs(storage.query).get("endpoint_override", ["https://"])[0]
        address = urlsplit(endpoint if "://" in endpoint else f"https://{endpoint}")
        port = address.port or {"http": 80, "https": 443}[address.scheme]
        for pod in setup.ray_pods():
            ways_out = [
                opening
                for policy in setup.of_kind("NetworkPolicy")
                if selects(policy["spec"]["podSelector"], pod)
                for opening in policy["spec"].get("egress", [])
            ]
            if not any(p["port"] == port for o in ways_out if not o.get("to") for p in o["ports"]):
                yield f"{name}: {pod.name} is not let out to port {port} of run.storage={config.run.storage}"
