"""What the workers are started with: the plan's processes, the chosen GPUs, and nothing they must not see."""

from collections.abc import Callable
from pathlib import Path

import pytest

from job.handover import RunFolder
from job.launch import _launch_command, _worker_environment
from job.log import SECRET_VARIABLES
from job.plan import TrainPlan

PlanFor = Callable[..., TrainPlan]


def test_workers_get_no_credentials_and_no_other_launchers_rendezvous(
    plan_for: PlanFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = (*SECRET_VARIABLES, "RANK", "WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_USE_FSDP", "TORCHELASTIC_RUN_ID")
    for name in foreign:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    environment = _worker_environment(plan_for())
    assert not set(foreign) & set(environment)
    assert environment["NCCL_DEBUG"] == "INFO"


@pytest.mark.parametrize(
    ("visible", "processes", "expected"),
    [(None, 2, "0,1"), ("3,1,2", 2, "3,1"), ("GPU-a,GPU-b", 1, "GPU-a"), ("5", 1, "5")],
)
def test_workers_see_as_many_gpus_as_there_are_processes(
    plan_for: PlanFor, monkeypatch: pytest.MonkeyPatch, visible: str | None, processes: int, expected: str
) -> None:
    plan = plan_for().model_copy(update={"device": "cuda", "processes": processes})
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert _worker_environment(plan)["CUDA_VISIBLE_DEVICES"] == expected


def test_workers_on_a_cpu_see_no_gpu(plan_for: PlanFor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert _worker_environment(plan_for())["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(("processes", "engine"), [(1, "single.yaml"), (2, "ddp.yaml")])
def test_the_launcher_reads_our_configuration_and_no_other(
    plan_for: PlanFor, tmp_path: Path, processes: int, engine: str
) -> None:
    plan = plan_for().model_copy(update={"processes": processes})
    command = _launch_command(plan, RunFolder(tmp_path))
    configuration = Path(command[command.index("--config_file") + 1])
    assert configuration.name == engine
    assert configuration.is_file()
    assert command[command.index("--num_processes") + 1] == str(processes)
    assert command[command.index("--module") + 1] == "job.train.worker"
