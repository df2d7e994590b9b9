"""What a start takes over from the checkpoints that it finds, and which it refuses to touch."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from job.checkpoints.resume import adopt_plan, refuse_another_runs
from job.checkpoints.stored import Checkpoint, CheckpointStore, step_folder
from job.errors import ConfigError
from job.handover import RunFolder
from job.nodes.identity import name_differences
from job.nodes.node import Node
from job.nodes.peers import Peers
from job.plan import TrainPlan
from job.storage.local import LocalStore

PlanFor = Callable[..., TrainPlan]


class Adopting:
    """A prepared run of a plan, with one checkpoint of another plan in its store."""

    def __init__(self, folder: Path, plan: TrainPlan, begun: TrainPlan | None, *, run_id: str = "run") -> None:
        self.plan = plan
        self.inputs = SimpleNamespace(run_id="run")
        self.checkpoints = CheckpointStore(LocalStore(str(folder / "checkpoint"), setting="SFT_CHECKPOINT__URI"))
        self.folder = RunFolder(folder / "run")
        if begun is not None:
            saved = folder / "saved" / "taken"
            saved.mkdir(parents=True)
            checkpoint = Checkpoint(
                run_id=run_id,
                step=4,
                world_size=begun.world_size,
                created_at="now",
                job_version="1",
                plan=begun.model_dump(mode="json"),
                run={},
            )
            self.checkpoints.commit(saved, step_folder(4), checkpoint)

    def hand_over_again(self, folder: RunFolder, plan: TrainPlan) -> "Adopting":
        assert folder == self.folder
        self.plan = plan
        return self

    def adopt(self) -> TrainPlan:
        return adopt_plan(cast(Any, self), self.folder, Peers(Node(0, 1, "", 1, 1.0))).plan


def test_a_start_without_checkpoints_keeps_its_plan(plan_for: PlanFor, tmp_path: Path) -> None:
    plan = plan_for()
    assert Adopting(tmp_path, plan, None).adopt() is plan


def test_the_same_machine_keeps_its_plan(plan_for: PlanFor, tmp_path: Path) -> None:
    plan = plan_for()
    assert Adopting(tmp_path, plan, plan_for()).adopt() is plan


def test_another_runs_checkpoint_is_no_example(plan_for: PlanFor, tmp_path: Path) -> None:
    plan = plan_for()
    begun = plan_for(PARALLEL__PROCESSES=6)
    assert begun.global_batch_size != plan.global_batch_size
    assert Adopting(tmp_path, plan, begun, run_id="other").adopt() is plan


def test_the_batch_stays_when_processes_become_fewer(plan_for: PlanFor, tmp_path: Path) -> None:
    begun, plan = plan_for(PARALLEL__PROCESSES=6), plan_for(PARALLEL__PROCESSES=4)
    assert (begun.global_batch_size, plan.global_batch_size) == (12, 8)
    adopted = Adopting(tmp_path, plan, begun).adopt()
    for name in ("global_batch_size", "steps", "epochs", "warmup_steps"):
        assert getattr(adopted, name) == getattr(begun, name)
        assert adopted.sources[name] == "the checkpoint" or getattr(plan, name) == getattr(begun, name)
    assert adopted.micro_batch_size * adopted.gradient_accumulation_steps * adopted.world_size == 12
    assert adopted.micro_batch_size <= plan.micro_batch_size
    assert adopted.processes == 4


def test_processes_that_cannot_share_the_batch(plan_for: PlanFor, tmp_path: Path) -> None:
    begun, plan = plan_for(PARALLEL__PROCESSES=6), plan_for(PARALLEL__PROCESSES=5)
    with pytest.raises(ConfigError, match="a global batch of 12, which 5 processes can't share") as caught:
        Adopting(tmp_path, plan, begun).adopt()
    assert "divides 12" in caught.value.hint


def describe(*files: tuple[str, str], **values: Any) -> dict[str, Any]:
    data = [{"setting": "SFT_DATA__URI", "uri": uri, "sha256": sha256 * 16, "weight": 1.0} for uri, sha256 in files]
    return {"values": values, "data": data, "plan": {}}


def test_what_names_a_run_is_compared() -> None:
    first = describe(("s3://b/a.jsonl", "aaaa"), ("s3://b/b.jsonl", "bbbb"), SFT_TRAIN__SEED=1, SFT_PARALLEL__NODES=1)
    assert name_differences(first, first) == []
    changed = describe(("s3://b/a.jsonl", "cccc"), SFT_TRAIN__SEED=2, SFT_PARALLEL__NODES=2)
    assert name_differences(changed, first) == [
        "SFT_TRAIN__SEED is 2, and was 1",
        "SFT_DATA__URI=s3://b/a.jsonl has sha256 cccccccccccccccc..., and had sha256 aaaaaaaaaaaaaaaa...",
        "SFT_DATA__URI=s3://b/b.jsonl is no more among the data",
    ]


@pytest.mark.parametrize("overwrite", [False, True])
def test_another_runs_checkpoints_are_refused(
    plan_for: PlanFor, tmp_path: Path, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: Any = Adopting(tmp_path, plan_for(), plan_for(), run_id="other")
    prepared.settings = SimpleNamespace(output=SimpleNamespace(overwrite=overwrite))
    old, new = describe(("/a.jsonl", "aaaa")), describe(("/a.jsonl", "bbbb"))
    [name] = prepared.checkpoints.names()
    checkpoint = prepared.checkpoints.read(name).model_copy(update={"run": old})
    prepared.checkpoints.commit(tmp_path / "saved" / "taken", name, checkpoint)
    monkeypatch.setattr("job.checkpoints.resume.describe_run", lambda _: new)
    if overwrite:
        refuse_another_runs(prepared)
        return
    with pytest.raises(ConfigError) as caught:
        refuse_another_runs(prepared)
    assert "is a checkpoint of run other, and this is run run" in caught.value.message
    assert "/a.jsonl has sha256 bbbbbbbbbbbbbbbb..., and had sha256 aaaaaaaaaaaaaaaa..." in caught.value.message
    assert "SFT_OUTPUT__OVERWRITE=true" in caught.value.hint
