"""A release of the chart in a namespace of its own, from its installation to the adapter in the bucket."""

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from job_cli import ROOT
from kubernetes import Namespace, Object, condition, ending, wait_until

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

CHART = ROOT / "charts" / "sft-job"
BUCKET = "sft"
RUN_TIMEOUT_S = 420.0  # on a machine that is busy with other work
_SECRET = "store"
# Python imports a module of this name before all else. Bytes that are written take memory, zeros may not.
_HOG = """import sys
if {command!r} in " ".join(sys.orig_argv):
    taken = b"x" * (4 << 30)
"""


@dataclass
class Store:
    """The bucket as the tests see it; pods use it by `environment`."""

    client: "S3Client"
    environment: dict[str, str]

    def keys(self, prefix: str) -> set[str]:
        listing = self.client.list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/")
        return {item["Key"].removeprefix(f"{prefix}/") for item in listing.get("Contents", [])}

    def read(self, key: str) -> bytes:
        return self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()

    def write(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=key, Body=content)

    def check_adapter(self, prefix: str) -> Object:
        """Compare what is published with its manifest, byte by byte, and return the manifest."""
        manifest: Object = json.loads(self.read(f"{prefix}/manifest.json"))
        published = {file["path"]: file["sha256"] for file in manifest["files"]}
        found = {path: hashlib.sha256(self.read(f"{prefix}/{path}")).hexdigest() for path in published}
        assert found == published
        assert self.keys(prefix) == {*published, "manifest.json"}
        assert "adapter_model.safetensors" in published
        return manifest


class Release:
    """A release of the chart; `values` are those of a small run, with what a test changes in them merged in."""

    def __init__(self, namespace: Namespace, store: Store, image: str, name: str = "demo") -> None:
        self.namespace = namespace
        self.store = store
        self.name = name
        self.image = image
        self.output = f"out/{namespace.name}-{name}"
        repository, _, tag = image.rpartition(":")
        self.values: Object = {
            "image": {"repository": repository, "tag": tag},
            "settings": {
                "model": {"id": f"s3://{BUCKET}/model"},
                "data": {"uri": f"s3://{BUCKET}/data/train.jsonl"},
                "output": {"uri": f"s3://{BUCKET}/{self.output}"},
                # all logits at once: the longest steps, so that what happens in their midst can be met
                "train": {"max_steps": 4, "global_batch_size": 2, "logging_steps": 1, "loss": "full"},
                "runtime": {"log_format": "text"},  # the tests read it
            },
            "existingSecret": _SECRET,
            "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"memory": "3Gi"}},
            "checkResources": {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"memory": "3Gi"}},
        }
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": _SECRET}, "stringData": store.environment}
        namespace.apply(secret)

    def install(self, changes: Object | None = None) -> str:
        """Install the chart, or upgrade it, with the changes merged into the values; return what helm printed."""
        self.values = merge(self.values, changes or {})
        return self.namespace.helm(
            "upgrade", "--install", self.name, str(CHART), "--values", "-", text=json.dumps(self.values)
        )

    def exhaust_memory(self, command: str) -> None:
        """Have every process of the image with these words in its command line need 4 GiB as soon as Python starts.

        Near its limit a container may for minutes read again and again what it runs from, and not be killed.
        """
        self.namespace.apply(
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": "hog"},
                "data": {"sitecustomize.py": _HOG.format(command=command)},
            }
        )
        self.values |= {
            "env": {"PYTHONPATH": "/hog"},
            "extraVolumes": [{"name": "hog", "configMap": {"name": "hog"}}],
            "extraVolumeMounts": [{"name": "hog", "mountPath": "/hog"}],
        }

    def job(self) -> Object:
        """Return the one Job of the release."""
        [job] = self.namespace.get("jobs", f"--selector=app.kubernetes.io/instance={self.name}")
        return job

    def pods(self) -> list[Object]:
        """Return the pods of the run that are there, oldest first."""
        labels = f"app.kubernetes.io/component=run,app.kubernetes.io/instance={self.name}"
        return self.namespace.get("pods", f"--selector={labels}")

    def wait_for_end(self, timeout_s: float = RUN_TIMEOUT_S) -> tuple[str, Object]:
        """Wait until the Job is Complete or Failed; return which, and the condition."""

        def look() -> tuple[str, Object] | None:
            job = self.job()
            ends = [(kind, condition(job, kind)) for kind in ("Complete", "Failed")]
            return next(((kind, held) for kind, held in ends if held), None)

        return wait_until("the end of the Job", look, timeout_s)

    def wait_until_complete(self, timeout_s: float = RUN_TIMEOUT_S) -> None:
        """Wait for the end of the Job, which must be Complete."""
        kind, held = self.wait_for_end(timeout_s)
        assert kind == "Complete", held

    def wait_for_log(self, text: str, *, node: int = 0, timeout_s: float = RUN_TIMEOUT_S) -> str:
        """Wait until the newest pod of a node has logged a text; return the pod's name."""

        def look() -> str | None:
            pods = [pod for pod in self.pods() if node_of(pod) == node and pod["status"]["phase"] != "Pending"]
            if not pods:
                return None
            name: str = pods[-1]["metadata"]["name"]
            if text in self.log(name):
                return name
            assert not ending(pods[-1]), f"{name} has ended without: {text}\n{self.log(name)}"
            return None

        return wait_until(f"in the log: {text}", look, timeout_s)

    def log(self, pod: str) -> str:
        """Return all that a pod's job has logged."""
        return self.namespace.kubectl("logs", pod, "--container=sft-job", check=False)

    def endings(self) -> list[int]:
        """Return the exit codes of all pods of the run that have ended, oldest first, also of those that are gone."""
        return [ending(pod)["exitCode"] for pod in self.run_pods_seen() if ending(pod)]

    def run_pods_seen(self) -> list[Object]:
        """Return the last state of all pods of the run, oldest first, also of those that are gone."""
        wanted = {"app.kubernetes.io/component": "run", "app.kubernetes.io/instance": self.name}
        pods = self.namespace.pods_seen().values()
        return [pod for pod in pods if wanted.items() <= pod["metadata"]["labels"].items()]


def node_of(pod: Object) -> int:
    """Return which of the run's nodes a pod is."""
    return int(pod["metadata"]["labels"].get("batch.kubernetes.io/job-completion-index", "0"))


def merge(values: Any, changes: Any) -> Any:
    """Return values with changes merged in, dictionary by dictionary, as helm does."""
    if not isinstance(values, dict) or not isinstance(changes, dict):
        return changes
    return values | {name: merge(values.get(name), change) for name, change in changes.items()}
