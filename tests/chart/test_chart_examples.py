"""Every values file of the chart becomes valid Kubernetes objects, by Helm 4 and Helm 3, that say what they must."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from helm_chart import (
    CHART,
    CI_FILES,
    HELMS,
    Object,
    environment_of,
    is_hook,
    job_spec,
    of_kind,
    parse,
    pod_of,
    render,
    run_helm,
    run_of,
    template,
    values_with,
)

from job.arguments import parse_command
from job.errors import EXIT_CODES

OLDEST, NEWEST = "1.29", "1.37"
WITHOUT_SCHEMA = ("JobSet", "PodMonitor")  # of resources that Kubernetes itself doesn't have
QUANTITY = re.compile(r"([0-9]+(\.[0-9]+)?|\.[0-9]+)(m|k|[MGTPE]|[KMGTPE]i|[eE][0-9]+)?")
SECRET = re.compile(r"(secret_access_key|session_token|hf_token|_token|password)$", re.IGNORECASE)
ci_files = pytest.mark.parametrize("path", CI_FILES, ids=lambda path: path.name.removesuffix("-values.yaml"))


@cache
def everything(path: Path, helm: str = "helm 4") -> list[Object]:
    return parse(template(path, program=HELMS[helm]()))


def released(path: Path) -> list[Object]:
    return [found for found in everything(path) if not is_hook(found)]


def pods_in(objects: list[Object]) -> list[Object]:
    """Return the specs of all pods: of the run and of `helm test`."""
    specs = [pod_of([found for found in objects if not is_hook(found)])]
    return specs + [found["spec"] for found in objects if is_hook(found)]


def containers_in(objects: list[Object]) -> list[Object]:
    return [container for pod in pods_in(objects) for container in pod["containers"] if container["name"] == "sft-job"]


def each_value(tree: Any, *names: str) -> list[Any]:
    """Return what stands under these names, anywhere in a tree."""
    if isinstance(tree, list):
        return [found for part in tree for found in each_value(part, *names)]
    if not isinstance(tree, dict):
        return []
    return [
        found for name, part in tree.items() for found in ([part] if name in names else []) + each_value(part, *names)
    ]


def test_there_is_a_values_file_for_each_way_to_train() -> None:
    names = {path.name.removesuffix("-values.yaml") for path in CI_FILES}
    assert {"one-gpu", "many-gpus", "many-nodes", "qlora", "air-gapped", "kueue", "spot", "check", "scheduled"} <= names


@pytest.mark.parametrize("helm", HELMS)
@ci_files
def test_it_passes_helms_own_lint(path: Path, helm: str) -> None:
    code, out, problems = run_helm("lint", "--strict", CHART, "--values", path, program=HELMS[helm]())
    assert code == 0, out + problems
    assert "0 chart(s) failed" in out


@ci_files
def test_both_helms_make_the_same_of_it(path: Path) -> None:
    assert everything(path, "helm 3") == everything(path, "helm 4")


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@ci_files
def test_kubernetes_schemas_hold_strictly(path: Path, version: str) -> None:
    for found in everything(path):
        if found["kind"] not in WITHOUT_SCHEMA:
            kubernetes_validate.validate(found, version, strict=True)
        elif found["kind"] == "JobSet":  # what it repeats is a Job
            job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {}, "spec": job_spec(found)}
            kubernetes_validate.validate(job, version, strict=True)


@ci_files
def test_what_these_schemas_miss_holds_too(path: Path) -> None:
    objects = everything(path)
    for pod in pods_in(objects):
        assert pod["restartPolicy"] == "Never"
        volumes = [volume["name"] for volume in pod["volumes"]]
        assert len(volumes) == len(set(volumes))
        for container in pod["containers"] + pod.get("initContainers", []):
            names = [variable["name"] for variable in container.get("env", [])]
            assert len(names) == len(set(names))
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= set(volumes)
    resources = [amount for part in each_value(objects, "requests", "limits") for amount in part.values()]
    for amount in resources + each_value(objects, "sizeLimit", "storage"):
        assert QUANTITY.fullmatch(str(amount)), amount
    named = [(found["kind"], found["metadata"]["name"]) for found in objects]
    assert len(named) == len(set(named))


@ci_files
def test_pods_have_no_rights_that_they_do_not_need(path: Path) -> None:
    for pod in pods_in(everything(path)):
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False  # a Service named sft-... would become an unknown setting
        security = pod["securityContext"]
        assert (security["runAsNonRoot"], security["runAsUser"], security["fsGroup"]) == (True, 10001, 10001)
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not any(name in pod for name in ("hostNetwork", "hostPID", "hostIPC"))
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


@ci_files
def test_what_the_job_writes_to_is_a_volume(path: Path) -> None:
    for container in containers_in(everything(path)):
        mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert {"/workdir", "/dev/shm"} <= mounted
        hub_cache = environment_of(container).get("HF_HOME", "/workdir")
        assert any(Path(hub_cache).is_relative_to(place) for place in mounted)
    for pod in pods_in(everything(path)):
        [shm] = [volume for volume in pod["volumes"] if volume["name"] == "shm"]
        assert shm["emptyDir"]["medium"] == "Memory"
        assert shm["emptyDir"]["sizeLimit"]


@ci_files
def test_exit_codes_decide_on_a_retry_as_the_table_says(path: Path) -> None:
    spec = job_spec(run_of(released(path)))
    assert spec["podReplacementPolicy"] == "Failed"  # two pods would fight over the output's lease
    rules = spec["podFailurePolicy"]["rules"]
    decisions: dict[int, str] = {}
    for rule in rules:
        codes = rule.get("onExitCodes", {})
        assert codes.get("containerName", "sft-job") == "sft-job"
        assert codes.get("operator", "In") == "In"
        for code in codes.get("values", []):
            decisions.setdefault(code, rule["action"])
    stopped = "FailJob" if run_of(released(path))["kind"] == "JobSet" else "Ignore"  # a JobSet starts all nodes anew
    expected = {"fail": "FailJob", "retry_uncounted": stopped}
    assert decisions == {code.code: expected[code.retry] for code in EXIT_CODES if code.retry in expected}
    [disrupted] = [rule for rule in rules if "onPodConditions" in rule]
    assert disrupted == {
        "action": stopped,
        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    }
    assert rules.index(disrupted) > 0  # a verdict of the job's own comes before it


@ci_files
def test_the_job_knows_how_long_it_may_take_to_stop(path: Path) -> None:
    for pod, container in zip(pods_in(everything(path)), containers_in(everything(path)), strict=True):
        granted = environment_of(container)["SFT_RUNTIME__GRACE_SECONDS"]
        assert float(granted) == pod["terminationGracePeriodSeconds"] >= 30


@ci_files
def test_a_finished_run_stays(path: Path) -> None:
    """GitOps would train again what is gone; a CronJob's runs are another matter, for it makes them itself."""
    run = run_of(released(path))
    assert run["kind"] == "CronJob" or each_value(run, "ttlSecondsAfterFinished") == []


