"""The manifest comes last, and its presence means that everything it lists is there and whole."""

import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import job.patience
from job.errors import ConfigError, InternalError, UnavailableError
from job.settings_groups import OutputSettings
from job.slot import check_slot, is_already_published, open_slot, read_published
from job.storage import Progress, StoredFile
from job.storage.local import LocalStore
from job.upload import publish as publish_files

UNLISTED = "checkpoint/unlisted.json"
LATER = ("card", "report")  # described when the rest was read back


class Killed(BaseException):
    """What a test raises where the job is killed."""


class WatchedStore:
    """A LocalStore that remembers its calls and may damage what is put into it, lose it, be away, or kill the job."""

    def __init__(
        self,
        folder: Path,
        *,
        damaged: str = "",
        lost: str = "",
        faults: int = 1000,
        away: int = 0,
        killed_at: tuple[int, bool] = (-1, False),
    ) -> None:
        self._inner = LocalStore(str(folder), setting="SFT_OUTPUT__URI")
        self.uri = self._inner.uri
        self._damaged = damaged
        self._lost = lost
        self._faults = faults
        self.away = away
        self._killed_at = killed_at
        self._count = 0
        self.calls: list[tuple[str, str]] = []

    def find(self) -> list[StoredFile]:
        with self._act():
            return self._inner.find()

    def fetch(self, files: list[StoredFile], folder: Path, progress: Progress) -> list[Path]:
        self.calls += [("fetch", file.path) for file in files]
        with self._act():
            return self._inner.fetch(files, folder, progress)

    def revision(self, files: list[StoredFile]) -> str:
        return self._inner.revision(files)

    def put(self, source: Path, path: str) -> None:
        self.calls.append(("put", path))
        with self._act():
            if path in (self._lost, self._damaged) and self._faults > 0:
                self._faults -= 1
                if path == self._lost:
                    return
                source = source.with_name("damaged")
                source.write_bytes(b"damaged")
            self._inner.put(source, path)

    def read(self, path: str) -> bytes | None:
        with self._act():
            return self._inner.read(path)

    def read_version(self, path: str) -> tuple[bytes, str] | None:
        return self._inner.read_version(path)

    def swap(self, path: str, content: bytes, version: str | None) -> str | None:
        return self._inner.swap(path, content, version)

    def delete(self, path: str) -> None:
        self.calls.append(("delete", path))
        with self._act():
            self._inner.delete(path)

    def check_writable(self) -> None:
        self._inner.check_writable()

    @contextmanager
    def _act(self) -> Iterator[None]:
        if self.away > 0:
            self.away -= 1
            raise UnavailableError("the store is away")
        number, is_done = self._killed_at
        self._count += 1
        if self._count == number and not is_done:
            raise Killed
        yield
        if self._count == number:
            raise Killed


def make_run(folder: Path, run_id: str, files: dict[str, str]) -> dict[str, Any]:
    """Write the files of a run, and return its manifest."""
    folder.mkdir()
    listed = []
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
        listed.append({"path": name, "sha256": hashlib.sha256(content.encode()).hexdigest(), "bytes": len(content)})
    return {"run_id": run_id, "files": listed}


