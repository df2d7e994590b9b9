"""charts/train.sh, as CI calls it, on the real cluster: from a values file to the adapter or to the job's reason."""

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from job_cli import ROOT
from kubernetes import ending, wait_until
from release import Release
from tools import helm, kubectl

SCRIPT = ROOT / "charts" / "train.sh"
TIMEOUT_S = 600


class Script:
    """train.sh for a release, in the namespace of the test."""

    def __init__(self, release: Release, folder: Path, **environment: str) -> None:
        self.summary_file = folder / "summary.md"
        values = folder / "demo.yaml"
        values.write_text(json.dumps(release.values))
        programs = folder / "bin"
        programs.mkdir(exist_ok=True)
        for name, program in (("helm", helm()), ("kubectl", kubectl())):
            if not (programs / name).exists():
                (programs / name).symlink_to(program)
        self.summary_file.unlink(missing_ok=True)
        where = {"PATH": f"{programs}:{os.environ['PATH']}", "GITHUB_STEP_SUMMARY": str(self.summary_file)}
        self.process = subprocess.Popen(
            [str(SCRIPT), "demo", str(values), "--namespace", release.namespace.name],
            env=os.environ | where | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.output = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            print(line, end="")  # pytest shows it when the test fails

    def wait_for(self, text: str) -> None:
        wait_until(f"in the output of train.sh: {text}", lambda: text in self.output, TIMEOUT_S)

    def end(self) -> int:
        code = self.process.wait(TIMEOUT_S)
        self._reader.join()
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code

    def stop(self) -> None:
        self.process.kill()
        self.end()

    @property
    def summary(self) -> str:
        return self.summary_file.read_text()


Start = Callable[..., Script]


@pytest.fixture
def start(release: Release, tmp_path: Path) -> Iterator[Start]:
    """Start train.sh; whatever still runs ends with the test."""
    started = []

    def begin(**environment: str) -> Script:
        started.append(Script(release, tmp_path, **environment))
        return started[-1]

    yield begin
    for script in started:
        script.stop()


def releases(release: Release) -> set[str]:
    return {found["name"] for found in json.loads(release.namespace.helm("list", "--output", "json"))}


def slowly(release: Release) -> None:
    """Have the run take long enough to be interrupted, and save often enough to go on."""
    release.values["settings"]["train"] |= {"max_steps": 30}
    release.values["settings"]["checkpoint"] = {"every_steps": 5}


def test_a_run_is_followed_over_a_lost_pod_to_its_adapter_and_a_second_start_does_nothing(
    start: Start, release: Release
) -> None:
    slowly(release)
    first = start()
    first.wait_for("step 10/30")
    [pod] = release.pods()
    release.namespace.kubectl("delete", "pod", pod["metadata"]["name"], "--wait=false")
    assert first.end() == 0, first.output
    release.store.check_adapter(release.output)
    assert releases(release) == {"demo"}
    assert first.output.count("train.sh: the log of demo-sft-job-") == 2
    assert first.output.count("train.sh: the log of demo-check-") == 1
    assert first.output.count("step 30/30") == 1
    assert "### sft-job demo: done" in first.summary
    assert f"| adapter | s3://sft/{release.output} |" in first.summary
    assert "| steps | 30 of 30 |" in first.summary

    job = release.job()["metadata"]["uid"]
    second = start()
    assert second.end() == 0, second.output
    assert release.job()["metadata"]["uid"] == job
    assert second.summary == first.summary


def test_what_the_preflight_finds_ends_it_before_anything_is_installed(start: Start, release: Release) -> None:
    release.store.write(f"{release.output}/manifest.json", b'{"schema_version": 1, "run_id": "another"}')
    script = start()
    assert script.end() == 78, script.output
    assert releases(release) == set()
    assert "### sft-job demo-check: failed, config (78)" in script.summary
    assert release.namespace.get("pods") == []


def test_cancelled_it_leaves_a_checkpoint_from_which_the_next_start_goes_on(start: Start, release: Release) -> None:
    slowly(release)
    cancelled = start()
    cancelled.wait_for("step 10/30")
    cancelled.process.send_signal(signal.SIGTERM)
    assert cancelled.end() == 143, cancelled.output
    assert releases(release) == set()
    wait_until("the end of the pods", lambda: not release.pods(), 240)
    assert 75 in release.endings()

    again = start()
    assert again.end() == 0, again.output
    assert "step 5/30" not in again.output.partition("demo runs as")[2]
    release.store.check_adapter(release.output)


def test_a_run_that_failed_is_started_again_by_the_same_values(start: Start, release: Release) -> None:
    rows = release.store.read("data/train.jsonl")
    uri = release.output.replace("out/", "late/")
    release.install({"settings": {"data": {"uri": f"s3://sft/{uri}.jsonl"}}})
    kind, _ = release.wait_for_end()
    assert kind == "Failed"
    failed = release.job()["metadata"]
    assert ending(release.pods()[-1])["exitCode"] == 66

    release.store.write(f"{uri}.jsonl", rows)
    script = start()
    assert script.end() == 0, script.output
    now = release.job()["metadata"]
    assert (now["name"], now["uid"] != failed["uid"]) == (failed["name"], True)


def test_what_never_starts_is_said_and_taken_away(start: Start, release: Release) -> None:
    release.values["gpu"] = {"count": 64}
    release.values["settings"]["parallel"] = {"processes": 1}  # or the preflight would find the batch too small
    script = start(TRAIN_START_MINUTES="1")
    assert script.end() == 1, script.output
    assert "Insufficient nvidia.com/gpu" in script.summary
    assert releases(release) == set()


def test_a_check_without_enough_memory_is_called_that(start: Start, release: Release) -> None:
    release.exhaust_memory("sft-job")
    script = start()
    assert script.end() == 137, script.output
    assert "OOMKilled" in script.summary
    assert "memory" in script.output
    assert releases(release) == set()
