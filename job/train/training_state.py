"""The numbers of a checkpoint: everything but tensors that a run needs in order to go on, as JSON."""

from importlib.metadata import version
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

from job.plan import TrainPlan
from job.support import uses_bitsandbytes, uses_deepspeed
from job.train.early_stopping import StoppingState
from job.train.metrics import MetricsState
from job.train.optimizer_state import LossScale

# What decides who draws which random numbers for which rows.
_DECIDES_RANDOM_NUMBERS = ("world_size", "engine", "micro_batch_size", "gradient_accumulation_steps", "device")


class Setup(BaseModel):
    """How a run computes: two runs alike in all of it compute the same bits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    world_size: int
    engine: str
    offload: bool
    micro_batch_size: int
    gradient_accumulation_steps: int
    device: str
    hardware: str
    threads_per_process: int
    dtype: str
    optimizer: str
    loss: str
    gradient_checkpointing: float
    attn_implementation: str
    packages: str

    def list_differences(self, other: "Setup") -> list[str]:
        """Return what is different in the other one, for people."""
        mine, others = self.model_dump(), other.model_dump()
        return [f"{name} {mine[name]}, then {others[name]}" for name in mine if mine[name] != others[name]]

    def draws_as(self, other: "Setup") -> bool:
        """Say whether each process draws its random numbers for the same rows in both."""
        mine, others = self.model_dump(), other.model_dump()
        return all(mine[name] == others[name] for name in _DECIDES_RANDOM_NUMBERS)


class TrainingState(BaseModel):
    """Where a run stands after `step` steps. `schedule_steps` are those that the learning rate's schedule has taken:
    one that float16 overflowed in is none of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    step: int
    global_batch_size: int
    seed: int
    setup: Setup
    schedule_steps: int
    learning_rate: float
    loss_scale: LossScale | None
    metrics: MetricsState
    stopping: StoppingState | None


def describe_setup(plan: TrainPlan) -> Setup:
    """Return how this run computes."""
    packages = ["torch", "transformers", "peft", "accelerate"]
    packages += ["deepspeed"] if uses_deepspeed(plan.engine) else []
    packages += ["bitsandbytes"] if uses_bitsandbytes(plan.quantization, plan.optimizer) else []
    is_gpu = plan.device == "cuda"
    return Setup(
        world_size=plan.world_size,
        engine=plan.engine,
        offload=plan.offload,
        micro_batch_size=plan.micro_batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        device=plan.device,
        hardware=torch.cuda.get_device_name() if is_gpu else torch.backends.cpu.get_cpu_capability(),
        threads_per_process=plan.threads_per_process,
        dtype=plan.dtype,
        optimizer=plan.optimizer,
        loss=plan.loss,
        gradient_checkpointing=plan.gradient_checkpointing,
        attn_implementation=plan.attn_implementation,
        packages=" ".join(f"{package} {version(package)}" for package in packages),
    )
