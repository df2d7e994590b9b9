"""Faults of the store in every phase, through the real command line, a real S3 server and a proxy that makes them: one
that passes leaves no trace in the adapter, one that lasts ends the job with its code, its remedy and nothing published.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fault_proxy import FaultKind, FaultProxy, Rule
from job_cli import Ended, job_environment, run_job
from running_job import RunningJob
from seaweed import SeaweedFS

from job.errors import EXIT_CODES

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

BUCKET = "store-faults"
ROWS = [{"prompt": f"What is {n} and {n}?", "completion": f"It is {2 * n}."} for n in range(24)]
STEPS = 6
NAMES = {ending.code: ending.name for ending in EXIT_CODES}

# One request of each phase, by method and path.
PHASES = {
    "looking into the slot": ("GET", "/out/manifest.json"),
    "probing the slot": ("PUT", "/out/.sft-job-probe"),
    "listing the data": ("GET", "list-type=2.*data"),
    "reading the data": ("GET", "/data/a.jsonl"),
    "fetching the tokenizer": ("GET", "/model/tokenizer.json"),
    "fetching the weights": ("GET", "/model/model.safetensors"),
    "listing the checkpoints": ("GET", "list-type=2.*checkpoint"),
    "uploading a checkpoint": ("PUT", "/checkpoint/step-.*/tensors.safetensors"),
    "committing a checkpoint": ("PUT", "/checkpoint/step-.*/checkpoint.json"),
    "removing a checkpoint": ("DELETE", "/checkpoint/step-"),
    "publishing": ("PUT", "/out/adapter_model.safetensors"),
    "reading back": ("GET", "/out/adapter_model.safetensors"),
    "publishing the manifest": ("PUT", "/out/manifest.json"),
}


@dataclass
class Slot:
    """A job whose files are all in S3, at the server itself; `client` looks at what it leaves there."""

    environment: dict[str, str]
    client: "S3Client"
    prefix: str

    def run_through(self, proxy: FaultProxy) -> Ended:
        return run_job(self.environment | {"AWS_ENDPOINT_URL_S3": proxy.endpoint})

    def keys(self) -> set[str]:
        listing = self.client.list_objects_v2(Bucket=BUCKET, Prefix=f"{self.prefix}/")
        return {item["Key"].removeprefix(f"{self.prefix}/") for item in listing.get("Contents", [])}

    def hash_adapter(self) -> str:
        """Return the adapter's sha256, after comparing everything that is published with the manifest."""
        manifest = json.loads(self.read("manifest.json"))
        wrong = {file["path"] for file in manifest["files"] if self.hash(file["path"]) != file["sha256"]}
        assert wrong == set()
        assert self.keys() == {file["path"] for file in manifest["files"]} | {"manifest.json"}
        return self.hash("adapter_model.safetensors")

    def hash(self, path: str) -> str:
        return hashlib.sha256(self.read(path)).hexdigest()

    def read(self, path: str) -> bytes:
        return self.client.get_object(Bucket=BUCKET, Key=f"{self.prefix}/{path}")["Body"].read()

    def check_refusal(self, ended: Ended, code: int, words: str, remedy: str) -> None:
        """Check how a job ended that could not publish, and that there is no half of a publication."""
        assert ended.code == code, ended.output
        assert (ended.outcome["code"], ended.outcome["name"]) == (code, NAMES[code])
        assert words in ended.outcome["message"]
        assert remedy in ended.outcome["hint"]
        assert ended.outcome["message"].splitlines()[0] in ended.output
        assert "Traceback" not in ended.output
        self.check_secrets(ended)
        assert "manifest.json" not in self.keys()

    def check_secrets(self, ended: Ended) -> None:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            assert self.environment[name] not in ended.output + json.dumps(ended.outcome)


@pytest.fixture(scope="module")
def inputs(s3_client: "S3Client", tiny_model: Path) -> Iterator[None]:
    s3_client.create_bucket(Bucket=BUCKET)
    for file in tiny_model.iterdir():
        s3_client.upload_file(str(file), BUCKET, f"model/{file.name}")
    for name, rows in (("a", ROWS[:16]), ("b", ROWS[16:])):
        body = "".join(json.dumps(row) + "\n" for row in rows)
        s3_client.put_object(Bucket=BUCKET, Key=f"data/{name}.jsonl", Body=body.encode())
    yield
    s3_client.delete_bucket(Bucket=BUCKET)


