"""Servers and models that the tests share: one SeaweedFS, one Hub stand-in and one tiny model a session."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# job.data keeps torch out of a process that doesn't have it yet; the tests of job.train need it in this one.
import torch  # noqa: F401
from base_model import get_base_model, get_tiny_model
from hub_stand_in import HubStandIn
from seaweed import SeaweedFS

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """A real S3 server."""
    with SeaweedFS(tmp_path_factory.mktemp("seaweed")) as server:
        yield server


@pytest.fixture(scope="session")
def s3_client(seaweed: SeaweedFS) -> Iterator["S3Client"]:
    """A boto3 client of the server's administrator."""
    with contextlib.closing(seaweed.client()) as client:
        yield client


@pytest.fixture
def bucket(s3_client: "S3Client") -> Iterator[str]:
    """The name of a new bucket, which goes away after the test."""
    name = f"test-{secrets.token_hex(6)}"
    s3_client.create_bucket(Bucket=name)
    yield name
    s3_client.delete_bucket(Bucket=name)  # SeaweedFS deletes what is in it, too


@pytest.fixture
def no_aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without any AWS setting, whatever the machine has."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-aws-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def s3_environment(seaweed: SeaweedFS, no_aws: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """This process's environment points at the server, as its administrator."""
    for name, value in seaweed.environment().items():
        monkeypatch.setenv(name, value)
    return seaweed.environment()


@pytest.fixture(scope="session")
def hub() -> Iterator[HubStandIn]:
    """A stand-in for the Hub; use its `environment` in a subprocess, for HF_ENDPOINT is read at import."""
    with HubStandIn() as stand_in:
        yield stand_in


@pytest.fixture(scope="session")
def tokenizer_folder() -> Path:
    """The real base model's folder, for its tokenizer."""
    return get_base_model()


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """A random llama that trains in no time, with the real base model's tokenizer. Not to be written to."""
    return get_tiny_model()
