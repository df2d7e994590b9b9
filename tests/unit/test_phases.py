"""Phases add up to all of the time, a worker's among them, whatever became of it."""

import re
import time
from pathlib import Path

import psutil
import pytest

from job import phases
from job.phases import OTHER, PHASES, Phases, describe_phases


def test_phases_add_up_to_all_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    record = Phases("start", 97.5)
    record.enter("listing")
    now_s = 101.0
    record.enter("download")
    now_s = 104.0
    record.enter("download")  # goes on
    now_s = 105.0
    record.enter("listing")
    now_s = 105.5
    assert record.add_up() == {"start": 2.5, "listing": 1.5, "download": 4.0, OTHER: 0.0}


def test_a_workers_phases_take_the_place_of_the_wait_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 10.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    monkeypatch.setattr(phases, "_phases", Phases("starting workers", 10.0))
    file = tmp_path / "phases.jsonl"
    worker = Phases("importing", 12.0, file)
    now_s = 15.0
    worker.enter("steps")
    with file.open("a") as half:
        half.write('["sav')  # it was killed
    now_s = 21.0
    phases.enter_phase("uploading")
    phases.take_over_phases(file)
    phases.take_over_phases(tmp_path / "none")  # of a worker that never came so far
    assert phases.add_up_phases() == {"starting workers": 2.0, "importing": 3.0, "steps": 6.0, OTHER: 0.0}


def test_the_phase_before_goes_on_after_one_within_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases, "_phases", Phases("listing", time.monotonic()))
    with phases.phase("download"):
        assert phases._phases.current == "download"
    assert phases._phases.current == "listing"


def test_a_full_disk_costs_the_record_and_nothing_else() -> None:
    worker = Phases("importing", time.monotonic(), Path("/dev/full"))
    worker.enter("steps")
    assert worker.current == "steps"


def test_the_record_begins_with_the_process() -> None:
    age_s = time.monotonic() - phases._find_process_start()
    assert age_s == pytest.approx(time.time() - psutil.Process().create_time(), abs=2)  # its boot time is whole seconds


def test_every_phase_that_is_entered_has_a_name_and_a_meaning() -> None:
    root = Path(phases.__file__).parent
    entered = {
        name
        for path in root.rglob("*.py")
        for names in re.findall(r'(?:enter_phase|begin_phases|\bphase)\(\s*"([^"]+)"|phase="([^"]+)"', path.read_text())
        for name in names
        if name
    }
    assert entered | {"start"} == PHASES.keys()


def test_the_longest_come_first_and_the_shortest_are_left_out() -> None:
    text = describe_phases({"start": 1.0, "steps": 8.96, "planning": 0.04, OTHER: 0.0})
    assert text == "10.0 s in all: steps 9.0 s (90%), start 1.0 s (10%)"
