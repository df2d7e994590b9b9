"""What single values of the chart become: GPUs, nodes, volumes, queues, schedules and what is Kubernetes' own."""

import json
import socket
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from helm_chart import (
    CHART,
    Object,
    container_of,
    environment_of,
    is_hook,
    job_spec,
    of_kind,
    only,
    parse,
    pod_of,
    render,
    run_of,
    template,
    values_with,
)

from job.arguments import Command, parse_command
from job.nodes.node import find_node
from job.settings_groups import ParallelSettings


def example(name: str) -> Path:
    return CHART / "ci" / f"{name}-values.yaml"


def test_one_gpu() -> None:
    container = container_of(render(example("one-gpu")))
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "args" not in container


def test_gpus_of_another_name_product_and_number() -> None:
    gpu = {"count": 8, "resourceName": "nvidia.com/mig-3g.40gb", "product": "NVIDIA-H100", "toleration": True}
    objects = render(values_with(gpu=gpu))
    assert container_of(objects)["resources"]["limits"] == {"nvidia.com/mig-3g.40gb": 8}
    assert pod_of(objects)["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H100"}
    [toleration] = pod_of(objects)["tolerations"]
    assert toleration == {"key": "nvidia.com/mig-3g.40gb", "operator": "Exists", "effect": "NoSchedule"}


def test_without_gpus_nothing_asks_for_one() -> None:
    objects = render(values_with(gpu={"count": 0}))
    assert "limits" not in container_of(objects)["resources"]
    assert not {"tolerations", "nodeSelector"} & set(pod_of(objects))


def test_a_check_needs_no_gpu_and_one_pod_whatever_the_run_needs() -> None:
    gpu = {"count": 8, "memoryGiB": 40, "product": "NVIDIA-H100"}
    objects = render(values_with(mode="check", gpu=gpu, settings={"parallel": {"nodes": 4}}))
    assert parse_command(container_of(objects)["args"]) == Command("check", gpus=(8, 40))
    assert "limits" not in container_of(objects)["resources"]
    assert "nodeSelector" not in pod_of(objects)
    # The user's own node selector may lead to nodes with GPUs, and these keep others away.
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod_of(objects)["tolerations"]
    assert "completionMode" not in job_spec(only(objects, "Job"))
    assert of_kind(objects, "Service") == []


def nodes_of(objects: list[Object], monkeypatch: pytest.MonkeyPatch, index: int, hostname: str, service: str) -> str:
    """Return where pod number `index` looks for node 0, by its own name in the cluster's DNS."""
    environment = environment_of(container_of(objects))
    monkeypatch.setenv("JOB_COMPLETION_INDEX", str(index))
    monkeypatch.setattr(socket, "getfqdn", lambda: f"{hostname}.{service}.space.svc.cluster.local")
    return find_node(ParallelSettings.model_validate_json(environment["SFT_PARALLEL"])).host


