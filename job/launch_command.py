"""The command and the environment that start the worker processes of one node."""

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from job import engines
from job.handover import RunFolder, WorkerInputs
from job.log import SECRET_VARIABLES
from job.plan import TrainPlan
from job.support import uses_deepspeed
from job.trackers import tracker_environment

_WORKER_MODULE = "job.train.worker"
_RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Rendezvous:
    """Where the workers of several nodes meet, by torch's own means: at a port of node 0's address. This node has rank
    `node_rank`, and reaches the others through a network interface."""

    node_rank: int
    address: str
    port: int
    interface: str


def needs_launcher(plan: TrainPlan) -> bool:
    """Say whether workers are started through `accelerate launch`: but for a single one without an engine, for which
    it would set nothing that the worker doesn't have by default, and import PyTorch for that."""
    return plan.world_size > 1 or plan.engine != "ddp"


def launch_command(plan: TrainPlan, folder: RunFolder, rendezvous: Rendezvous | None = None) -> list[str]:
    """Return the command that starts this node's workers; one node has no rendezvous."""
    worker = [_WORKER_MODULE, str(folder.root), str(os.getpid())]
    if not needs_launcher(plan):
        return [sys.executable, "-m", *worker]
    engine = plan.engine
    folder_of_engines = Path(engines.__path__[0])
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(folder_of_engines / f"{engine}.yaml")]
    if uses_deepspeed(plan.engine):
        variant = f"{engine}_offload" if plan.offload else engine
        command += ["--deepspeed_config_file", str(folder_of_engines / f"{variant}.json")]
    command += ["--num_processes", str(plan.world_size), "--num_cpu_threads_per_process", str(plan.threads_per_process)]
    if rendezvous is not None:
        command += _join(rendezvous, plan)
    else:
        command += ["--main_process_port", "0"]  # any free one: two jobs on a host don't collide
    return [*command, "--module", *worker]


def _join(rendezvous: Rendezvous, plan: TrainPlan) -> list[str]:
    address = f"[{rendezvous.address}]" if ":" in rendezvous.address else rendezvous.address
    options = ["--num_machines", str(plan.nodes), "--machine_rank", str(rendezvous.node_rank)]
    options += ["--main_process_ip", address, "--main_process_port", str(rendezvous.port), "--rdzv_backend", "static"]
    if uses_deepspeed(plan.engine):
        options += ["--deepspeed_multinode_launcher", "standard"]  # torchrun; the others want ssh
    return options


def worker_environment(
    plan: TrainPlan, rendezvous: Rendezvous | None = None, *, shutdown_s: float = 30.0
) -> dict[str, str]:
    """Return the environment of the workers, which get `shutdown_s` seconds to stop after a SIGTERM."""
    # The model is on the disk: workers need no credentials, so they get none. What another launcher (a training
    # operator, say) has set would make a single worker wait for peers.
    dropped = (*SECRET_VARIABLES, *_RENDEZVOUS)
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in dropped and not name.startswith(("ACCELERATE_", "PET_", "TORCHELASTIC_"))
    }
    environment["OMP_NUM_THREADS"] = str(plan.threads_per_process)
    environment["HF_HUB_OFFLINE"] = "1"  # everything was fetched before: a look-up now would be a mistake
    environment["TOKENIZERS_PARALLELISM"] = "false"
    environment["PYTHONUNBUFFERED"] = "1"
    environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(math.ceil(shutdown_s))  # then torchrun sends SIGKILL
    if rendezvous is not None and rendezvous.interface:
        # Left to themselves, gloo takes what the host's own name resolves to, and NCCL any interface that is up.
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            environment.setdefault(name, rendezvous.interface)
    if plan.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
        environment["DS_ACCELERATOR"] = "cpu"  # DeepSpeed would guess
        if rendezvous is None:
            environment["GLOO_SOCKET_IFNAME"] = "lo"  # a container's own host name often doesn't resolve
        # OpenMP's threads spin while they wait for each other. With another busy process on the cores they spin away
        # the time of the one that they wait for: a forward pass was measured at 9 to 19 s instead of 5.
        environment.setdefault("GOMP_SPINCOUNT", "2000")
    else:
        # With more GPUs visible than processes, transformers' Trainer would wrap the model in DataParallel.
        visible = environment.get("CUDA_VISIBLE_DEVICES") or ",".join(str(index) for index in range(plan.processes))
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[: plan.processes])
    return environment


def tracking_environment(folder: RunFolder) -> dict[str, str]:
    """Return what the workers need besides, secrets included, for the trackers that they report to."""
    inputs = WorkerInputs.model_validate_json(folder.inputs.read_bytes())
    work_dir = folder.root.parent.absolute()
    return tracker_environment(inputs.report_to, os.environ, run_id=inputs.run_id, work_dir=work_dir)
