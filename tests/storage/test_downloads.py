"""What was fetched before is not fetched again, unless it changed on either side."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from job.downloads import Downloads, FetchedFile
from job.storage import Store, StoredFile, open_store

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client


class Counting:
    """A real store that counts what is fetched from it."""

    def __init__(self, uri: str) -> None:
        self.store: Store = open_store(uri, setting="SFT_DATA__URI")
        self.files: list[StoredFile] = self.store.find()
        self.fetched: list[str] = []

    def fetch(self, files: list[StoredFile], folder: Path, progress: object) -> list[Path]:
        self.fetched += [file.path for file in files]
        return self.store.fetch(files, folder, progress)  # type: ignore[arg-type]


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
