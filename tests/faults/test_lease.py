"""Two jobs on one slot of a real S3 server: one at a time, whoever comes first, and whatever became of the other."""

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from job_cli import SHOP, job_environment, run_job
from running_job import RunningJob
from seaweed import SeaweedFS

from job.errors import ConfigError
from job.lease import LEASE_PATH, hold_slot
from job.storage import open_store

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

KEY = f"out/{LEASE_PATH}"


def environment_of(folder: Path, seaweed: SeaweedFS, bucket: str, model: Path, **settings: object) -> dict[str, str]:
    folder.mkdir()
    return seaweed.environment() | job_environment(
        folder,
        MODEL__ID=model,
        DATA__URI=SHOP / "train.jsonl",
        DATA__EVAL_FRACTION=0,
        OUTPUT__URI=f"s3://{bucket}/out",
        **settings,
    )


def read(s3_client: "S3Client", bucket: str, key: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(s3_client.get_object(Bucket=bucket, Key=key)["Body"].read())
    return content


def keys(s3_client: "S3Client", bucket: str) -> set[str]:
    return {item["Key"] for item in s3_client.list_objects_v2(Bucket=bucket).get("Contents", [])}


@pytest.mark.usefixtures("s3_environment")
def test_of_eight_writers_one_is_first(bucket: str) -> None:
    store = open_store(f"s3://{bucket}/out", setting="SFT_OUTPUT__URI")
    version: str | None = None
    for _ in range(10):
        start = threading.Barrier(8)
        seen = version

        def write(_: int, start: threading.Barrier = start, seen: str | None = seen) -> str | None:
            content = os.urandom(8)  # never the same twice: an ETag is of the content
            start.wait()
            return store.swap("a", content, seen)

        with ThreadPoolExecutor(8) as pool:
            (version,) = [written for written in pool.map(write, range(8)) if written is not None]
        found = store.read_version("a")
        assert found is not None
        assert found[1] == version


@pytest.mark.usefixtures("s3_environment")
def test_of_eight_jobs_one_takes_a_stale_lease_over(bucket: str) -> None:
    store = open_store(f"s3://{bucket}/out", setting="SFT_OUTPUT__URI")
    assert store.swap(LEASE_PATH, b"left behind", None) is not None
    start = threading.Barrier(8)
    ended = threading.Barrier(8)

    def hold(number: int) -> str:
        start.wait()
        try:
            with hold_slot(store, run_id=str(number), renewal_s=1, stale_s=5, look_s=0.5):
                ended.wait()
                return "held"
        except ConfigError:
            ended.wait()
            return "refused"

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(hold, range(8))) == ["held"] + ["refused"] * 7
    assert store.read(LEASE_PATH) is None


def test_a_second_job_is_refused_until_the_first_is_dead(
    seaweed: SeaweedFS, s3_client: "S3Client", bucket: str, tiny_model: Path, tmp_path: Path
) -> None:
    first = environment_of(tmp_path / "first", seaweed, bucket, tiny_model, TRAIN__MAX_STEPS=100_000)
    second = environment_of(tmp_path / "second", seaweed, bucket, tiny_model, TRAIN__MAX_STEPS=1)
    with RunningJob(first) as job:
        job.wait_for("== training")
        lease = read(s3_client, bucket, KEY)
        assert lease["pid"] == job.process.pid
        refused = run_job(second)
        assert refused.code == 78, refused.output
        assert (refused.outcome["code"], refused.outcome["name"]) == (78, "config")
        for word in (f"SFT_OUTPUT__URI=s3://{bucket}/out", lease["host"], lease["run_id"], lease["started_at"]):
            assert word in refused.outcome["message"]
        assert f"pid {job.process.pid}" in refused.outcome["message"]
        assert refused.outcome["hint"]
        assert refused.outcome["run_id"] != lease["run_id"]
        assert "waiting up to 45 s to see whether the job on" in refused.output
        assert "Traceback" not in refused.output
        assert job.process.poll() is None
        assert read(s3_client, bucket, KEY)["holder"] == lease["holder"]
        job.process.kill()
        job.process.wait()
    assert KEY in keys(s3_client, bucket)
    began_s = time.monotonic()
    ended = run_job(second)
    assert ended.code == 0, ended.output
    assert "which has died" in ended.output
    assert "waiting up to" not in ended.output, time.monotonic() - began_s
    assert read(s3_client, bucket, "out/manifest.json")["run_id"] == ended.outcome["run_id"]
    assert [key for key in keys(s3_client, bucket) if "checkpoint" in key] == []


def test_a_signal_ends_the_wait_for_another_job(
    seaweed: SeaweedFS, s3_client: "S3Client", bucket: str, tiny_model: Path, tmp_path: Path
) -> None:
    environment = environment_of(tmp_path / "job", seaweed, bucket, tiny_model, TRAIN__MAX_STEPS=1)
    s3_client.put_object(Bucket=bucket, Key=KEY, Body=b"{}")
    with RunningJob(environment) as job:
        job.wait_for("waiting up to 45 s to see whether a job whose lease can't be read")
        job.process.send_signal(signal.SIGTERM)
        assert job.process.wait(5) == 75
        assert json.loads(job.log.read_text())["code"] == 75
    assert s3_client.get_object(Bucket=bucket, Key=KEY)["Body"].read() == b"{}"


def test_of_two_starts_at_the_same_moment_one_publishes(
    seaweed: SeaweedFS, s3_client: "S3Client", bucket: str, tiny_model: Path, tmp_path: Path
) -> None:
    environments = [
        environment_of(tmp_path / name, seaweed, bucket, tiny_model, TRAIN__MAX_STEPS=1) for name in ("one", "two")
    ]
    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(run_job, environments))
    # The second has seen a lease renewed, or has waited until the first was done.
    assert sorted(end.code for end in ends) in ([0, 78], [0, 0]), [end.output for end in ends]
    trained = [end for end in ends if "== publishing" in end.output]
    assert len(trained) == 1
    manifest = read(s3_client, bucket, "out/manifest.json")
    assert manifest["run_id"] == trained[0].outcome["run_id"]
    listed = {f"out/{file['path']}" for file in manifest["files"]}
    assert keys(s3_client, bucket) == listed | {"out/manifest.json"}
