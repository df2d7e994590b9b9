"""Where a run's slot is, and where that is kept which changes while it goes on."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from job.checkpoints.stored import FINISHED, Checkpoint, CheckpointStore
from job.errors import ConfigError
from job.settings_groups import OutputSettings
from job.slot import is_finished, keep_bad_rows, open_checkpoints, open_slot, open_workplace
from job.storage.local import LocalStore

RUN = "0123456789abcdef"


def open_places(output: str, checkpoints: str | None, work_dir: Path) -> tuple[str, str, str]:
    slot = open_slot(OutputSettings(uri=output), RUN)
    workplace = open_workplace(slot, checkpoints, RUN, work_dir)
    return slot.uri, workplace.uri, open_checkpoints(checkpoints, workplace, RUN).uri


def test_a_slot_that_takes_single_files_is_its_own_workplace(tmp_path: Path) -> None:
    slot = f"{tmp_path}/slot"
    assert open_places(slot, None, tmp_path) == (slot, slot, f"{slot}/checkpoint")
    assert open_places(slot, f"{tmp_path}/c/{{run_id}}", tmp_path) == (slot, slot, f"{tmp_path}/c/{RUN}")


def test_beside_the_hub_the_checkpoints_place_is_the_workplace(tmp_path: Path) -> None:
    place = f"{tmp_path}/c/{RUN}"
    assert open_places("hf://o/n-{run_id}", f"{tmp_path}/c/{{run_id}}", tmp_path) == (f"hf://o/n-{RUN}", place, place)


def test_else_each_slot_on_the_hub_has_a_folder_here(tmp_path: Path) -> None:
    places = {open_places(uri, None, tmp_path)[1:] for uri in ("hf://o/n", "hf://o/n@v2", "hf://o/n2", "hf://o/n")}
    assert len(places) == 3
    for workplace, checkpoints in places:
        assert Path(workplace).parent == tmp_path / "slots"
        assert checkpoints == f"{workplace}/checkpoint"


def test_bad_rows_are_kept_here(tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    rows.write_text("{}")
    workplace = open_workplace(open_slot(OutputSettings(uri="hf://o/n"), RUN), None, RUN, tmp_path)
    assert Path(keep_bad_rows(workplace, rows)).read_text() == "{}"


def test_a_repository_that_can_not_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="SFT_OUTPUT__URI=hf://spaces/n: not a place on the Hub"):
        open_slot(OutputSettings.model_construct(uri="hf://spaces/n"), RUN)


@pytest.mark.parametrize(
    ("takes_commits", "kept", "nodes", "finished"),
    [
        (True, RUN, 1, False),  # killed between the commit and the reading back
        (True, RUN, 2, True),
        (True, "another run", 1, True),
        (True, None, 1, True),
        (False, RUN, 1, True),  # killed after the manifest, which comes last there
    ],
)
def test_a_commit_counts_when_it_was_read_back(
    tmp_path: Path, takes_commits: bool, kept: str | None, nodes: int, finished: bool
) -> None:
    manifest = json.dumps({"run_id": RUN, "files": []}).encode()
    slot = cast(Any, SimpleNamespace(uri="hf://o/n", takes_commits=takes_commits, read=lambda name: manifest))
    checkpoints = CheckpointStore(LocalStore(str(tmp_path / "checkpoint"), setting="SFT_CHECKPOINT__URI"))
    if kept is not None:
        (tmp_path / "finished").mkdir()
        checkpoint = Checkpoint(run_id=kept, step=1, world_size=1, created_at="", job_version="", plan={}, run={})
        checkpoints.commit(tmp_path / "finished", FINISHED, checkpoint)
    output = OutputSettings(uri="hf://o/n")
    assert is_finished(slot, checkpoints, RUN, output, nodes=nodes) == finished
