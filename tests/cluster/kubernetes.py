"""A Kubernetes cluster as the tests use it: kubectl and helm, a namespace a test, and waiting with a deadline."""

import json
import os
import secrets
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from tools import helm, kubectl

CONTAINER = "sft-job"
_COMMAND_TIMEOUT_S = 360.0
_POLL_S = 0.5
_LOG_LINES = 60

Object = dict[str, Any]
Found = TypeVar("Found")


def run_kubectl(*arguments: str, text: str = "", check: bool = True) -> str:
    """Run kubectl with `text` as its standard input; return what it printed, or fail with what it said."""
    return _run([str(_kubectl()), *arguments], text, check)


def run_helm(*arguments: str, text: str = "", check: bool = True) -> str:
    """The same for helm."""
    return _run([str(_helm()), *arguments], text, check)


def wait_until(what: str, probe: Callable[[], Found | None], timeout_s: float) -> Found:
    """Ask again and again until there is an answer that is true, and return it; `what` is the failure's message."""
    deadline = time.monotonic() + timeout_s
    while True:
        if found := probe():
            return found
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:.0f} s"
        time.sleep(_POLL_S)


class Namespace:
    """A namespace that goes away with the `with` block, and everything that happened to the pods in it.

    It admits only pods that keep to the `restricted` Pod Security Standard, as careful clusters do.
    """

    def __init__(self, prefix: str, folder: Path) -> None:
        self.name = f"{prefix}-{secrets.token_hex(3)}"
        self._changes = folder / f"{self.name}-pods.json"
        self._watch: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
        self._apply_whole({"kind": "Namespace", "metadata": {"name": self.name, "labels": labels}})
        command = [str(_kubectl()), "--namespace", self.name, "get", "pods", "--watch", "--output", "json"]
        with self._changes.open("wb") as file:
            self._watch = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watch is not None:
            self._watch.kill()
            self._watch.wait()
        # First what makes Jobs, then Jobs, then pods at once: their grace period would hold GPUs that others wait for.
        if "jobset.x-k8s.io" in api_groups():
            self.kubectl("delete", "jobsets", "--all", "--ignore-not-found")
        self.kubectl("delete", "cronjobs,jobs", "--all", "--cascade=orphan")
        self.kubectl("delete", "pods", "--all", "--force", "--grace-period=0")
        run_kubectl("delete", "namespace", self.name, "--wait=false")

    def kubectl(self, *arguments: str, text: str = "", check: bool = True) -> str:
        """Run kubectl in this namespace."""
        return run_kubectl("--namespace", self.name, *arguments, text=text, check=check)

    def helm(self, *arguments: str, text: str = "", check: bool = True) -> str:
        """Run helm in this namespace."""
        return run_helm("--namespace", self.name, *arguments, text=text, check=check)

    def apply(self, *manifests: Object) -> None:
        """Create these objects, or change them."""
        for manifest in manifests:
            self.kubectl("apply", "--filename", "-", text=json.dumps(manifest))

    def get(self, kind: str, *arguments: str) -> list[Object]:
        """Return all objects of a kind, oldest first."""
        found: list[Object] = json.loads(self.kubectl("get", kind, "--output", "json", *arguments))["items"]
        return sorted(found, key=lambda item: (item["metadata"]["creationTimestamp"], item["metadata"]["name"]))

    def pods_seen(self) -> dict[str, Object]:
        """Return the last state of every pod that has been here, by name, oldest first: of those that are gone, too."""
        decoder, text, place = json.JSONDecoder(), self._changes.read_text(), 0
        pods: dict[str, Object] = {}
        while place < len(text):
            try:
                pod, place = decoder.raw_decode(text, place)
            except ValueError:  # it is being written
                break
            pods[pod["metadata"]["name"]] = pod
            place += len(text[place:]) - len(text[place:].lstrip())
        return pods

    def describe(self) -> str:
        """Return what there is to know of the objects here, for a test that has failed."""
        parts = [
            self.kubectl("get", "all", "--output", "wide", check=False),
            self.kubectl("describe", "jobs,pods", check=False),
            self.kubectl("get", "events", "--sort-by=.lastTimestamp", check=False),
        ]
        for pod in self.get("pods"):
            name = pod["metadata"]["name"]
            log = self.kubectl("logs", name, "--all-containers", "--prefix", f"--tail={_LOG_LINES}", check=False)
            parts.append(f"the log of {name}:\n{log}")
        return "\n\n".join(parts)

    def _apply_whole(self, manifest: Object) -> None:
        run_kubectl("apply", "--filename", "-", text=json.dumps({"apiVersion": "v1", **manifest}))


def ending(pod: Object) -> Object:
    """Return how the job's container in a pod ended (exitCode, reason, message); nothing while it hasn't."""
    for status in pod["status"].get("containerStatuses", []):
        if status["name"] == CONTAINER:
            ended: Object = status["state"].get("terminated", {})
            return ended
    return {}


def outcome(pod: Object) -> Object:
    """Return what the job wrote to the termination log."""
    written: Object = json.loads(ending(pod)["message"])
    return written


def condition(thing: Object, kind: str) -> Object | None:
    """Return a condition of an object if it holds."""
    for found in thing.get("status", {}).get("conditions", []):
        if found["type"] == kind and found["status"] == "True":
            held: Object = found
            return held
    return None


@cache
def api_groups() -> frozenset[str]:
    """Return the names of the API groups that the cluster serves."""
    found = json.loads(run_kubectl("get", "--raw", "/apis"))["groups"]
    return frozenset(group["name"] for group in found)


@cache
def _kubectl() -> Path:
    return kubectl()


@cache
def _helm() -> Path:
    return helm()


def _run(command: Sequence[str], text: str, check: bool) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HELM_")}
    ended = subprocess.run(
        command, input=text, capture_output=True, text=True, env=environment, timeout=_COMMAND_TIMEOUT_S
    )
    if check and ended.returncode != 0:
        words = " ".join([Path(command[0]).name, *command[1:]])
        raise AssertionError(f"{words}\nended with {ended.returncode}:\n{ended.stdout}{ended.stderr}")
    return ended.stdout if check else ended.stdout + ended.stderr
