"""What the workers are started with: the plan's processes, the chosen GPUs, and nothing they must not see."""

import json
import os
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from job.handover import RunFolder, WorkerInputs
from job.launch_command import Rendezvous, launch_command, tracking_environment, worker_environment
from job.log import SECRET_VARIABLES
from job.plan import TrainPlan

PlanFor = Callable[..., TrainPlan]


def test_workers_get_no_credentials_and_no_other_launchers_rendezvous(
    plan_for: PlanFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = (*SECRET_VARIABLES, "RANK", "WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_USE_FSDP", "TORCHELASTIC_RUN_ID")
    foreign += ("PET_NNODES",)  # which torchrun reads as --nnodes
    for name in foreign:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    environment = worker_environment(plan_for())
    assert not set(foreign) & set(environment)
    assert environment["NCCL_DEBUG"] == "INFO"


def test_a_tracker_gets_its_secret_and_its_defaults_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in SECRET_VARIABLES:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "99")
    folder = RunFolder(tmp_path / "work" / "run")
    folder.root.mkdir(parents=True)

    def environment(*trackers: str) -> dict[str, str]:
        paths = dict.fromkeys(("model_folder", "train_tokens"), tmp_path)
        names = {
            "train_names": [],
            "eval_names": [],
            "new_tokens": [],
            "log_format": "json",
            "log_level": "info",
            "run_id": "run7",
        }
        inputs = WorkerInputs(
            **paths, **names, eval_tokens=None, pad_token_id=0, vocabulary_size=1, report_to=list(trackers)
        )
        folder.inputs.write_text(inputs.model_dump_json())
        return tracking_environment(folder)

    assert environment() == {}
    mlflow = environment("mlflow")
    assert set(SECRET_VARIABLES) & set(mlflow) == {"MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"}
    assert mlflow["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "99"
    assert int(mlflow["MLFLOW_HTTP_REQUEST_MAX_RETRIES"]) < 7  # its own default
    both = environment("tensorboard", "wandb")
    assert set(SECRET_VARIABLES) & set(both) == {"WANDB_API_KEY"}
    assert both["WANDB_RUN_ID"] == "run7"
    assert both["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "work" / "tensorboard" / "run7")


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
    assert worker_environment(plan)["CUDA_VISIBLE_DEVICES"] == expected


def test_workers_on_a_cpu_see_no_gpu(plan_for: PlanFor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert worker_environment(plan_for())["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    ("engine", "processes", "offload", "configuration", "deepspeed"),
    [
        ("ddp", 2, False, "ddp.yaml", None),
        ("zero2", 1, False, "zero2.yaml", "zero2.json"),
        ("zero3", 2, False, "zero3.yaml", "zero3.json"),
        ("zero3", 2, True, "zero3.yaml", "zero3_offload.json"),
        ("fsdp2", 1, False, "fsdp2.yaml", None),
    ],
)
def test_the_launcher_reads_our_configuration_and_no_other(
    plan_for: PlanFor,
    tmp_path: Path,
    engine: str,
    processes: int,
    offload: bool,
    configuration: str,
    deepspeed: str | None,
) -> None:
    plan = plan_for().model_copy(update={"processes": processes, "engine": engine, "offload": offload})
    command = launch_command(plan, RunFolder(tmp_path))
    options = dict(pairwise(command))
    assert Path(options["--config_file"]).name == configuration
    assert Path(options["--config_file"]).is_file()
    assert options["--num_processes"] == str(processes)
    assert options["--module"] == "job.train.worker"
    if deepspeed is None:
        assert "--deepspeed_config_file" not in options
        return
    assert Path(options["--deepspeed_config_file"]).name == deepspeed
    zero = json.loads(Path(options["--deepspeed_config_file"]).read_text())["zero_optimization"]
    assert zero["stage"] == int(engine[-1])
    assert ("offload_param" in zero) == offload


def test_a_single_worker_is_started_without_a_launcher(plan_for: PlanFor, tmp_path: Path) -> None:
    command = launch_command(plan_for().model_copy(update={"processes": 1, "engine": "ddp"}), RunFolder(tmp_path))
    assert command == [sys.executable, "-m", "job.train.worker", str(tmp_path), str(os.getpid())]


def test_the_workers_of_several_nodes_meet_at_node_0(plan_for: PlanFor, tmp_path: Path) -> None:
    plan = plan_for().model_copy(update={"nodes": 3, "processes": 2})
    command = launch_command(plan, RunFolder(tmp_path), Rendezvous(1, "10.0.0.5", 4321, "eth7"))
    options = {
        "--num_processes": "6",  # on all nodes
        "--num_machines": "3",
        "--machine_rank": "1",
        "--main_process_ip": "10.0.0.5",
        "--main_process_port": "4321",
        "--rdzv_backend": "static",
    }
    assert {name: command[command.index(name) + 1] for name in options} == options
    ipv6 = launch_command(plan, RunFolder(tmp_path), Rendezvous(1, "fd00::5", 4321, "eth7"))
    assert "[fd00::5]" in ipv6


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_deepspeed_starts_its_nodes_by_torchrun(plan_for: PlanFor, tmp_path: Path, engine: str) -> None:
    plan = plan_for().model_copy(update={"nodes": 2, "engine": engine})
    command = launch_command(plan, RunFolder(tmp_path), Rendezvous(0, "10.0.0.5", 4321, "eth7"))
    assert command[command.index("--deepspeed_multinode_launcher") + 1] == "standard"


def test_workers_talk_through_the_interface_that_leads_to_the_others(
    plan_for: PlanFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    plan = plan_for().model_copy(update={"nodes": 2})
    environment = worker_environment(plan, Rendezvous(0, "10.0.0.5", 4321, "eth7"))
    assert (environment["GLOO_SOCKET_IFNAME"], environment["NCCL_SOCKET_IFNAME"]) == ("eth7", "ib0")
    assert worker_environment(plan_for())["GLOO_SOCKET_IFNAME"] == "lo"
