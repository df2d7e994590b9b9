"""Of two jobs on one slot, the second ends or takes over from one that is dead, whatever their clocks say."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from job.errors import ConfigError, UnavailableError
from job.lease import LEASE_PATH, Lease, hold_slot
from job.storage.local import LocalStore

RENEWAL_S = 0.1
STALE_S = 1.0


class SlowStore(LocalStore):
    """A slot on the disk that can be away for a while, and do what another job does just before a write."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), setting="SFT_OUTPUT__URI")
        self.is_away = False
        self.before_swap: Callable[[], object] = lambda: None

    def read(self, path: str) -> bytes | None:
        self._check()
        return super().read(path)

    def swap(self, path: str, content: bytes, version: str | None) -> str | None:
        self._check()
        act, self.before_swap = self.before_swap, lambda: None
        act()
        return super().swap(path, content, version)

    def _check(self) -> None:
        if self.is_away:
            raise UnavailableError("the store is away")


@pytest.fixture
def slot(tmp_path: Path) -> SlowStore:
    return SlowStore(tmp_path / "slot")


def hold(slot: LocalStore, run_id: str = "one") -> AbstractContextManager[Lease]:
    return hold_slot(slot, run_id=run_id, renewal_s=RENEWAL_S, stale_s=STALE_S, look_s=0.02)


def read(slot: LocalStore) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((slot.path / LEASE_PATH).read_text())
    return record


def leave_behind(slot: LocalStore, **changes: object) -> dict[str, Any]:
    """Write the lease of a job that was killed, somewhere else unless `changes` say where."""
    with hold(slot, "dead"):
        record = read(slot) | {"holder": "another", "host": "elsewhere", "pid": 7} | changes
    (slot.path / LEASE_PATH).parent.mkdir()
    (slot.path / LEASE_PATH).write_text(json.dumps(record))
    return record


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_a_lease_is_renewed_and_goes_with_the_job(slot: SlowStore) -> None:
    with hold(slot) as lease:
        first = read(slot)
        assert first["run_id"] == "one"
        wait_until(lambda: read(slot)["renewals"] >= first["renewals"] + 2)
        lease.check()
    assert list(slot.path.iterdir()) == []
    with pytest.raises(ValueError, match="of the block"), hold(slot):
        raise ValueError("of the block")
    assert list(slot.path.iterdir()) == []


def test_a_second_job_ends_and_names_the_first(slot: SlowStore) -> None:
    with hold(slot) as lease:
        first = read(slot)
        began_s = time.monotonic()
        with (
            pytest.raises(ConfigError, match=r"SFT_OUTPUT__URI=.*/slot: the job on .* works there") as caught,
            hold(slot),
        ):
            pytest.fail("two jobs hold the slot")
        assert time.monotonic() - began_s < STALE_S
        for name in ("host", "pid", "run_id", "started_at"):
            assert str(first[name]) in caught.value.message
        assert caught.value.hint
        lease.check()
    with hold(slot):  # and when the first has ended, it may
        pass


def test_a_job_of_this_machine_that_is_dead_is_not_waited_for(slot: SlowStore) -> None:
    program = f"""if True:
        import os
        from job.lease import hold_slot
        from job.storage.local import LocalStore
        with hold_slot(LocalStore({str(slot.path)!r}, setting="X"), run_id="dead"):
            os.kill(os.getpid(), 9)
        """
    dead = subprocess.Popen([sys.executable, "-c", program])
    wait_until(lambda: (slot.path / LEASE_PATH).exists() and "State:\tZ" in status_of(dead.pid))
    began_s = time.monotonic()
    with hold(slot):  # it is not even reaped yet
        assert time.monotonic() - began_s < STALE_S / 2
        assert read(slot)["run_id"] == "one"
    dead.wait()