def publish(
    store: WatchedStore,
    folder: Path,
    manifest: dict[str, Any],
    *,
    overwrite: bool,
    accept: Callable[[Path], object] = lambda _: None,
    check_lease: Callable[[], None] = lambda: None,
) -> None:
    """Publish, with the files that are called `card` and the like as what is written at the end."""

    def complete(read_back: Path) -> dict[str, Any]:
        accept(read_back)
        return manifest

    names = [file["path"] for file in manifest["files"]]
    publish_files(
        store,
        folder,
        names,
        complete,
        run_id=manifest["run_id"],
        later=LATER,
        overwrite=overwrite,
        check_lease=check_lease,
    )


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made, none of which takes any time."""
    made: list[float] = []
    now_s = [0.0]

    def sleep(pause_s: float) -> None:
        made.append(pause_s)
        now_s[0] += pause_s

    monkeypatch.setattr(job.patience.time, "sleep", sleep)
    monkeypatch.setattr(job.patience.time, "monotonic", lambda: now_s[0])
    return made


@pytest.fixture
def slot(tmp_path: Path) -> Path:
    return tmp_path / "slot"


def test_everything_is_read_back_before_the_manifest_is_written(tmp_path: Path, slot: Path) -> None:
    manifest = make_run(tmp_path / "run", "one", {"b.bin": "weights", "a.json": "{}", "sub/c": "x"})
    store = WatchedStore(slot)
    publish(store, tmp_path / "run", manifest, overwrite=True)
    assert store.calls[-2:] == [("put", "manifest.json"), ("delete", UNLISTED)]
    assert sorted(store.calls[4:-2]) == [("fetch", "a.json"), ("fetch", "b.bin"), ("fetch", "sub/c")]
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
    assert store.calls[:3] == [("put", UNLISTED), ("delete", "manifest.json"), ("delete", "stale")]
    assert store.calls[-2:] == [("put", "manifest.json"), ("delete", UNLISTED)]
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
        lambda: check_slot(OutputSettings(uri=str(slot))),
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
    assert open_slot(OutputSettings(uri=f"{tmp_path}/{{run_id}}/x"), "abc").uri == f"{tmp_path}/abc/x"
    check_slot(OutputSettings(uri=f"{tmp_path}/out/{{run_id}}"))
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


def test_what_was_read_back_is_judged_before_it_is_described(tmp_path: Path, slot: Path) -> None:
    files = {"adapter/weights": "weights", "a.json": "{}", "merged/model": "large", "card": "made later"}
    manifest = make_run(tmp_path / "run", "one", files)
    store = WatchedStore(slot)

    def refuse(read_back: Path) -> None:
        assert names(read_back) == {"adapter/weights", "a.json"}
        assert (read_back / "adapter/weights").read_text() == "weights"
        assert names(slot) == {"adapter/weights", "a.json", "merged/model", UNLISTED}
        raise InternalError("another adapter")

    with pytest.raises(InternalError, match="another adapter"):
        publish(store, tmp_path / "run", manifest, overwrite=False, accept=refuse)
    assert read_published(store) is None
    publish(store, tmp_path / "run", manifest, overwrite=False)
    assert consistent(store, slot) == "one"
    assert [path for path in tmp_path.iterdir() if path.name.startswith("read-back")] == []


def test_a_page_that_lay_there_before_is_published_as_it_was_made_at_the_end(tmp_path: Path, slot: Path) -> None:
    manifest = make_run(tmp_path / "run", "one", {"a.json": "{}", "card": "as it is in the end"})
    (tmp_path / "run" / "card").write_text("what a library left there")
    make = (tmp_path / "run" / "card").write_text
    publish(
        WatchedStore(slot), tmp_path / "run", manifest, overwrite=False, accept=lambda _: make("as it is in the end")
    )
    assert consistent(WatchedStore(slot), slot) == "one"


def consistent(store: WatchedStore, slot: Path) -> str | None:
    """Check that all a manifest lists is there and whole; return its run, or None where there is no manifest."""
    manifest = read_published(store)
    if manifest is None:
        return None
    for file in manifest["files"]:
        assert hashlib.sha256((slot / file["path"]).read_bytes()).hexdigest() == file["sha256"]
    run_id: str = manifest["run_id"]
    return run_id


def test_killed_at_any_moment_a_publication_is_whole_or_none_and_the_next_start_completes_it(tmp_path: Path) -> None:
    old = make_run(tmp_path / "old", "one", {"kept": "1", "stale": "2", "merged/stale": "3"})
    new = make_run(tmp_path / "new", "two", {"kept": "4", "added": "5"})
    other = make_run(tmp_path / "other", "three", {"else": "6"})
    found = set()
    for number, is_done in itertools.product(range(1, 100), (False, True)):
        slot = tmp_path / f"slot-{number}-{is_done}"
        publish(WatchedStore(slot), tmp_path / "old", old, overwrite=True)
        try:
            publish(WatchedStore(slot, killed_at=(number, is_done)), tmp_path / "new", new, overwrite=True)
        except Killed:
            pass
        else:
            assert number > 15
            break
        found.add(consistent(WatchedStore(slot), slot))
        # The next start may be of the same run, or of another one.
        run_id, folder, manifest = ("two", "new", new) if number % 2 else ("three", "other", other)
        publish(WatchedStore(slot), tmp_path / folder, manifest, overwrite=True)
        assert consistent(WatchedStore(slot), slot) == run_id
        left = names(slot) - {UNLISTED}  # a kill after the manifest leaves it
        assert left == {file["path"] for file in manifest["files"]} | {"manifest.json"}
    assert found == {"one", None, "two"}


@pytest.mark.parametrize("seed", range(5))
def test_any_number_of_starts_in_any_order_ends_in_one_adapter(tmp_path: Path, slot: Path, seed: int) -> None:
    chance = random.Random(seed)
    runs = [
        make_run(tmp_path / f"{number}", "same", {"a": "weights", "b": "{}", "card": f"made by start {number}"})
        for number in range(20)
    ]
    for number, manifest in enumerate(runs):
        store = WatchedStore(slot, killed_at=(chance.randint(1, 25), chance.random() < 0.5))
        try:
            publish(store, tmp_path / f"{number}", manifest, overwrite=False)
        except Killed:
            continue
    last = len(runs) - 1
    publish(WatchedStore(slot), tmp_path / f"{last}", runs[last], overwrite=False)
    assert consistent(WatchedStore(slot), slot) == "same"
    assert names(slot) - {UNLISTED} == {"a", "b", "card", "manifest.json"}


def test_a_slot_that_is_away_is_waited_for(
    tmp_path: Path, slot: Path, pauses: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    store = WatchedStore(slot, away=5)
    publish(store, tmp_path / "run", make_run(tmp_path / "run", "one", {"a": "1"}), overwrite=False)
    assert consistent(store, slot) == "one"
    assert pauses == [2, 4, 8, 16, 32]
    assert "the store is away; trying again in 2 s, and for up to 300 s in all" in caplog.text


def test_a_slot_that_stays_away_is_given_up_after_five_minutes(tmp_path: Path, slot: Path, pauses: list[float]) -> None:
    store = WatchedStore(slot, away=1000)
    with pytest.raises(UnavailableError, match="the store is away"):
        publish(store, tmp_path / "run", make_run(tmp_path / "run", "one", {"a": "1"}), overwrite=False)
    assert sum(pauses) == 300
    assert max(pauses) == 60


@pytest.mark.parametrize("fault", [{"damaged": "b.bin"}, {"lost": "b.bin"}, {"damaged": "manifest.json"}])
def test_what_reads_back_differently_is_written_again(tmp_path: Path, slot: Path, fault: dict[str, str]) -> None:
    manifest = make_run(tmp_path / "run", "one", {"a.json": "{}", "b.bin": "weights"})
    store = WatchedStore(slot, faults=2, **fault)
    publish(store, tmp_path / "run", manifest, overwrite=False)
    assert consistent(store, slot) == "one"
    assert store.calls.count(("put", "a.json")) == 1
    (name,) = fault.values()
    assert store.calls.count(("put", name)) == 3


def test_a_job_that_lost_the_slot_writes_nothing_more(tmp_path: Path, slot: Path) -> None:
    manifest = make_run(tmp_path / "run", "one", {"a": "1", "b": "2", "c": "3"})
    store = WatchedStore(slot)

    def check_lease() -> None:
        if ("put", "b") in store.calls:
            raise UnavailableError("taken over")

    with pytest.raises(UnavailableError, match="taken over"):
        publish(store, tmp_path / "run", manifest, overwrite=False, check_lease=check_lease)
    assert names(slot) == {"a", "b", UNLISTED}


@pytest.mark.parametrize("content", ["", "{", "{}", "[1]"])
def test_a_list_of_files_that_is_none_is_no_obstacle(tmp_path: Path, slot: Path, content: str) -> None:
    (slot / UNLISTED).parent.mkdir(parents=True)
    (slot / UNLISTED).write_text(content)
    publish(WatchedStore(slot), tmp_path / "run", make_run(tmp_path / "run", "one", {"a": "1"}), overwrite=False)
    assert names(slot) == {"a", "manifest.json"}
