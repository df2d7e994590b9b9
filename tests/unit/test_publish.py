"""The manifest comes last, and its presence means that everything it lists is there and whole."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from job.errors import ConfigError, UnavailableError
from job.publish import check_slot, is_already_published, open_slot, publish, read_published
from job.storage import Progress, StoredFile
from job.storage.local import LocalStore


class WatchedStore:
    """A LocalStore that remembers its calls and may damage what is put into it."""

    def __init__(self, folder: Path, *, damaged: str = "", lost: str = "") -> None:
        self._inner = LocalStore(str(folder), setting="SFT_OUTPUT__URI")
        self.uri = self._inner.uri
        self._damaged = damaged
        self._lost = lost
        self.calls: list[tuple[str, str]] = []

    def find(self) -> list[StoredFile]:
        return self._inner.find()

    def fetch(self, files: list[StoredFile], folder: Path, progress: Progress) -> list[Path]:
        self.calls += [("fetch", file.path) for file in files]
        return self._inner.fetch(files, folder, progress)

    def revision(self, files: list[StoredFile]) -> str:
        return self._inner.revision(files)

    def put(self, source: Path, path: str) -> None:
        self.calls.append(("put", path))
        if path == self._lost:
            return
        if path == self._damaged:
            source = source.with_name("damaged")
            source.write_bytes(b"damaged")
        self._inner.put(source, path)

    def read(self, path: str) -> bytes | None:
        return self._inner.read(path)

    def delete(self, path: str) -> None:
        self.calls.append(("delete", path))
        self._inner.delete(path)

    def check_writable(self) -> None:
        self._inner.check_writable()


def make_run(folder: Path, run_id: str, files: dict[str, str]) -> dict[str, Any]:
    """Write the files of a run, and return its manifest."""
    folder.mkdir()
    listed = []
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
        listed.append({"path": name, "sha256": hashlib.sha256(content.encode()).hexdigest(), "bytes": len(content)})
    return {"run_id": run_id, "files": listed}


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def slot(tmp_path: Path) -> Path:
    return tmp_path / "slot"


def test_everything_is_read_back_before_the_manifest_is_written(tmp_path: Path, slot: Path) -> None:
    manifest = make_run(tmp_path / "run", "one", {"b.bin": "weights", "a.json": "{}", "sub/c": "x"})
    store = WatchedStore(slot)
    publish(store, tmp_path / "run", manifest, overwrite=True)
    assert store.calls[-1] == ("put", "manifest.json")
    assert sorted(store.calls[3:-1]) == [("fetch", "a.json"), ("fetch", "b.bin"), ("fetch", "sub/c")]
    assert names(slot) == {"b.bin", "a.json", "sub/c", "manifest.json"}
    assert read_published(store) == manifest


def test_overwriting_takes_the_old_manifest_away_first_and_then_its_files(tmp_path: Path, slot: Path) -> None:
    old = make_run(tmp_path / "old", "one", {"kept": "1", "stale": "2"})
    new = make_run(tmp_path / "new", "two", {"kept": "3", "added": "4"})
    store = WatchedStore(slot)
    publish(store, tmp_path / "old", old, overwrite=True)
    (slot / "foreign").write_text("someone else's")
    store.calls.clear()
    publish(store, tmp_path / "new", new, overwrite=True)
    assert store.calls[:2] == [("delete", "manifest.json"), ("delete", "stale")]
    assert store.calls[-1] == ("put", "manifest.json")
    assert names(slot) == {"kept", "added", "foreign", "manifest.json"}
    assert (slot / "kept").read_text() == "3"


@pytest.mark.parametrize("fault", [{"damaged": "b.bin"}, {"lost": "b.bin"}, {"damaged": "manifest.json"}])
@pytest.mark.parametrize("is_overwriting", [False, True])
def test_what_reads_back_differently_is_not_published(
    tmp_path: Path, slot: Path, fault: dict[str, str], is_overwriting: bool
) -> None:
    if is_overwriting:
        old = make_run(tmp_path / "old", "one", {"a.json": "old"})
        publish(WatchedStore(slot), tmp_path / "old", old, overwrite=True)
    manifest = make_run(tmp_path / "run", "two", {"a.json": "{}", "b.bin": "weights"})
    store = WatchedStore(slot, **fault)
    with pytest.raises(UnavailableError, match=r"b\.bin|manifest"):
        publish(store, tmp_path / "run", manifest, overwrite=True)
    assert read_published(store) is None
    # Nothing stands in the way of the next try.
    (tmp_path / "run" / "damaged").unlink(missing_ok=True)
    publish(WatchedStore(slot), tmp_path / "run", manifest, overwrite=True)
    assert read_published(store) == manifest


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "[]",
        "null",
        "{}",
        '{"run_id": "x"}',
        '{"files": []}',
        '{"run_id": "x", "files": {"a": 1}}',
        '{"run_id": "x", "files": ["a"]}',
        "\udcff",
    ],
)
def test_a_foreign_manifest_is_never_overwritten(tmp_path: Path, slot: Path, content: str) -> None:
    slot.mkdir()
    (slot / "manifest.json").write_bytes(content.encode(errors="surrogateescape"))
    before = (slot / "manifest.json").read_bytes()
    manifest = make_run(tmp_path / "run", "one", {"a.json": "{}"})
    for act in (
        lambda: check_slot(str(slot)),
        lambda: is_already_published(WatchedStore(slot), "one", overwrite=True, merge=False),
        lambda: publish(WatchedStore(slot), tmp_path / "run", manifest, overwrite=True),
    ):
        with pytest.raises(ConfigError, match=r"was not written by this job"):
            act()
    assert names(slot) == {"manifest.json"}
    assert (slot / "manifest.json").read_bytes() == before


def test_the_same_run_another_run_and_none(tmp_path: Path, slot: Path) -> None:
    store = WatchedStore(slot)
    assert not is_already_published(store, "one", overwrite=False, merge=False)
    publish(store, tmp_path / "run", make_run(tmp_path / "run", "one", {"a.json": "{}"}), overwrite=True)
    assert is_already_published(store, "one", overwrite=False, merge=False)
    assert is_already_published(store, "one", overwrite=True, merge=False)
    assert not is_already_published(store, "two", overwrite=True, merge=False)
    with pytest.raises(ConfigError, match="run one is published there, and this is run two"):
        is_already_published(store, "two", overwrite=False, merge=False)


def test_the_run_id_is_filled_in_and_the_probe_leaves_nothing(tmp_path: Path) -> None:
    assert open_slot(f"{tmp_path}/{{run_id}}/x", "abc").uri == f"{tmp_path}/abc/x"
    check_slot(f"{tmp_path}/out/{{run_id}}")
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_is_json_for_people(tmp_path: Path, slot: Path) -> None:
    publish(WatchedStore(slot), tmp_path / "run", make_run(tmp_path / "run", "ä", {"a": "1"}), overwrite=True)
    text = (slot / "manifest.json").read_text(encoding="utf-8")
    assert '"run_id": "ä"' in text
    assert json.loads(text)["files"][0]["bytes"] == 1


def test_a_run_that_came_later_touches_nothing_of_the_one_that_was_faster(tmp_path: Path, slot: Path) -> None:
    faster = make_run(tmp_path / "faster", "one", {"a.json": "1"})
    store = WatchedStore(slot)
    publish(store, tmp_path / "faster", faster, overwrite=False)
    store.calls.clear()
    publish(store, tmp_path / "same", make_run(tmp_path / "same", "one", {"a.json": "1"}), overwrite=False)
    with pytest.raises(ConfigError, match="run one is published there, and this is run two"):
        publish(store, tmp_path / "other", make_run(tmp_path / "other", "two", {"a.json": "2"}), overwrite=False)
    assert store.calls == []
    assert read_published(store) == faster


def test_a_merged_model_is_asked_for_of_a_run_that_has_none(tmp_path: Path, slot: Path) -> None:
    store = WatchedStore(slot)
    publish(store, tmp_path / "run", make_run(tmp_path / "run", "one", {"a.json": "{}"}), overwrite=False)
    assert is_already_published(store, "one", overwrite=False, merge=False)
    with pytest.raises(ConfigError, match=r"SFT_OUTPUT__MERGE=true: this run is published .* without a merged model"):
        is_already_published(store, "one", overwrite=False, merge=True)
    assert not is_already_published(store, "one", overwrite=True, merge=True)
    merged = make_run(tmp_path / "again", "one", {"a.json": "{}", "merged/config.json": "{}"})
    publish(store, tmp_path / "again", merged, overwrite=True)
    assert is_already_published(store, "one", overwrite=False, merge=True)
    assert read_published(store) == merged
