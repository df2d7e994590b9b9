"""What was fetched before is not fetched again, unless it changed on either side."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from job.downloads import Downloads, FetchedFile
from job.storage import Arrived, Progress, Store, StoredFile, open_store

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client


class Counting:
    """A real store that counts what is fetched from it."""

    def __init__(self, uri: str) -> None:
        self.store: Store = open_store(uri, setting="SFT_DATA__URI")
        self.files: list[StoredFile] = self.store.find()
        self.fetched: list[str] = []

    def fetch(self, files: list[StoredFile], folder: Path, progress: Progress, arrived: Arrived) -> list[Path]:
        self.fetched += [file.path for file in files]
        return self.store.fetch(files, folder, progress, arrived)


def fetch(uri: str, folder: Path) -> tuple[list[FetchedFile], list[str], list[str]]:
    """Return the files, what was fetched for them, and their sha256."""
    counting = Counting(uri)
    downloads = Downloads(folder, counting, counting.files)  # type: ignore[arg-type]
    files = downloads.fetch(counting.files, "data")
    return files, counting.fetched, [downloads.hash_file(file) for file in files]


def test_a_second_start_fetches_what_changed(
    s3_client: "S3Client", bucket: str, s3_environment: dict[str, str], tmp_path: Path
) -> None:
    for name in ("a.jsonl", "b/c.jsonl"):
        s3_client.put_object(Bucket=bucket, Key=f"rows/{name}", Body=name.encode())
    folder, uri = tmp_path / "data", f"s3://{bucket}/rows/"
    files, fetched, digests = fetch(uri, folder)
    assert fetched == ["a.jsonl", "b/c.jsonl"]
    assert fetch(uri, folder) == (files, [], digests)

    s3_client.put_object(Bucket=bucket, Key="rows/a.jsonl", Body=b"other in the store")
    files, fetched, changed = fetch(uri, folder)
    assert fetched == ["a.jsonl"]
    assert files[0].path.read_bytes() == b"other in the store"
    assert (changed[0] == digests[0], changed[1] == digests[1]) == (False, True)

    files[1].path.write_bytes(b"edited!!!!!")
    assert fetch(uri, folder)[1:] == (["b/c.jsonl"], changed)

    s3_client.delete_object(Bucket=bucket, Key="rows/b/c.jsonl")
    fetch(uri, folder)
    assert sorted(path.name for path in folder.rglob("*")) == ["a.jsonl", "fetched.json"]


KILLED = """
import os, signal, sys
from pathlib import Path
import job.downloads
from job.downloads import Downloads
from job.storage import open_store

job.downloads._LARGE_BYTES = 8 << 20
remember = Downloads._remember

def remember_and_die(self, files, paths):
    remember(self, files, paths)
    os.kill(os.getpid(), signal.SIGKILL)

Downloads._remember = remember_and_die
store = open_store(sys.argv[1], setting="SFT_DATA__URI")
files = store.find()
Downloads(Path(sys.argv[2]), store, files).fetch(files, "data")
"""


def test_a_large_file_that_came_before_a_kill_is_kept(
    s3_client: "S3Client", bucket: str, s3_environment: dict[str, str], tmp_path: Path
) -> None:
    bodies = {name: os.urandom(8 << 20) for name in ("one", "three", "two")}
    for name, body in bodies.items():
        s3_client.put_object(Bucket=bucket, Key=f"model/{name}", Body=body)
    folder, uri = tmp_path / "model", f"s3://{bucket}/model/"
    command = [sys.executable, "-c", KILLED, uri, str(folder)]
    killed = subprocess.run(command, env=os.environ | s3_environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    files, fetched, _ = fetch(uri, folder)
    assert len(fetched) == 2
    assert {file.source.path: file.path.read_bytes() for file in files} == bodies
    assert sorted(path.name for path in folder.iterdir()) == ["fetched.json", "one", "three", "two"]


@pytest.mark.parametrize("index", [b"", b"{", b"[]"])
def test_without_an_index_everything_is_fetched_anew(tmp_path: Path, index: bytes) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.jsonl").write_bytes(b"{}")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "leftover").write_bytes(b"")
    (tmp_path / "data" / "fetched.json").write_bytes(index)
    files, fetched, _ = fetch(str(tmp_path / "source"), tmp_path / "data")
    assert fetched == ["a.jsonl"]
    assert files[0].path == tmp_path / "source" / "a.jsonl"
    assert not (tmp_path / "data" / "leftover").exists()