@ci_files
def test_nothing_is_suspended_by_the_chart_itself(path: Path) -> None:
    assert "suspend" not in job_spec(run_of(released(path)))  # Kueue's to set


@ci_files
def test_no_secret_stands_in_what_is_rendered(path: Path) -> None:
    for variable in [variable for container in containers_in(everything(path)) for variable in container["env"]]:
        assert not (SECRET.search(variable["name"]) and "value" in variable)
    assert of_kind(everything(path), "Secret") == []


@ci_files
def test_the_run_asks_for_its_gpus_and_a_check_for_none(path: Path) -> None:
    objects = everything(path)
    [run, *tests] = [pod["containers"] for pod in pods_in(objects)]
    for container in [container for containers in tests for container in containers]:
        assert not any("/" in name for name in container["resources"].get("limits", {}))
        assert parse_command(container["args"]).name == "check"
    checks = parse_command(run[0].get("args", [])).name == "check"
    gpus = {name: amount for name, amount in run[0]["resources"].get("limits", {}).items() if "/" in name}
    assert bool(gpus) != checks
    assert {"cpu", "memory"} <= set(run[0]["resources"]["requests"])  # queues and schedulers count these


@pytest.mark.parametrize("path", [None, *CI_FILES], ids=lambda path: path.name if path else "least")
def test_notes_say_how_to_follow_the_run(path: Path | None) -> None:
    values = values_with() if path is None else None
    arguments = ["install", "demo", CHART, "--dry-run=client", "--namespace", "space"]
    arguments += ["--values", path] if path else []
    code, out, problems = run_helm(*arguments, values=values)
    if path and "jobset" in path.name:
        assert "this cluster has no jobset.x-k8s.io/v1alpha2" in problems
        return
    assert code == 0, problems
    notes = out.partition("NOTES:")[2]
    run = run_of(render(path or values))
    assert run["metadata"]["name"] in notes
    assert "--namespace space" in notes or "-n space" in notes
    for row in EXIT_CODES:
        assert re.search(rf"\b{row.code}\b", notes), f"{row.code} is not explained"
