"""One run on one node: scheduled on its GPU request, trained under the chart's own security, published, looked after
by upgrades and `helm test`."""

import json

from kubernetes import condition, ending, outcome, wait_until
from release import BUCKET, Release

ROOTLESS = 10001


def test_a_run_from_install_to_upgrade(release: Release) -> None:
    release.install()
    release.wait_until_complete()
    [pod] = release.pods()
    assert pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert pod["spec"]["nodeName"]
    manifest = release.store.check_adapter(release.output)
    told = outcome(pod)
    assert (told["code"], told["run_id"], told["output"]) == (0, manifest["run_id"], f"s3://{BUCKET}/{release.output}")

    before = release.job()["metadata"]
    release.install()  # nothing has changed
    assert release.job()["metadata"]["uid"] == before["uid"]
    assert [it["metadata"]["uid"] for it in release.pods()] == [pod["metadata"]["uid"]]

    tested = release.namespace.helm("test", "demo", "--logs", "--timeout=5m")
    assert "is already published: nothing to do" in tested, tested

    release.output += "-changed"
    changes = {"lora": {"r": 4}, "output": {"uri": f"s3://{BUCKET}/{release.output}"}}
    release.install({"settings": changes})
    after = release.job()["metadata"]  # the one before is gone
    assert (after["uid"], after["name"]) != (before["uid"], before["name"])
    release.wait_until_complete()
    changed = release.store.check_adapter(release.output)
    assert changed["run_id"] != manifest["run_id"]
    assert changed["settings"]["lora"]["r"] == 4

    release.install({"settings": {"lora": {"r": 2}}})  # another run, and the output is taken
    kind, held = release.wait_for_end()
    assert (kind, held["reason"]) == ("Failed", "PodFailurePolicy")
    refused = outcome(release.pods()[-1])
    assert refused["code"] == 78
    assert changed["run_id"] in refused["message"]
    assert "SFT_OUTPUT__OVERWRITE" in refused["hint"]
    release.store.check_adapter(release.output)


def test_the_defaults_are_secure(release: Release) -> None:
    release.install({"settings": {"train": {"max_steps": 10_000}}})
    pod = release.wait_for_log("== reading the inputs")

    def run(command: str) -> str:
        return release.namespace.kubectl("exec", pod, "--", "sh", "-c", command)

    status = dict(line.split(":\t") for line in run("cat /proc/1/status").splitlines() if ":\t" in line)
    assert status["Uid"].split() == status["Gid"].split() == [str(ROOTLESS)] * 4
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert (status["NoNewPrivs"].strip(), status["Seccomp"].strip()) == ("1", "2")  # 2: a filter is in force
    for folder in ("/", "/tmp", "/opt/venv"):
        assert "Read-only file system" in run(f"touch {folder}/x 2>&1 || true")
    assert run("touch /workdir/x /dev/shm/x && echo written") == "written\n"
    assert run("ls /var/run/secrets/kubernetes.io 2>&1 || true").endswith("No such file or directory\n")


def test_too_many_gpus_wait_and_say_why(release: Release) -> None:
    release.install({"gpu": {"count": 64}})

    def look() -> str | None:
        for pod in release.pods():
            for found in pod["status"].get("conditions", []):
                if found["type"] == "PodScheduled" and found["status"] == "False":
                    return str(found["message"])
        return None

    assert "Insufficient nvidia.com/gpu" in wait_until("a reason why the pod waits", look, timeout_s=120)
    assert [pod["status"]["phase"] for pod in release.pods()] == ["Pending"]


def test_a_check_needs_no_gpu_and_trains_nothing(release: Release) -> None:
    release.install({"mode": "check"})
    release.wait_until_complete()
    [pod] = release.pods()
    assert "nvidia.com/gpu" not in json.dumps(pod["spec"]["containers"][0]["resources"])
    assert (ending(pod)["exitCode"], outcome(pod)["name"]) == (0, "ok")
    assert "is ready to train" in release.log(pod["metadata"]["name"])
    assert release.store.keys(release.output) == set()
    assert condition(release.job(), "Complete")
