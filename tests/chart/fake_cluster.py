"""A stand-in for `helm` and `kubectl`, for what train.sh does in cases that a real cluster can't be brought to in time.

It plays a list of scenes: each look at the run shows the next one, and the last one for ever. Nothing of it is Helm or
Kubernetes; that both behave so is what tests/cluster shows. `sleep` is a stand-in, too, and hardly waits.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Object = dict[str, Any]
FATAL = [65, 66, 71, 77, 78, 80]
DONE = {
    "code": 0,
    "name": "ok",
    "message": "run 0123456789abcdef is published",
    "hint": "",
    "run_id": "0123456789abcdef",
    "step": 20,
    "total_steps": 20,
    "output": "s3://bucket/adapter",
}

_PROGRAM = """#!{python} -ISs
import json, os, signal, sys

os.chdir({folder!r})
program, words = os.path.basename(sys.argv[0]), sys.argv[1:]


def read(name, otherwise=""):
    if not os.path.exists(name):
        return otherwise
    with open(name) as file:
        return file.read()


def write(name, text):
    with open(name, "w") as file:
        file.write(text)


def play_next(name, scenes):
    number = int(read(name + ".count", "0"))
    write(name + ".count", str(number + 1))
    return scenes[min(number, len(scenes) - 1)]


if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    write("interruptible", read("interruptible") + " ".join([program, *words]) + "\\n")
with open("calls", "a") as calls:
    calls.write(" ".join([program, *words]) + "\\n")
releases = set(read("installed").split())
if program == "helm":
    refusals = json.loads(read("refusals.json"))
    if words[0] in refusals:
        sys.exit(refusals[words[0]])
    if words[0] == "upgrade" and "--dry-run=server" not in words:
        write("installed", " ".join(releases | {{words[2]}}))
    elif words[0] == "uninstall":
        write("installed", " ".join(releases - {{words[1]}}))
    elif words[0] == "get":
        sys.exit(0 if words[2] in releases and not print(words[2]) else "release: not found")
elif "--filename" in words:
    release = sys.stdin.read().strip()
    write("released", release)
    print(json.dumps({{"items": [json.loads(read(release + ".json"))[0]["run"]]}}))
elif "logs" in words:
    text = play_next(words[-1], json.loads(read("logs.json")).get(words[-1], ["the log of " + words[-1]]))
    print(text.removesuffix("BROKEN"), flush=True)
    sys.exit("error: unexpected EOF" if text.endswith("BROKEN") else 0)
elif "pods" in words:
    print(json.dumps({{"items": json.loads(read("scene"))["pods"]}}))
elif "events" in words:
    print(json.loads(read("scene"))["run"]["metadata"]["name"] + "-abcde   FailedScheduling   no node has room")
elif "delete" in words:
    play_next(read("released"), [None])
else:
    scene = play_next(read("released"), json.loads(read(read("released") + ".json")))
    if scene.get("unreachable"):
        sys.exit("Unable to connect to the server")
    write("scene", json.dumps(scene))
    print(json.dumps(scene["run"]) if scene["run"] else "")
"""


def failed_outcome(code: int, name: str) -> dict[str, Any]:
    return {"code": code, "name": name, "message": f"what is wrong: {name}", "hint": "do this"}


def pod(name: str, *, code: int | None = None, index: int = 0, made: int = 0, **more: Any) -> Object:
    """Return a pod that runs or, with an exit code, has ended; `more`: outcome, reason, waiting, unschedulable."""
    state: Object = {"running": {}}
    if code is not None:
        message = more.get("message", json.dumps(more["outcome"]) if "outcome" in more else "")
        reason = more.get("reason", "Completed" if code == 0 else "Error")
        state = {"terminated": {"exitCode": code, "reason": reason, "message": message, "finishedAt": f"T{made:02}"}}
    if "waiting" in more:
        state = {"waiting": {"reason": more["waiting"], "message": "see there"}}
    status: Object = {"containerStatuses": [{"name": "sft-job", "state": state}]}
    if "unschedulable" in more:
        status = {
            "conditions": [
                {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": more["unschedulable"]}
            ]
        }
    labels = {"batch.kubernetes.io/job-completion-index": str(index)}
    return {"metadata": {"name": name, "labels": labels, "creationTimestamp": f"T{made:02}"}, "status": status}


def scene(*pods: Object, condition: str = "", reason: str = "", kind: str = "Job", **spec: Any) -> Object:
    """Return what the cluster shows at one look: the run, maybe Complete or Failed, and its pods."""
    template = {"spec": {"containers": [{"name": "sft-job"}]}}
    rules = [{"action": "FailJob", "onExitCodes": {"values": FATAL}}, {"action": "Ignore"}]
    run = {
        "kind": kind,
        "metadata": {"name": "demo-1234abcd"},
        "spec": {"template": template, "podFailurePolicy": {"rules": rules}, **spec},
        "status": {
            "conditions": [{"type": condition, "status": "True", "reason": reason, "message": "the Job's own words"}]
            if condition
            else []
        },
    }
    return {"run": run, "pods": list(pods)}


CHECKED = [scene(pod("check-pod", code=0, outcome={"code": 0, "name": "ok"}), condition="Complete")]
GONE = {"run": None, "pods": []}
UNREACHABLE = {"unreachable": True}


@dataclass
class FakeCluster:
    """Where the stand-ins and what they play lie."""

    folder: Path
    train: list[Object]
    check: list[Object] = field(default_factory=lambda: CHECKED)
    logs: dict[str, list[str]] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    installed: str = ""

    def start(self, charts: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Start train.sh for the release `demo`; a copy that looks seldom, for each look is a second in a test."""
        programs = self.folder / "bin"
        programs.mkdir()
        script = self.folder / "train.sh"
        text = (charts / "train.sh").read_text()
        assert text.count("\nPOLL_S=5\n") == 1
        script.write_text(text.replace("\nPOLL_S=5\n", "\nPOLL_S=50\n"))
        script.chmod(0o755)
        shutil.copy(charts / "train.jq", self.folder)
        for name in ("helm", "kubectl"):
            (programs / name).write_text(_PROGRAM.format(python=sys.executable, folder=str(self.folder)))
        (programs / "sleep").write_text("#!/bin/sh\nexec /bin/sleep 0.01\n")
        for program in programs.iterdir():
            program.chmod(0o755)
        plays = {"demo": self.train, "demo-check": self.check, "logs": self.logs, "refusals": self.refusals}
        for name, play in plays.items():
            (self.folder / f"{name}.json").write_text(json.dumps(play))
        (self.folder / "installed").write_text(self.installed)
        values = self.folder / "demo.yaml"
        values.touch()
        own = ("GITHUB_", "HELM_", "TRAIN_")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        return subprocess.Popen(
            # Started in the background, tests may ignore SIGINT, and a shell can't trap what it was told to ignore.
            ["env", "--default-signal=INT", str(script), "demo", str(values), *arguments],
            env=inherited | {"PATH": f"{programs}:{os.environ['PATH']}"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )

    def calls(self) -> list[str]:
        """Return how helm and kubectl were called, each as one line."""
        return (self.folder / "calls").read_text().splitlines()

    def helm_calls(self) -> list[str]:
        """Return the commands that helm was given with the release they were for, but for those that only look."""
        words = [call.split() for call in self.calls() if call.startswith("helm ")]
        named = {"upgrade": 3, "uninstall": 2}
        return [
            " ".join([word[1], word[named[word[1]]], *(["--dry-run"] if "--dry-run=server" in word else [])])
            for word in words
            if word[1] in named
        ]
