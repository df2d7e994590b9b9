"""What changes while a job runs, through its command line: data, credentials, and what the bucket grants."""

import json
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from gate import Gate, refusal
from job_cli import SHOP, Ended, job_environment, run_job
from seaweed import SeaweedFS

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

ROWS = (SHOP / "train.jsonl").read_bytes()
PUBLISHING = r"^PUT /[^ ]*/out/checkpoint/unlisted\.json"


@pytest.fixture
def on_s3(seaweed: SeaweedFS, s3_client: "S3Client", bucket: str, tiny_model: Path, tmp_path: Path) -> dict[str, str]:
    """A job that would succeed, in one step."""
    s3_client.put_object(Bucket=bucket, Key="data/train.jsonl", Body=ROWS)
    return seaweed.environment() | job_environment(
        tmp_path,
        MODEL__ID=tiny_model,
        DATA__URI=f"s3://{bucket}/data/train.jsonl",
        DATA__EVAL_FRACTION=0,
        OUTPUT__URI=f"s3://{bucket}/out",
        TRAIN__MAX_STEPS=1,
    )


def keys(s3_client: "S3Client", bucket: str) -> set[str]:
    return {item["Key"] for item in s3_client.list_objects_v2(Bucket=bucket).get("Contents", [])}


def assert_ended(ended: Ended, code: int, name: str, *words: str) -> None:
    assert ended.code == code, ended.output
    assert (ended.outcome["code"], ended.outcome["name"]) == (code, name)
    assert [word for word in words if word not in ended.outcome["message"]] == [], ended.outcome
    assert ended.outcome["hint"]
    assert "Traceback" not in ended.output


def test_data_that_changes_while_it_is_read(
    seaweed: SeaweedFS, s3_client: "S3Client", bucket: str, on_s3: dict[str, str]
) -> None:
    def change() -> None:
        s3_client.put_object(Bucket=bucket, Key="data/train.jsonl", Body=ROWS + ROWS)

    with Gate(seaweed.endpoint, r"^GET /[^ ]*/data/train\.jsonl", act=change) as gate:
        ended = run_job(on_s3 | {"AWS_ENDPOINT_URL_S3": gate.endpoint})
    assert_ended(ended, 69, "unavailable", f"SFT_DATA__URI=s3://{bucket}/data/train.jsonl", "changed while being read")
    assert keys(s3_client, bucket) == {"data/train.jsonl"}


def test_data_that_changes_between_two_starts_makes_another_run(
    s3_client: "S3Client", bucket: str, on_s3: dict[str, str]
) -> None:
    first = run_job(on_s3)
    assert first.code == 0, first.output
    before = s3_client.get_object(Bucket=bucket, Key="out/manifest.json")["Body"].read()
    s3_client.put_object(Bucket=bucket, Key="data/train.jsonl", Body=ROWS + ROWS)
    second = run_job(on_s3)
    assert_ended(second, 78, "config", first.outcome["run_id"], "is published there", second.outcome["run_id"])
    assert s3_client.get_object(Bucket=bucket, Key="out/manifest.json")["Body"].read() == before


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("ExpiredToken", "the credentials have expired"),
        ("InvalidAccessKeyId", "the access key id is unknown there"),
    ],
)
def test_credentials_that_are_revoked_before_publishing(
    seaweed: SeaweedFS, s3_client: "S3Client", bucket: str, on_s3: dict[str, str], code: str, words: str
) -> None:
    with Gate(seaweed.endpoint, PUBLISHING, answer=lambda _: refusal(403, code)) as gate:
        ended = run_job(on_s3 | {"AWS_ENDPOINT_URL_S3": gate.endpoint})
        assert gate.is_open.is_set()
    assert_ended(ended, 77, "denied", f"SFT_OUTPUT__URI=s3://{bucket}/out", words)
    assert "out/manifest.json" not in keys(s3_client, bucket)
    assert_adapter_is_kept(on_s3)
    assert "trying again" not in ended.output  # nobody will grant it within minutes


