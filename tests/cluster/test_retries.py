"""What Kubernetes does when a pod ends: what was stopped or lost starts again and goes on from its checkpoint, what
can't succeed is not tried twice, and what ran out of memory is called so."""

import pytest
from kubernetes import ending, outcome, run_kubectl, wait_until
from release import BUCKET, Release
from seaweed import SeaweedFS

STOPPED_AT, STEPS = 3, 40  # long enough to be stopped midway, and short
MIDWAY = {"settings": {"train": {"max_steps": STEPS}, "checkpoint": {"every_steps": STEPS}}}


def check_resumed(release: Release) -> None:
    """Check that the second pod went on from where the first was stopped, and published what all steps have learned."""
    release.wait_until_complete()
    assert release.endings() == [75, 0]
    first, second = release.run_pods_seen()
    stopped = outcome(first)
    assert STOPPED_AT <= stopped["step"] < STEPS
    assert f"going on from step {stopped['step']}" in release.log(second["metadata"]["name"])
    assert release.store.check_adapter(release.output)["metrics"]["steps"] == STEPS


def test_a_deleted_pod_is_replaced_and_resumes(release: Release) -> None:
    release.install({**MIDWAY, "backoffLimit": 0})  # being stopped doesn't count
    pod = release.wait_for_log(f"step {STOPPED_AT}/")
    release.namespace.kubectl("delete", "pod", pod)
    check_resumed(release)


def test_a_drained_node_gets_the_run_back(release: Release) -> None:
    release.install({**MIDWAY, "backoffLimit": 0})
    pod = release.wait_for_log(f"step {STOPPED_AT}/")
    [node] = [it["spec"]["nodeName"] for it in release.pods()]
    selector = "--pod-selector=app.kubernetes.io/component=run"
    try:
        run_kubectl("drain", node, selector, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=3m")

        def look() -> bool:
            return [it["status"]["phase"] for it in release.pods() if it["metadata"]["name"] != pod] == ["Pending"]

        assert wait_until("a pod that waits for a node", look, timeout_s=120)
    finally:
        run_kubectl("uncordon", node)
    check_resumed(release)


def test_a_store_that_is_away_is_tried_again(release: Release, server: SeaweedFS) -> None:
    server.stop()
    try:
        release.install()
        wait_until("a pod that found no store", lambda: 69 in release.endings(), timeout_s=300)
    finally:
        server.start()
    release.wait_until_complete()
    assert set(release.endings()) == {69, 0}
    failed = release.run_pods_seen()[0]
    assert outcome(failed)["name"] == "unavailable"
    assert "AWS_ENDPOINT_URL_S3" in ending(failed)["message"] or server.endpoint in ending(failed)["message"]
    release.store.check_adapter(release.output)


@pytest.mark.parametrize(("code", "words"), [(65, "rows.jsonl:2"), (66, "data/missing"), (77, "")])
def test_what_cannot_succeed_is_not_tried_twice(release: Release, code: int, words: str) -> None:
    changes: dict[int, dict[str, object]] = {
        65: {"settings": {"data": {"uri": f"s3://{BUCKET}/{release.output}-rows/rows.jsonl"}}},
        66: {"settings": {"data": {"uri": f"s3://{BUCKET}/data/missing.jsonl"}}},
        77: {"extraEnv": [{"name": "AWS_ACCESS_KEY_ID", "value": "nobody"}]},
    }
    release.store.write(f"{release.output}-rows/rows.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": 3}\n')
    release.install(changes[code])
    kind, held = release.wait_for_end()
    assert (kind, held["reason"]) == ("Failed", "PodFailurePolicy")
    assert f"exit code {code}" in held["message"]
    [pod] = release.run_pods_seen()
    told = outcome(pod)
    assert (ending(pod)["exitCode"], told["code"]) == (code, code)
    assert words in told["message"]
    assert told["hint"]


def test_out_of_memory_is_called_so(release: Release) -> None:
    """Where the kernel kills a worker, the job ends with 71; where it kills the whole container (cgroup v2), the
    kubelet says OOMKilled, and the pod has no message of the job's own."""
    release.exhaust_memory("-m job.train.worker")
    release.install({"backoffLimit": 0})
    kind, held = release.wait_for_end()
    assert kind == "Failed"
    [pod] = release.run_pods_seen()
    ended = ending(pod)
    assert ended["reason"] == "OOMKilled"
    if ended["exitCode"] == 71:
        assert held["reason"] == "PodFailurePolicy"
        assert "memory" in outcome(pod)["message"]
    else:
        assert (ended["exitCode"], held["reason"]) == (137, "BackoffLimitExceeded")
    assert release.store.keys(release.output) == set()