def make_slot(seaweed: SeaweedFS, s3_client: "S3Client", folder: Path, prefix: str) -> Slot:
    environment = seaweed.environment() | job_environment(
        folder,
        MODEL__ID=f"s3://{BUCKET}/model",
        DATA__URI=f"s3://{BUCKET}/data/",
        DATA__EVAL_FRACTION=0,
        OUTPUT__URI=f"s3://{BUCKET}/{prefix}",
        TRAIN__MAX_STEPS=STEPS,
        TRAIN__GLOBAL_BATCH_SIZE=4,
        TRAIN__LOSS="full",  # the longest steps, so that what happens in their midst can be met
        TRAIN__LOGGING_STEPS=1,
        CHECKPOINT__EVERY_STEPS=2,
        CHECKPOINT__KEEP=1,
    )
    return Slot(environment, s3_client, prefix)


@pytest.fixture(scope="module")
def untroubled(
    inputs: None, seaweed: SeaweedFS, s3_client: "S3Client", tmp_path_factory: pytest.TempPathFactory
) -> str:
    """The sha256 of the adapter that the same run publishes without faults."""
    slot = make_slot(seaweed, s3_client, tmp_path_factory.mktemp("untroubled"), "untroubled/out")
    ended = run_job(slot.environment)
    assert ended.code == 0, ended.output
    return slot.hash_adapter()


@pytest.fixture
def slot(inputs: None, seaweed: SeaweedFS, s3_client: "S3Client", tmp_path: Path) -> Slot:
    return make_slot(seaweed, s3_client, tmp_path, f"{tmp_path.name}/out")


@pytest.fixture
def impatient(slot: Slot, tmp_path: Path) -> Slot:
    """The same job, which waits for a store that is away for 3 s while it publishes, where it would for minutes."""
    folder = tmp_path / "impatient"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text("import job.patience\njob.patience.PATIENCE_S = 3.0\n")
    slot.environment["PYTHONPATH"] = f"{folder}:{slot.environment['PYTHONPATH']}"
    return slot


@pytest.fixture(scope="module")
def proxy(seaweed: SeaweedFS) -> Iterator[FaultProxy]:
    with FaultProxy(seaweed.endpoint) as running:
        yield running


# -- faults that pass ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kinds",
    [
        ("internal_error", "slow_down", "too_many_requests"),
        ("reset_before", "reset_after", "flip_upload"),
        ("truncated", "reset_within", "flip_answer"),
    ],
)
def test_one_after_the_other_in_every_phase(
    slot: Slot, proxy: FaultProxy, untroubled: str, kinds: tuple[FaultKind, ...]
) -> None:
    proxy.set_rules([Rule(kind, method, path, times=1) for method, path in PHASES.values() for kind in kinds])
    before = len(proxy.faults())
    ended = slot.run_through(proxy)
    assert ended.code == 0, ended.output
    assert slot.hash_adapter() == untroubled
    slot.check_secrets(ended)
    struck = {(fault.kind, fault.method) for fault in proxy.faults()[before:]}
    for kind in kinds:
        assert (kind, "PUT" if kind == "flip_upload" else "GET") in struck
    assert len(proxy.faults()[before:]) > len(PHASES)


def test_a_server_that_stalls_for_a_while(slot: Slot, proxy: FaultProxy, untroubled: str) -> None:
    proxy.set_rules(
        [
            Rule("stall", *PHASES["reading the data"], times=1, seconds=60),
            Rule("stall", *PHASES["uploading a checkpoint"], times=1, seconds=60),
            Rule("latency", probability=0.2, seconds=0.3),
        ]
    )
    ended = slot.run_through(proxy)
    assert ended.code == 0, ended.output
    assert slot.hash_adapter() == untroubled


# -- faults that last, before training -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phase", "kind", "code", "words", "remedy"),
    [
        ("looking into the slot", "internal_error", 69, "InternalError, HTTP 500", "try again later"),
        ("looking into the slot", "clock_skew", 77, "RequestTimeTooSkewed", "clock"),
        ("probing the slot", "access_denied", 77, "access denied", "write"),
        ("listing the data", "slow_down", 69, "SlowDown, HTTP 503", "try again later"),
        ("listing the data", "expired_token", 77, "the credentials have expired", "new credentials"),
        ("reading the data", "truncated", 69, "the transfer broke off", "try again later"),
        ("reading the data", "reset_within", 69, "the transfer broke off", "try again later"),
        ("reading the data", "reset_before", 69, "can't be reached", "the network"),
        ("fetching the tokenizer", "too_many_requests", 69, "HTTP 429", "try again later"),
        ("fetching the weights", "flip_answer", 69, "arrived damaged", "damages what it sends"),
        ("fetching the weights", "expired_token", 77, "the credentials have expired", "new credentials"),
    ],
)
def test_for_good_before_training(
    slot: Slot, proxy: FaultProxy, phase: str, kind: FaultKind, code: int, words: str, remedy: str
) -> None:
    proxy.set_rules([Rule(kind, *PHASES[phase])])
    before = len(proxy.faults())
    ended = slot.run_through(proxy)
    slot.check_refusal(ended, code, words, remedy)
    assert "== training" not in ended.output
    assert slot.keys() == set()
    assert len(proxy.faults()) > before


