"""A disk that is full in any phase ends the job with 71 and says what to enlarge; enlarged, the same start goes on.

The disks are real file systems (tmpfs) of a few MB, which takes root to mount.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from job_cli import SHOP, job_environment, run_job
from seaweed import SeaweedFS

from job.storage.local import LocalStore

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
KIB = 1024


class Disk:
    """A small file system of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        run("mount", "-t", "tmpfs", "-o", "size=1m", "sft-test", str(folder))

    def resize(self, size_kib: int) -> None:
        """Change how much it holds."""
        run("mount", "-o", f"remount,size={size_kib}k", str(self.folder))

    def fill(self, *, free_kib: int) -> None:
        """Let it have so much room left, whatever is on it."""
        status = os.statvfs(self.folder)
        self.resize((status.f_blocks - status.f_bfree) * status.f_frsize // KIB + free_kib)

    def unmount(self) -> None:
        """Take it away."""
        run("umount", str(self.folder))


def run(*command: str) -> None:
    subprocess.run(command, check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    small = Disk(tmp_path / "disk")
    yield small
    small.unmount()


@pytest.fixture
def on_disk(tiny_model: Path, tmp_path: Path, disk: Disk) -> dict[str, str]:
    """A job whose work folder is on the small disk, and all else is not."""
    return job_environment(
        tmp_path,
        MODEL__ID=tiny_model,
        DATA__URI=SHOP / "train.jsonl",
        DATA__EVAL_FRACTION=0,
        OUTPUT__URI=tmp_path / "slot",
        TRAIN__MAX_STEPS=1,
        RUNTIME__WORK_DIR=disk.folder / "work",
    )


@pytest.fixture
def in_s3(
    seaweed: SeaweedFS, s3_client: "S3Client", bucket: str, tiny_model: Path, on_disk: dict[str, str]
) -> dict[str, str]:
    """The same, with base model and data in S3: 80 rows 60 times over."""
    for file in tiny_model.iterdir():
        s3_client.upload_file(str(file), bucket, f"model/{file.name}")
    rows = (SHOP / "train.jsonl").read_bytes() * 60
    s3_client.put_object(Bucket=bucket, Key="data/train.jsonl", Body=rows)
    return (
        on_disk
        | seaweed.environment()
        | {"SFT_MODEL__ID": f"s3://{bucket}/model", "SFT_DATA__URI": f"s3://{bucket}/data/train.jsonl"}
    )


def refuse(environment: dict[str, str], phase: str, *words: str) -> None:
    """Run a job that must end for want of room in this phase, and publish nothing."""
    ended = run_job(environment)
    assert ended.code == 71, ended.output
    assert [line for line in ended.output.splitlines() if " == " in line][-1].endswith(f"== {phase}"), ended.output
    outcome = ended.outcome
    assert (outcome["code"], outcome["name"]) == (71, "resources")
    told = outcome["message"] + outcome["hint"]
    assert [word for word in (*words, "o space left") if word not in told] == [], told
    assert "room" in outcome["hint"] or "larger disk" in outcome["hint"], told
    assert "Traceback" not in ended.output, ended.output
    slot = Path(environment["SFT_OUTPUT__URI"])
    assert [path.name for path in slot.rglob("*") if path.name in ("manifest.json", "lease.json")] == []


def succeed(environment: dict[str, str]) -> None:
    """Run a job, and see what it published."""
    ended = run_job(environment)
    assert ended.code == 0, ended.output
    slot = LocalStore(environment["SFT_OUTPUT__URI"], setting="SFT_OUTPUT__URI")
    assert {"manifest.json", "adapter_model.safetensors"} <= {file.path for file in slot.find()}


def test_inputs_and_tokens(in_s3: dict[str, str], disk: Disk, tmp_path: Path) -> None:
    work = str(disk.folder / "work")
    disk.resize(1024)
    refuse(in_s3, "reading the inputs", f"SFT_DATA__URI={in_s3['SFT_DATA__URI']}", work)
    disk.resize(2 * 1024)  # room for the data, and not for a tokenizer
    refuse(in_s3, "tokenizing", f"SFT_MODEL__ID={in_s3['SFT_MODEL__ID']}", work)
    disk.fill(free_kib=3_600)  # for the tokenizer, and not for the tokens
    refuse(in_s3, "tokenizing", f"SFT_RUNTIME__WORK_DIR={work}")
    disk.resize(12 * 1024)  # for the tokens, and not for the weights
    refuse(in_s3, "fetching the base model", f"SFT_MODEL__ID={in_s3['SFT_MODEL__ID']}", work)
    disk.resize(64 * 1024)
    succeed(in_s3)


def test_training_and_publishing(on_disk: dict[str, str], disk: Disk) -> None:
    on_disk["SFT_LORA__R"] = "256"  # an adapter of 2 MB
    disk.resize(1024)
    refuse(on_disk, "training", "SFT_RUNTIME__WORK_DIR")
    disk.resize(5 * 1024)  # for the adapter, and not for the tokenizer beside it
    refuse(on_disk, "publishing", f"SFT_RUNTIME__WORK_DIR={disk.folder / 'work'}")
    disk.resize(64 * 1024)
    succeed(on_disk)


@pytest.mark.parametrize(("free_kib", "phase"), [(0, "tokenizing"), (2_000, "publishing")])
def test_output(on_disk: dict[str, str], disk: Disk, tmp_path: Path, free_kib: int, phase: str) -> None:
    slot = disk.folder / "slot"
    on_disk |= {"SFT_OUTPUT__URI": str(slot), "SFT_RUNTIME__WORK_DIR": str(tmp_path / "work")}
    disk.resize(8 * 1024)
    slot.mkdir()
    (disk.folder / "other").write_bytes(bytes(100_000))
    disk.fill(free_kib=free_kib)
    refuse(on_disk, phase, f"SFT_OUTPUT__URI={slot}")
    disk.resize(16 * 1024)
    succeed(on_disk)