def test_several_nodes_find_each_other_behind_a_headless_service(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = render(example("many-nodes"))
    job, service = only(objects, "Job"), only(objects, "Service")
    spec = job["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] > 1
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()
    [check] = [found for found in parse(template(example("many-nodes"))) if is_hook(found)]
    assert not service["spec"]["selector"].items() <= check["metadata"]["labels"].items()

    name, subdomain = job["metadata"]["name"], service["metadata"]["name"]
    found = nodes_of(objects, monkeypatch, 1, f"{name}-1", subdomain)
    assert found == f"{name}-0.{subdomain}.space.svc.cluster.local"


def test_a_jobsets_nodes_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = render(values_with(kind="JobSet", settings={"parallel": {"nodes": 2}}))
    jobset = only(objects, "JobSet")
    spec, [replicated] = jobset["spec"], jobset["spec"]["replicatedJobs"]
    assert of_kind(objects, "Job") == []
    assert of_kind(objects, "Service") == []  # JobSet makes one, named like itself
    assert spec["network"]["enableDNSHostnames"] is True
    assert replicated["replicas"] == 1
    assert (job_spec(jobset)["completions"], job_spec(jobset)["completionMode"]) == (2, "Indexed")
    assert job_spec(jobset)["backoffLimit"] == 0  # whatever fails restarts all nodes

    name = jobset["metadata"]["name"]
    found = nodes_of(objects, monkeypatch, 1, f"{name}-{replicated['name']}-0-1", name)
    assert found == f"{name}-{replicated['name']}-0-0.{name}.space.svc.cluster.local"


@pytest.mark.parametrize("nodes", [1, 3])
def test_each_node_may_fail_as_often(nodes: int) -> None:
    per_node = job_spec(only(render(values_with()), "Job"))["backoffLimit"]
    spec = job_spec(only(render(values_with(settings={"parallel": {"nodes": nodes}})), "Job"))
    assert spec["backoffLimit"] == per_node * nodes > 0
    assert "activeDeadlineSeconds" not in spec


def test_a_queue_is_a_label_on_what_kueue_looks_at() -> None:
    for kind in ("Job", "JobSet"):
        run = only(render(values_with(kind=kind, kueue={"queueName": "team-a"})), kind)
        assert run["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
    assert "kueue.x-k8s.io/queue-name" not in only(render(values_with()), "Job")["metadata"]["labels"]


def test_a_schedule_makes_a_cron_job_whose_runs_do_not_overlap() -> None:
    objects = render(example("scheduled"))
    cron = only(objects, "CronJob")
    assert of_kind(objects, "Job") == []
    assert cron["spec"]["concurrencyPolicy"] == "Forbid"
    assert "{run_id}" in environment_of(container_of(objects))["SFT_OUTPUT"]


def test_secrets_come_by_reference() -> None:
    extra = [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}]
    more = [{"configMapRef": {"name": "proxy"}}]
    container = container_of(render(values_with(existingSecret="s3", extraEnv=extra, extraEnvFrom=more)))
    assert container["envFrom"] == [{"secretRef": {"name": "s3"}}, {"configMapRef": {"name": "proxy"}}]
    assert extra[0] in container["env"]


@pytest.mark.parametrize("kind", ["workDir", "modelCache"])
def test_volumes_of_each_type(kind: str) -> None:
    name = {"workDir": "work", "modelCache": "model-cache"}[kind]

    def volume(**values: Any) -> Object:
        objects = render(values_with(**{kind: {"size": "7Gi", **values}}))
        [found] = [volume for volume in pod_of(objects)["volumes"] if volume["name"] == name]
        return {**found, "claims": of_kind(objects, "PersistentVolumeClaim")}

    assert volume(type="emptyDir")["emptyDir"] == {"sizeLimit": "7Gi"}
    ephemeral = volume(type="ephemeral", storageClassName="fast")["ephemeral"]["volumeClaimTemplate"]["spec"]
    assert ephemeral["storageClassName"] == "fast"
    assert ephemeral["resources"]["requests"]["storage"] == "7Gi"
    assert volume(type="pvc", existingClaim="mine")["persistentVolumeClaim"] == {"claimName": "mine"}
    assert volume(type="pvc", existingClaim="mine")["claims"] == []
    [claim] = volume(type="pvc")["claims"]
    assert claim["spec"]["resources"]["requests"]["storage"] == "7Gi"
    assert volume(type="pvc")["persistentVolumeClaim"] == {"claimName": claim["metadata"]["name"]}


def test_a_model_cache_is_where_the_hub_puts_models() -> None:
    container = container_of(render(values_with(modelCache={"type": "emptyDir"})))
    [place] = [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "model-cache"]
    assert Path(environment_of(container)["HF_HOME"]).is_relative_to(place)


def test_what_is_kubernetes_own_is_passed_on() -> None:
    spread = [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}]
    objects = render(
        values_with(
            nodeSelector={"pool": "gpu"},
            affinity={"nodeAffinity": {}},
            tolerations=[{"key": "spot", "operator": "Exists"}],
            topologySpreadConstraints=spread,
            priorityClassName="high",
            runtimeClassName="nvidia",
            imagePullSecrets=[{"name": "registry"}],
            podLabels={"team": "a"},
            podAnnotations={"note": "x: 'y' \"z\""},
            labels={"cost": "1"},
            annotations={"why": "100"},
            extraVolumes=[{"name": "ca", "configMap": {"name": "ca"}}],
            extraVolumeMounts=[{"name": "ca", "mountPath": "/etc/ca"}],
            initContainers=[{"name": "first", "image": "busybox"}],
            sidecars=[{"name": "beside", "image": "busybox"}],
            extraObjects=[
                {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "one"}},
                "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: two}\ndata: {t: '{{ .x }}'}\n",
            ],
            serviceAccount={"annotations": {"eks.amazonaws.com/role-arn": "arn"}},
        )
    )
    run, pod = run_of(objects), pod_of(objects)
    assert pod["nodeSelector"] == {"pool": "gpu"}
    assert pod["affinity"] == {"nodeAffinity": {}}
    assert {"key": "spot", "operator": "Exists"} in pod["tolerations"]
    assert pod["topologySpreadConstraints"] == spread
    assert (pod["priorityClassName"], pod["runtimeClassName"]) == ("high", "nvidia")
    assert pod["imagePullSecrets"] == [{"name": "registry"}]
    assert job_spec(run)["template"]["metadata"]["labels"]["team"] == "a"
    assert job_spec(run)["template"]["metadata"]["annotations"] == {"note": "x: 'y' \"z\""}
    assert run["metadata"]["labels"]["cost"] == "1"
    assert run["metadata"]["annotations"] == {"why": "100"}
    assert {"name": "ca", "mountPath": "/etc/ca"} in container_of(objects)["volumeMounts"]
    [first, beside] = pod["initContainers"]
    assert "restartPolicy" not in first
    assert beside == {"name": "beside", "image": "busybox", "restartPolicy": "Always"}
    assert [found["metadata"]["name"] for found in of_kind(objects, "ConfigMap")] == ["one", "two"]
    assert of_kind(objects, "ConfigMap")[1]["data"] == {"t": "{{ .x }}"}
    account = only(objects, "ServiceAccount")
    assert account["metadata"]["annotations"] == {"eks.amazonaws.com/role-arn": "arn"}
    assert pod["serviceAccountName"] == account["metadata"]["name"]


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_network_policy_lets_only_nodes_of_one_run_talk(nodes: int) -> None:
    objects = render(values_with(networkPolicy={"enabled": True}, settings={"parallel": {"nodes": nodes}}))
    policy = only(objects, "NetworkPolicy")["spec"]
    labels = job_spec(run_of(objects))["template"]["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    ports = {port["port"] for rule in policy["egress"] if "to" not in rule for port in rule["ports"]}
    assert ports == {53, 443}
    assert len(policy["ingress"] or []) == nodes - 1
    for rule in policy["ingress"] or []:
        [peer] = rule["from"]
        assert peer["podSelector"]["matchLabels"].items() <= labels.items()
    kubernetes_validate.validate(only(objects, "NetworkPolicy"), "1.29", strict=True)


def test_prometheus_finds_the_metrics_where_the_job_serves_them() -> None:
    settings = {"runtime": {"metrics_port": 9400}}
    objects = render(values_with(podMonitor={"enabled": True, "interval": "30s"}, settings=settings))
    monitor, pods = only(objects, "PodMonitor")["spec"], job_spec(only(objects, "Job"))["template"]
    [port] = container_of(objects)["ports"]
    assert json.loads(environment_of(container_of(objects))["SFT_RUNTIME"])["metrics_port"] == port["containerPort"]
    assert monitor["podMetricsEndpoints"] == [{"port": port["name"], "interval": "30s"}]
    assert monitor["selector"]["matchLabels"].items() <= pods["metadata"]["labels"].items()


def test_grafana_finds_the_dashboard_where_it_is_asked_for() -> None:
    wanted = {"enabled": True, "namespace": "monitoring", "annotations": {"grafana_folder": "Training"}}
    wanted["labels"] = {"team": "ml"}
    [dashboard] = of_kind(render(values_with(dashboard=wanted)), "ConfigMap")
    assert dashboard["metadata"]["namespace"] == "monitoring"
    assert dashboard["metadata"]["labels"].items() >= {"grafana_dashboard": "1", "team": "ml"}.items()
    assert dashboard["metadata"]["annotations"] == {"grafana_folder": "Training"}
    assert dashboard["data"] == {"sft-job.json": (CHART / "dashboards" / "sft-job.json").read_text()}
    kubernetes_validate.validate(dashboard, "1.29", strict=True)
    assert not of_kind(render(values_with()), "ConfigMap")


def test_the_image_is_that_of_the_chart_unless_told_otherwise() -> None:
    from job import __version__

    digest = f"sha256:{'0' * 64}"
    assert container_of(render(values_with()))["image"] == f"sft-job:{__version__}"
    assert container_of(render(values_with(image={"repository": "r.io/x", "tag": "v"})))["image"] == "r.io/x:v"
    assert container_of(render(values_with(image={"tag": "v", "digest": digest})))["image"] == f"sft-job@{digest}"
