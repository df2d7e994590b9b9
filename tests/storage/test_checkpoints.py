"""Checkpoints in a store: whole or not at all, the newest first, and damage is noticed and passed over."""

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from job.checkpoints.resume import fetch_newest
from job.checkpoints.stored import FINISHED, Checkpoint, CheckpointStore, step_folder
from job.errors import DamagedError, UnavailableError
from job.storage import open_store

CONTENT = {"tensors.safetensors": b"\1\2\3" * 100_000, "training.json": b"{}", "adapter/config.json": b"[]"}


def describe(step: int, run_id: str = "run") -> Checkpoint:
    return Checkpoint(
        run_id=run_id, step=step, world_size=1, created_at="now", job_version="1", plan={"steps": 9}, run={}
    )


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> CheckpointStore:
    uri = str(tmp_path / "slot" / "checkpoint")
    if request.param == "s3":
        request.getfixturevalue("s3_environment")
        uri = f"s3://{request.getfixturevalue('bucket')}/slot/checkpoint"
    return CheckpointStore(open_store(uri, setting="SFT_CHECKPOINT__URI"))


@pytest.fixture
def commit(store: CheckpointStore, tmp_path: Path) -> Callable[..., str]:
    """Commits a checkpoint whose content names its step; returns its name."""

    def make(step: int, *, name: str | None = None, run_id: str = "run") -> str:
        folder = tmp_path / "saved" / "taken"
        shutil.rmtree(folder, ignore_errors=True)
        for path, content in CONTENT.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content + str(step).encode())
        name = name or step_folder(step)
        store.commit(folder, name, describe(step, run_id))
        return name

    return make


def put(store: CheckpointStore, path: str, content: bytes, scratch: Path) -> None:
    (scratch / "altered").write_bytes(content)
    store.store.put(scratch / "altered", path)


def paths(store: CheckpointStore) -> list[str]:
    return [file.path for file in store.store.find()]


def test_comes_back_as_it_was(store: CheckpointStore, commit: Callable[..., str], tmp_path: Path) -> None:
    assert store.names() == []
    name = commit(7)
    checkpoint = store.read(name)
    assert (checkpoint.step, checkpoint.run_id, checkpoint.plan) == (7, "run", {"steps": 9})
    assert {file.path for file in checkpoint.files} == set(CONTENT)
    target = tmp_path / "resume"
    target.mkdir()
    (target / "stale").touch()
    store.fetch(name, checkpoint, target)
    found = {path.relative_to(target).as_posix(): path.read_bytes() for path in target.rglob("*") if path.is_file()}
    assert found == {path: content + b"7" for path, content in CONTENT.items()}
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("checkpoint-")) == []


def test_newest_first_and_only_what_is_committed(
    store: CheckpointStore, commit: Callable[..., str], tmp_path: Path
) -> None:
    for step in (9, 100_000_000, 10):
        commit(step)
    commit(100, name=FINISHED)
    put(store, "step-00000011/tensors.safetensors", b"half", tmp_path)
    put(store, "memory.json", b"{}", tmp_path)
    assert store.names() == [FINISHED, "step-100000000", "step-00000010", "step-00000009"]


def test_an_upload_that_breaks_off_leaves_no_checkpoint_and_no_older_word(
    store: CheckpointStore, commit: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = commit(4)
    place = store.store.put_all

    def break_off(files: Sequence[tuple[Path, str]]) -> None:
        place([(source, path) for source, path in files if not path.endswith("training.json")])
        raise UnavailableError("the network is down")

    monkeypatch.setattr(store.store, "put_all", break_off)
    with pytest.raises(UnavailableError):
        commit(4)
    assert store.names() == []
    with pytest.raises(DamagedError):
        store.read(name)


def test_retention_keeps_the_newest_and_clears_what_is_half(
    store: CheckpointStore, commit: Callable[..., str], tmp_path: Path
) -> None:
    for step in (1, 2, 4, 5, 9):
        commit(step)
    put(store, "step-00000003/tensors.safetensors", b"half", tmp_path)
    put(store, "memory.json", b"{}", tmp_path)
    store.retain(2, newest_step=5)  # 9 was passed over
    kept = ["step-00000009", "step-00000005", "step-00000004"]
    assert store.names() == kept
    assert {path.split("/")[0] for path in paths(store)} == {*kept, "memory.json"}
    commit(4, name=FINISHED)
    commit(7, run_id="other")
    store.clear("run")
    assert {path.split("/")[0] for path in paths(store)} == {"memory.json", "step-00000007"}


DAMAGES: dict[str, Callable[[CheckpointStore, Path], None]] = {
    "altered": lambda store, scratch: put(store, "step-00000006/training.json", b"{ }6", scratch),
    "cut off": lambda store, scratch: put(
        store, "step-00000006/tensors.safetensors", CONTENT["tensors.safetensors"], scratch
    ),
    "missing": lambda store, scratch: store.store.delete("step-00000006/adapter/config.json"),
    "no word": lambda store, scratch: put(store, "step-00000006/checkpoint.json", b"", scratch),
    "another version's word": lambda store, scratch: put(
        store, "step-00000006/checkpoint.json", b'{"schema_version": 2}', scratch
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_passed_over(
    store: CheckpointStore,
    commit: Callable[..., str],
    damage: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for step in (4, 5, 6):
        commit(step)
    DAMAGES[damage](store, tmp_path)
    prepared = cast(Any, SimpleNamespace(checkpoints=store, inputs=SimpleNamespace(run_id="run")))
    with caplog.at_level(logging.WARNING):
        newest = fetch_newest(prepared, tmp_path / "resume")
    assert newest is not None
    assert newest.step == 5
    assert "step-00000006" in caplog.text
    assert (tmp_path / "resume" / "training.json").read_bytes() == b"{}5"


def test_nothing_is_left_of_one_that_is_damaged_where_there_is_no_other(
    store: CheckpointStore, commit: Callable[..., str], tmp_path: Path
) -> None:
    commit(6)
    DAMAGES["cut off"](store, tmp_path)
    prepared = cast(Any, SimpleNamespace(checkpoints=store, inputs=SimpleNamespace(run_id="run")))
    assert fetch_newest(prepared, tmp_path / "resume") is None
    assert not (tmp_path / "resume").exists()


def test_another_runs_gives_way(store: CheckpointStore, commit: Callable[..., str], tmp_path: Path) -> None:
    commit(8, run_id="other")
    commit(3)
    prepared = cast(Any, SimpleNamespace(checkpoints=store, inputs=SimpleNamespace(run_id="run")))
    newest = fetch_newest(prepared, tmp_path / "resume")
    assert newest is not None
    assert newest.step == 3
    assert store.names() == ["step-00000003"]
