"""The Kubernetes manifests: rendered as `kubectl apply -k` does, validated strictly, and true to the code."""

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from agent import errors

K8S = Path(__file__).parents[2] / "k8s"
OVERLAYS = ("postgres-pitr", "overlays/minimal", "overlays/with-s3", "overlays/monitored")
OF_OPERATORS = {"PodMonitor", "PrometheusRule"}  # not of Kubernetes itself; promtool checks the rules
OLDEST = "1.29"  # the first with native sidecars switched on
VERSIONS = (OLDEST, kubernetes_validate.latest_version())
NOT_RETRIED = {2, 10, 21, 22, 23, 40, 52}

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


@cache
def rendered(overlay: str) -> list[dict[str, Any]]:
    """Return what `kubectl apply -k` would apply."""
    command = ["kubectl", "kustomize", str(K8S / overlay)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return list(yaml.safe_load_all(text))


def restore_job() -> dict[str, Any]:
    job: dict[str, Any] = yaml.safe_load((K8S / "postgres-pitr" / "restore-job.yaml").read_text())
    return job


def restored_server() -> dict[str, Any]:
    pod: dict[str, Any] = yaml.safe_load((K8S / "postgres-pitr" / "restored-server.yaml").read_text())
    return pod


def pod_specs(documents: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the pod template of each workload, by kind and name."""
    found = {}
    for document in documents:
        spec = document.get("spec", {})
        template = spec.get("jobTemplate", {}).get("spec", spec).get("template", document["kind"] == "Pod" and document)
        if template:
            found[f"{document['kind']}/{document['metadata']['name']}"] = template["spec"]
    return found


def containers(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [*spec.get("initContainers", []), *spec["containers"]]


@needs_kubectl
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_is_valid_in_the_oldest_and_the_newest_kubernetes(overlay: str, version: str) -> None:
    for document in [*rendered(overlay), restore_job(), restored_server()]:
        if document["kind"] in OF_OPERATORS:
            assert document["apiVersion"] == "monitoring.coreos.com/v1"
            continue
        kubernetes_validate.validate(document, version, strict=True)


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_may_run_in_a_restricted_namespace(overlay: str) -> None:
    """The rules of Pod Security's level `restricted`, which the namespace enforces."""
    specs = pod_specs([*rendered(overlay), restore_job(), restored_server()])
    assert "StatefulSet/postgres" in specs
    for name, spec in specs.items():
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault", name
        assert spec["automountServiceAccountToken"] is False, name
        for container in containers(spec):
            confined = container["securityContext"]
            assert confined["allowPrivilegeEscalation"] is False, name
            assert confined["readOnlyRootFilesystem"] is True, name
            assert confined["capabilities"] == {"drop": ["ALL"]}, name
            assert container["resources"]["limits"]["memory"], name
            assert container["resources"]["requests"]["cpu"], name


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_agent_is_a_native_sidecar_that_is_there_before_and_after_postgresql(overlay: str) -> None:
    (agent,) = pod_specs(rendered(overlay))["StatefulSet/postgres"]["initContainers"]
    assert agent["restartPolicy"] == "Always"
    assert agent["startupProbe"]["httpGet"]["path"] == "/startupz"
    assert agent["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert agent["readinessProbe"]["httpGet"]["path"] == "/readyz"


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_a_pod_refers_to_is_there_or_is_a_secret_of_the_users(overlay: str) -> None:
    documents = [*rendered(overlay), restore_job()]
    there = {(document["kind"], document["metadata"]["name"]) for document in documents}
    there |= {("Secret", "s3-credentials"), ("Secret", "postgres-credentials")}
    for name, spec in pod_specs(documents).items():
        for volume in spec.get("volumes", []):
            for kind, field, key in (
                ("PersistentVolumeClaim", "persistentVolumeClaim", "claimName"),
                ("ConfigMap", "configMap", "name"),
            ):
                if field in volume:
                    assert (kind, volume[field][key]) in there, name
        for container in containers(spec):
            mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
            assert mounted <= {volume["name"] for volume in spec.get("volumes", [])}, name
            for source in container.get("envFrom", []):
                kind = "ConfigMap" if "configMapRef" in source else "Secret"
                assert (kind, next(iter(source.values()))["name"]) in there, name


@needs_kubectl
def test_the_monitoring_component_finds_every_agent_and_its_dashboard_is_found() -> None:
    documents = {(each["kind"], each["metadata"]["name"]): each for each in rendered("overlays/monitored")}
    monitor = documents["PodMonitor", "postgres-pitr"]["spec"]
    wanted = monitor["selector"]["matchLabels"].items()
    pods = [documents["StatefulSet", "postgres"]["spec"]["template"], restore_job()["spec"]["template"]]
    for pod in pods:
        assert wanted <= pod["metadata"]["labels"].items()
        ports = {port["name"] for container in containers(pod["spec"]) for port in container.get("ports", [])}
        assert {each["port"] for each in monitor["podMetricsEndpoints"]} <= ports
    dashboard = documents["ConfigMap", "postgres-pitr-dashboard"]
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert dashboard["metadata"]["namespace"] == "summit"


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_agent_and_server_share_what_they_need_and_only_the_agent_has_the_credentials(overlay: str) -> None:
    spec = pod_specs(rendered(overlay))["StatefulSet/postgres"]
    (agent,), (server,) = spec["initContainers"], spec["containers"]
    mounted = [{mount["name"] for mount in container["volumeMounts"]} for container in (agent, server)]
    assert mounted[0] & mounted[1] == {"data", "pitr-socket", "postgres-socket"}
    assert {"secretRef": {"name": "s3-credentials"}} in agent["envFrom"]
    assert all("secretRef" not in source for source in server["envFrom"])


@needs_kubectl
def test_every_pod_is_behind_the_network_policy_and_its_http_port_is_for_the_monitoring_alone() -> None:
    documents = [*rendered("postgres-pitr"), restore_job(), restored_server()]
    (policy,) = [each["spec"] for each in documents if each["kind"] == "NetworkPolicy"]
    wanted = policy["podSelector"]["matchLabels"].items()
    for document in documents:
        spec = document.get("spec", {})
        pod = spec.get("jobTemplate", {}).get("spec", spec).get("template", document)
        assert "containers" not in pod.get("spec", {}) or wanted <= pod["metadata"]["labels"].items()
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    (http,) = [rule for rule in policy["ingress"] if {"port": 9108} in rule["ports"]]
    assert http == {
        "from": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
        "ports": [{"port": 9108}],
    }


def test_a_new_image_restarts_nothing_by_itself() -> None:
    statefulset = yaml.safe_load((K8S / "postgres-pitr" / "statefulset.yaml").read_text())
    assert statefulset["spec"]["updateStrategy"] == {"type": "OnDelete"}


@needs_kubectl
def test_a_second_replica_never_runs_where_the_first_ones_volume_is_mounted() -> None:
    (server,) = [each for each in rendered("postgres-pitr") if each["kind"] == "StatefulSet"]
    template = server["spec"]["template"]
    (rule,) = template["spec"]["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert rule["topologyKey"] == "kubernetes.io/hostname"
    assert rule["labelSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    (claim,) = [each for each in rendered("postgres-pitr") if each["kind"] == "PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]


def test_the_restore_job_is_what_scripts_patch() -> None:
    """The names and places that users' `yq` and `kubectl` lines rely on."""
    job = restore_job()
    assert (job["metadata"]["name"], job["metadata"]["namespace"]) == ("postgres-pitr-restore", "summit")
    spec = job["spec"]["template"]["spec"]
    environment = {each["name"]: each.get("value") for each in spec["containers"][0]["env"]}
    assert environment["PITR_MODE"] == "restore"
    assert {"TARGET_TIME", "BACKUP_NAME", "AUTO_START"} <= set(environment)
    assert {"claimName": "postgres-data"} in [each.get("persistentVolumeClaim") for each in spec["volumes"]]


def test_a_restore_that_cannot_succeed_is_not_tried_again() -> None:
    """Every code is one that the agent exits with, and what passes by itself is tried again."""
    (codes,) = [
        rule["onExitCodes"]["values"]
        for rule in restore_job()["spec"]["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    ]
    known = {
        kind.exit_code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.AgentError)
    }
    assert set(codes) == NOT_RETRIED
    assert set(codes) - {2} <= known
    assert not set(codes) & {errors.RepositoryUnavailable.exit_code, errors.PostgresError.exit_code}


@needs_kubectl
def test_the_drill_restores_onto_a_volume_of_its_own_and_is_left_out_where_there_is_little_room() -> None:
    spec = pod_specs(rendered("postgres-pitr"))["CronJob/postgres-pitr-drill"]
    assert spec["containers"][0]["command"] == ["pitr", "drill"]
    assert not [volume for volume in spec["volumes"] if "persistentVolumeClaim" in volume]
    for overlay in ("overlays/minimal", "overlays/with-s3"):
        assert "CronJob/postgres-pitr-drill" not in pod_specs(rendered(overlay))


def test_every_setting_in_the_manifests_is_documented() -> None:
    documented = (K8S.parent / "docs" / "settings.md").read_text()
    (config,) = yaml.safe_load_all((K8S / "postgres-pitr" / "configmap.yaml").read_text())
    named = {each["name"] for each in restore_job()["spec"]["template"]["spec"]["containers"][0]["env"]}
    for name in {*config["data"], *named}:
        assert re.search(rf"`{name}`", documented), name