def status_of(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text()


@pytest.mark.parametrize("change", [{"host": "elsewhere"}, {"boot_id": "another"}, {"pid_namespace": "another"}])
def test_a_lease_that_is_not_renewed_is_stale(slot: SlowStore, change: dict[str, str]) -> None:
    with hold(slot):
        mine = read(slot)
    here = {name: mine[name] for name in ("host", "boot_id", "pid_namespace")}
    # Its clock is a year ahead, which means nothing.
    leave_behind(slot, **(here | change), process_start=1, started_at="2999-01-01T00:00:00+00:00")
    began_s = time.monotonic()
    with hold(slot) as lease:
        assert STALE_S <= time.monotonic() - began_s < STALE_S + 1
        assert read(slot)["run_id"] == "one"
        lease.check()


def test_a_process_id_that_belongs_to_another_process_now(slot: SlowStore) -> None:
    with hold(slot):
        mine = read(slot)
    leave_behind(slot, **(mine | {"holder": "another", "process_start": mine["process_start"] - 1}))
    began_s = time.monotonic()
    with hold(slot):
        assert time.monotonic() - began_s < STALE_S / 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"run_id": "one"}'])
def test_what_is_no_lease_is_watched_and_replaced(
    slot: SlowStore, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    (slot.path / LEASE_PATH).parent.mkdir(parents=True)
    (slot.path / LEASE_PATH).write_text(content)
    began_s = time.monotonic()
    with hold(slot):
        assert time.monotonic() - began_s >= STALE_S
        assert read(slot)["run_id"] == "one"
    assert "holds no lease that this job can read" in caplog.text


def test_of_several_that_wait_for_a_stale_lease_one_takes_it_over(slot: SlowStore) -> None:
    leave_behind(slot)
    ends: list[str] = []
    done = threading.Barrier(4)

    def start() -> None:
        try:
            with hold(LocalStore(str(slot.path), setting="SFT_OUTPUT__URI")):
                ends.append("held")
                done.wait()
        except ConfigError:
            ends.append("refused")
            done.wait()

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(ends) == ["held", "refused", "refused", "refused"]


def test_a_job_that_was_taken_over_from_learns_of_it_and_leaves_the_other_s_lease(slot: SlowStore) -> None:
    with hold(slot) as lease:
        theirs = json.dumps(read(slot) | {"holder": "another", "host": "elsewhere"})
        # While this job was frozen: a check right afterwards finds it, before any renewal does.
        (slot.path / LEASE_PATH).write_text(theirs)
        with pytest.raises(UnavailableError, match="taken over by the job on elsewhere"):
            lease.check()
        wait_until(lambda: "lease" not in {thread.name for thread in threading.enumerate()})
        with pytest.raises(UnavailableError, match="taken over by the job on elsewhere"):
            lease.check()
    assert (slot.path / LEASE_PATH).read_text() == theirs


def test_a_renewal_that_comes_too_late_changes_nothing(slot: SlowStore) -> None:
    with hold(slot) as lease:
        theirs = json.dumps(read(slot) | {"holder": "another", "host": "elsewhere"})
        slot.before_swap = lambda: (slot.path / LEASE_PATH).write_text(theirs)
        wait_until(lambda: "lease" not in {thread.name for thread in threading.enumerate()})
        assert (slot.path / LEASE_PATH).read_text() == theirs
        with pytest.raises(UnavailableError, match="elsewhere"):
            lease.check()


def test_a_store_that_is_away_does_not_end_the_job(slot: SlowStore, caplog: pytest.LogCaptureFixture) -> None:
    with hold(slot) as lease:
        slot.is_away = True
        wait_until(lambda: "can't be renewed" in caplog.text)
        before = read(slot)
        lease.check()
        slot.is_away = False
        wait_until(lambda: read(slot)["renewals"] > before["renewals"])
        assert caplog.text.count("can't be renewed") == 1
    assert list(slot.path.iterdir()) == []


def test_a_lease_that_somebody_removed_is_written_again(slot: SlowStore) -> None:
    with hold(slot) as lease:
        slot.delete(LEASE_PATH)
        lease.check()
        wait_until((slot.path / LEASE_PATH).exists)
    assert list(slot.path.iterdir()) == []


def test_a_slot_that_was_cleared_in_the_end_is_no_error(slot: SlowStore, caplog: pytest.LogCaptureFixture) -> None:
    with hold_slot(slot, run_id="one"):
        slot.delete(LEASE_PATH)
    assert list(slot.path.iterdir()) == []
    assert caplog.text == ""