def test_a_bucket_that_turns_read_only_before_publishing(
    seaweed: SeaweedFS, s3_client: "S3Client", bucket: str, on_s3: dict[str, str]
) -> None:
    def deny_writing() -> None:
        actions, resource = ["s3:PutObject", "s3:DeleteObject"], [f"arn:aws:s3:::{bucket}/*"]
        statement = {"Effect": "Deny", "Principal": "*", "Action": actions, "Resource": resource}
        policy = {"Version": "2012-10-17", "Statement": [statement]}
        s3_client.put_bucket_policy(Bucket=bucket, Policy=json.dumps(policy))

    with Gate(seaweed.endpoint, PUBLISHING, act=deny_writing) as gate:
        on_s3["AWS_ENDPOINT_URL_S3"] = gate.endpoint
        ended = run_job(on_s3)
        s3_client.delete_bucket_policy(Bucket=bucket)
        assert_ended(ended, 77, "denied", f"SFT_OUTPUT__URI=s3://{bucket}/out", "access denied")
        assert "checkpoint/lease.json stays behind" in ended.output
        assert "out/manifest.json" not in keys(s3_client, bucket)
        assert_adapter_is_kept(on_s3)
        again = run_job(on_s3)
    assert again.code == 0, again.output
    assert {key for key in keys(s3_client, bucket) if "checkpoint" in key} == set()


def assert_adapter_is_kept(environment: dict[str, str]) -> None:
    """What was learned isn't lost: it still lies in the work folder."""
    adapter = Path(environment["SFT_RUNTIME__WORK_DIR"]) / "run" / "adapter"
    assert (adapter / "adapter_model.safetensors").stat().st_size > 0


def test_a_server_that_is_busy_when_the_adapter_is_ready(
    seaweed: SeaweedFS, s3_client: "S3Client", bucket: str, on_s3: dict[str, str]
) -> None:
    busy_until_s: list[float] = []

    def answer(_: str) -> bytes | None:
        return refusal(503, "SlowDown") if time.monotonic() < busy_until_s[0] else None

    with Gate(
        seaweed.endpoint, PUBLISHING, act=lambda: busy_until_s.append(time.monotonic() + 12), answer=answer
    ) as gate:
        ended = run_job(on_s3 | {"AWS_ENDPOINT_URL_S3": gate.endpoint})
    assert ended.code == 0, ended.output
    assert "(SlowDown, HTTP 503, from 127.0.0.1" in ended.output
    assert "trying again in 2 s, and for up to 300 s in all" in ended.output
    assert {"out/manifest.json", "out/adapter_model.safetensors"} <= keys(s3_client, bucket)


def test_credentials_that_are_replaced_while_the_job_runs(
    seaweed: SeaweedFS, s3_client: "S3Client", bucket: str, on_s3: dict[str, str], tmp_path: Path
) -> None:
    """A credential process, as for any source of keys that expire: the old ones are refused from publishing on."""
    keys_file, config = tmp_path / "keys.json", tmp_path / "aws-config"

    def issue(access_key: str, secret_key: str) -> None:
        expiration = (datetime.now(UTC) + timedelta(minutes=5)).isoformat()
        issued = {"Version": 1, "AccessKeyId": access_key, "SecretAccessKey": secret_key, "Expiration": expiration}
        keys_file.write_text(json.dumps(issued))

    program = f"print(open({str(keys_file)!r}).read())"
    config.write_text(f'[default]\ncredential_process = {sys.executable} -c "{program}"\n')
    issue(seaweed.access_key, seaweed.secret_key)
    del on_s3["AWS_ACCESS_KEY_ID"], on_s3["AWS_SECRET_ACCESS_KEY"]
    renewed = []

    def refuse_old_keys(head: str) -> bytes | None:
        if seaweed.access_key in head:
            return refusal(403, "ExpiredToken")
        renewed.append(head)
        return None

    with Gate(
        seaweed.endpoint,
        r"^PUT /[^ ]*/out/checkpoint/lease\.json",  # the lease, before training
        act=lambda: issue(seaweed.second_access_key, seaweed.second_secret_key),
        answer=lambda head: None if "lease.json" in head and not renewed else refuse_old_keys(head),
    ) as gate:
        ended = run_job(on_s3 | {"AWS_ENDPOINT_URL_S3": gate.endpoint, "AWS_CONFIG_FILE": str(config)})
    assert ended.code == 0, ended.output
    assert renewed
    assert "out/manifest.json" in keys(s3_client, bucket)
    assert seaweed.second_access_key not in ended.output
