"""The cluster that the tests run on, and the S3 server that its pods use, by these variables:

    KUBECONFIG      the cluster
    SFT_TEST_IMAGE  an image of the job (CPU build) that its nodes have or can pull, such as sft-job:0.1.0-cpu
    SFT_TEST_HOST   an address of this machine that pods can reach: SeaweedFS listens there

`make test-cluster` (tests/cluster/run.sh) can find all three by another:

    CLUSTER         a program that makes a cluster on this machine: `up` (prints `export KUBECONFIG=...`),
                    `load IMAGE.tar`, `addr` (prints SFT_TEST_HOST), `add jobset`, `add kueue`, `down`

With kind: `kind create cluster`, `kind load docker-image sft-job:0.1.0-cpu`, SFT_TEST_HOST is the gateway of Docker's
network `kind`. A node must offer nvidia.com/gpu: 4, which needs no GPU: the CPU build trains on the CPU.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from base_model import get_tiny_model
from job_cli import SHOP
from kubernetes import Namespace, api_groups
from release import BUCKET, Release, Store
from seaweed import SeaweedFS

_NEEDED = ("KUBECONFIG", "SFT_TEST_IMAGE", "SFT_TEST_HOST")
_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Tell the fixtures of a test that has failed, so that they can say what there was."""
    report = yield
    if report.when == "call" and report.failed:
        item.stash[_FAILED] = True
    return report


@pytest.fixture(scope="session", autouse=True)
def cluster() -> None:
    """Skip everything where there is no cluster."""
    missing = [name for name in _NEEDED if not os.environ.get(name)]
    if missing:
        pytest.skip(f"no cluster: {', '.join(missing)} not set; see `make test-cluster`")


@pytest.fixture(scope="session")
def image() -> str:
    return os.environ["SFT_TEST_IMAGE"]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Iterator[SeaweedFS]:
    """An S3 server that pods reach."""
    with SeaweedFS(tmp_path_factory.mktemp("seaweed"), os.environ["SFT_TEST_HOST"]) as started:
        yield started


@pytest.fixture(scope="session")
def store(server: SeaweedFS) -> Iterator[Store]:
    """The server's bucket, with the tiny model and the demo's rows in it."""
    with contextlib.closing(server.client()) as client:
        client.create_bucket(Bucket=BUCKET)
        for prefix, folder in (("model", get_tiny_model()), ("data", SHOP)):
            for file in folder.iterdir():
                client.upload_file(str(file), BUCKET, f"{prefix}/{file.name}")
        yield Store(client, server.environment())


@pytest.fixture
def namespace(request: pytest.FixtureRequest, tmp_path: Path, cluster: None) -> Iterator[Namespace]:
    """A namespace of the test's own; what was in it is printed when the test has failed."""
    with Namespace("sft-test", tmp_path) as made:
        yield made
        if request.node.stash.get(_FAILED, False):
            print(made.describe())


@pytest.fixture
def release(namespace: Namespace, store: Store, image: str) -> Release:
    """A release of the chart, not installed yet."""
    return Release(namespace, store, image)


@pytest.fixture
def jobset(cluster: None) -> None:
    _need_group("jobset.x-k8s.io", "JobSet")


@pytest.fixture
def kueue(cluster: None) -> None:
    _need_group("kueue.x-k8s.io", "Kueue")


def _need_group(group: str, name: str) -> None:
    failed = os.environ.get("SFT_TEST_WITHOUT", "").split()  # a controller that didn't start may have left its group
    if group not in api_groups() or name.lower() in failed:
        pytest.skip(f"this cluster has no {name}: nothing of it was run")
