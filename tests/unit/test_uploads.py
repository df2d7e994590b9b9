"""Uploads of checkpoints: one at a time, the newest, and a store that is away ends nothing."""

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from job.checkpoints import uploads as module
from job.checkpoints.stored import step_folder
from job.checkpoints.uploads import Uploads
from job.errors import UnavailableError
from job.handover import SAVED_STEP, SavedStep


class Commits:
    """Stands for the store: notes what is put into it, waits while `gate` is closed, and fails as often as told."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.failures = 0
        self.running = 0
        self.most_at_once = 0

    def __call__(self, folder: Path, saved: SavedStep) -> None:
        self.running += 1
        self.most_at_once = max(self.most_at_once, self.running)
        assert self.gate.wait(10)
        self.running -= 1
        if self.failures:
            self.failures -= 1
            raise UnavailableError("the store is away")
        assert (folder / "tensors").read_text() == str(saved.step)
        self.steps.append(saved.step)


@pytest.fixture
def commits() -> Commits:
    return Commits()


@pytest.fixture
def uploads(commits: Commits, tmp_path: Path) -> Iterator[Uploads]:
    with Uploads(tmp_path, commits, newest_step=None, grace_s=30) as begun:
        yield begun


def save(folder: Path, step: int, save_s: float = 0.1) -> None:
    partial = folder / f"{step_folder(step)}.partial"
    partial.mkdir()
    (partial / "tensors").write_text(str(step))
    (partial / SAVED_STEP).write_text(SavedStep(step=step, world_size=1, save_s=save_s).model_dump_json())
    partial.rename(folder / step_folder(step))


def poll_until(uploads: Uploads, commits: Commits, steps: list[int]) -> None:
    deadline_s = time.monotonic() + 10
    while commits.steps != steps:
        assert time.monotonic() < deadline_s, commits.steps
        uploads.poll()
        time.sleep(0.01)


def test_only_the_newest_goes_and_one_at_a_time(uploads: Uploads, commits: Commits, tmp_path: Path) -> None:
    uploads.poll()
    commits.gate.clear()
    save(tmp_path, 1)
    uploads.poll()
    for step in (2, 3):
        save(tmp_path, step)
        uploads.poll()
    commits.gate.set()
    uploads.flush(10)
    assert commits.steps == [1, 3]
    assert commits.most_at_once == 1
    assert uploads.newest_step == 3


def test_nothing_piles_up_on_the_disk(uploads: Uploads, commits: Commits, tmp_path: Path) -> None:
    save(tmp_path, 1)
    uploads.flush(10)
    assert list(tmp_path.iterdir()) == []


def test_a_half_one_is_left_to_the_workers(uploads: Uploads, commits: Commits, tmp_path: Path) -> None:
    (tmp_path / "step-00000001.partial").mkdir()
    uploads.flush(10)
    assert commits.steps == []
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.partial"]


def test_a_failure_is_a_warning_and_tried_again(
    uploads: Uploads,
    commits: Commits,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, "_RETRY_S", 0.2)
    commits.failures = 2
    save(tmp_path, 1)
    with caplog.at_level(logging.WARNING):
        poll_until(uploads, commits, [1])
    assert caplog.text.count("step-00000001 is not in the store") == 2
    assert "the store is away" in caplog.text


def test_a_newer_one_takes_the_place_of_one_that_failed(uploads: Uploads, commits: Commits, tmp_path: Path) -> None:
    commits.failures = 1
    save(tmp_path, 1)
    uploads.flush(10)
    save(tmp_path, 2)
    poll_until(uploads, commits, [2])


def test_flush_gives_up_in_time(uploads: Uploads, commits: Commits, tmp_path: Path) -> None:
    commits.gate.clear()
    save(tmp_path, 1)
    uploads.flush(0.3)
    assert uploads.newest_step is None
    commits.gate.set()


def test_a_bug_is_not_swallowed(tmp_path: Path) -> None:
    def fail(folder: Path, saved: SavedStep) -> None:
        raise ZeroDivisionError

    with Uploads(tmp_path, fail, newest_step=None, grace_s=30) as uploads:
        save(tmp_path, 1)
        with pytest.raises(ZeroDivisionError):
            uploads.flush(10)


def test_a_grace_period_that_is_too_short_is_warned_of_once(
    commits: Commits, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Uploads(tmp_path, commits, newest_step=3, grace_s=30) as uploads, caplog.at_level(logging.WARNING):
        for step in (4, 5):
            save(tmp_path, step, save_s=40)
            uploads.flush(10)
    assert caplog.text.count("SFT_RUNTIME__GRACE_SECONDS=30") == 1