# -- faults that last, while it trains -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["internal_error", "access_denied", "flip_upload"])
def test_without_checkpoints_it_trains_on(slot: Slot, proxy: FaultProxy, untroubled: str, kind: FaultKind) -> None:
    proxy.set_rules([Rule(kind, "PUT", "/checkpoint/step-")])
    ended = slot.run_through(proxy)
    assert ended.code == 0, ended.output
    assert "is not in the store, and will be tried again" in ended.output
    assert slot.hash_adapter() == untroubled
    slot.check_secrets(ended)


def test_a_store_that_is_away_while_it_trains(slot: Slot, proxy: FaultProxy, untroubled: str) -> None:
    proxy.set_rules([])
    slot.environment["AWS_ENDPOINT_URL_S3"] = proxy.endpoint
    with RunningJob(slot.environment) as job:
        job.wait_for("== training")
        job.wait_for("loading the base model")
        proxy.set_rules([Rule("reset_before")])
        job.wait_for(f"step {STEPS}/{STEPS}")
        proxy.set_rules([])
        job.wait_for("is published")
        assert job.process.wait(timeout=30) == 0
    assert slot.hash_adapter() == untroubled


# -- faults that last, while it publishes ----------------------------------------------------------------------------


def test_for_good_while_publishing_and_then_no_more(impatient: Slot, proxy: FaultProxy, untroubled: str) -> None:
    """Every start after the first has nothing left but to publish."""
    expected: list[tuple[str, FaultKind, int, str, str]] = [
        ("publishing", "slow_down", 69, "SlowDown, HTTP 503", "try again later"),
        ("publishing", "access_denied", 77, "access denied", "write"),
        ("publishing", "flip_upload", 69, "arrived damaged", "something on the way"),
        ("reading back", "flip_answer", 69, "arrived damaged", "damages what it sends"),
        ("reading back", "truncated", 69, "the transfer broke off", "try again later"),
        ("publishing the manifest", "expired_token", 77, "the credentials have expired", "new credentials"),
        ("publishing the manifest", "reset_before", 69, "can't be reached", "the network"),
        ("publishing the manifest", "clock_skew", 77, "RequestTimeTooSkewed", "clock"),
    ]
    for index, (phase, kind, code, words, remedy) in enumerate(expected):
        proxy.set_rules([Rule(kind, *PHASES[phase])])
        ended = impatient.run_through(proxy)
        impatient.check_refusal(ended, code, words, remedy)
        assert ("== training" in ended.output) == (index == 0)
    proxy.set_rules([])
    ended = impatient.run_through(proxy)
    assert ended.code == 0, ended.output
    assert "== training" not in ended.output
    assert impatient.hash_adapter() == untroubled


def test_a_manifest_whose_answer_is_lost(slot: Slot, proxy: FaultProxy, untroubled: str) -> None:
    proxy.set_rules([Rule("reset_after", *PHASES["publishing the manifest"], times=6)])  # more than one put sends
    ended = slot.run_through(proxy)
    assert ended.code == 0, ended.output
    assert "can't be reached" in ended.output
    assert slot.hash_adapter() == untroubled


def test_a_bucket_that_turns_read_only_while_it_trains(slot: Slot, proxy: FaultProxy, untroubled: str) -> None:
    """The start after that goes on from the last checkpoint from before."""
    proxy.set_rules([Rule("access_denied", "PUT|POST|DELETE", "/step-00000004/|/finished/|/out/adapter")])
    ended = slot.run_through(proxy)
    slot.check_refusal(ended, 77, "access denied", "write")
    assert f"step {STEPS}/{STEPS}" in ended.output
    proxy.set_rules([])
    ended = slot.run_through(proxy)
    assert ended.code == 0, ended.output
    assert f"going on from step 2 of {STEPS}" in ended.output
    assert slot.hash_adapter() == untroubled
