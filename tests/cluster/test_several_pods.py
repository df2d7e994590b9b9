"""Runs of several nodes as an Indexed Job and as a JobSet."""

from collections.abc import Iterator

import pytest
from kubernetes import Namespace, Object, condition, run_kubectl, wait_until
from release import RUN_TIMEOUT_S, Release, node_of

STOPPED_AT, STEPS = 3, 20
TWO_NODES = {
    "settings": {
        "parallel": {"nodes": 2, "wait_minutes": 3},
        "train": {"max_steps": STEPS},
        "checkpoint": {"every_steps": 2},
    }
}


def check_trained_together(release: Release) -> None:
    """Check that the adapter was trained by two nodes, the last of them from a checkpoint on."""
    manifest = release.store.check_adapter(release.output)
    assert (manifest["plan"]["nodes"], manifest["metrics"]["steps"]) == (2, STEPS)
    first = release.wait_for_log("is published")
    assert "going on from step" in release.log(first)
    assert "publishing, which node 0 does" in release.log(release.wait_for_log("is published", node=1))


def test_two_nodes_train_together_and_resume_together(release: Release) -> None:
    release.install({**TWO_NODES, "backoffLimit": 0})
    job = release.job()["spec"]
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 2, 2)
    release.wait_for_log(f"step {STOPPED_AT}/")
    [second] = [pod["metadata"]["name"] for pod in release.pods() if node_of(pod) == 1]
    release.namespace.kubectl("delete", "pod", second)
    release.wait_until_complete()
    assert sorted(release.endings()) == [0, 0, 75, 75]  # they stop together, and it counts for neither
    check_trained_together(release)


def test_a_jobset_restarts_all_nodes(release: Release, jobset: None) -> None:
    """A crash is counted, being stopped is not."""
    release.install({**TWO_NODES, "kind": "JobSet", "jobSet": {"maxRestarts": 1}})

    def look() -> Object:
        [found] = release.namespace.get("jobsets")
        return found

    release.wait_for_log(f"step {STOPPED_AT}/")
    [second] = [pod["metadata"]["name"] for pod in release.pods() if node_of(pod) == 1]
    # tini, the first process, has the job as its only child.
    release.namespace.kubectl("exec", second, "--", "sh", "-c", "kill -9 $(cat /proc/1/task/1/children)")
    wait_until("a restart of the JobSet", lambda: look()["status"].get("restarts") == 1, timeout_s=180)

    release.wait_for_log("going on from step")
    [second] = [pod["metadata"]["name"] for pod in release.pods() if node_of(pod) == 1]
    release.namespace.kubectl("delete", "pod", second)
    wait_until("the end of the JobSet", lambda: condition(look(), "Completed"), RUN_TIMEOUT_S)
    status = look()["status"]
    assert (status["restarts"], status["restartsCountTowardsMax"]) == (2, 1)
    assert len(release.run_pods_seen()) == 6
    check_trained_together(release)


@pytest.fixture
def queue(namespace: Namespace, kueue: None) -> Iterator[str]:
    """A LocalQueue whose quota is one GPU."""
    name, version = namespace.name, "kueue.x-k8s.io/v1beta2"
    quotas = {"cpu": "2", "memory": "4Gi", "nvidia.com/gpu": "1"}
    resources = [{"name": resource, "nominalQuota": quota} for resource, quota in quotas.items()]
    groups = [{"coveredResources": [*quotas], "flavors": [{"name": name, "resources": resources}]}]
    selector = {"matchLabels": {"kubernetes.io/metadata.name": name}}
    named = {"apiVersion": version, "metadata": {"name": name}}
    try:
        namespace.apply(
            {**named, "kind": "ResourceFlavor"},
            {**named, "kind": "ClusterQueue", "spec": {"namespaceSelector": selector, "resourceGroups": groups}},
            {**named, "kind": "LocalQueue", "spec": {"clusterQueue": name}},
        )
        yield name
    finally:
        run_kubectl("delete", "clusterqueue,resourceflavor", name, "--ignore-not-found", "--wait=false")


def test_a_queued_run_waits_for_its_quota(release: Release, queue: str) -> None:
    later = Release(release.namespace, release.store, release.image, "later")
    for run in (release, later):
        run.install({"kueue": {"queueName": queue}})
        wait_until("Kueue's admission", lambda: not release.job()["spec"]["suspend"], timeout_s=120)
    assert later.job()["spec"]["suspend"]
    [waiting] = [it for it in release.namespace.get("workloads") if not condition(it, "Admitted")]
    reasons = " ".join(found["message"] for found in waiting["status"]["conditions"])
    assert "insufficient unused quota for nvidia.com/gpu" in reasons

    release.wait_until_complete()
    assert later.pods() == [] or not later.job()["spec"]["suspend"]
    later.wait_until_complete()
    started, ended = later.job()["status"]["startTime"], release.job()["status"]["completionTime"]
    assert started >= ended
    for run in (release, later):
        run.store.check_adapter(run.output)
