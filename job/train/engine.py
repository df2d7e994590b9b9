"""The distributed engine in a worker: what it needs beforehand, and proof that it is the one that the plan names.

Several ways to ask accelerate for processes, ZeRO or FSDP give something smaller, and none of them says so.
"""

from datetime import timedelta
from typing import Any

import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from job.errors import InternalError
from job.log import logger
from job.plan import TrainPlan
from job.support import uses_deepspeed
from job.train.dataset import move_batch

_NEVER = timedelta(days=7)  # longer than any SFT_RUNTIME__HANG_MINUTES
_ZERO_STAGES = {"zero2": 2, "zero3": 3}


def prepare_engine(plan: TrainPlan) -> None:
    """Set up what must be set up before the process group is."""
    if uses_deepspeed(plan.engine) and plan.device == "cpu":
        import deepspeed

        # An all-reduce through shared memory for inference, which training never calls. DeepSpeed would compile it
        # whenever a process group starts: two CPU-minutes, with a compiler and ninja that few images have.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def check_promises(plan: TrainPlan, trainer: transformers.Trainer) -> None:
    """Raise InternalError unless accelerate has set up what the plan says."""
    promised = f"{_name_promised(plan)}, {plan.world_size} processes, {plan.device}"
    state = trainer.accelerator.state
    actual = f"{_name_actual(state)}, {state.num_processes} processes, {state.device.type}"
    if actual != promised:
        raise InternalError(f"the plan promised {promised}; the run has {actual}")
    if not trainer.model_accepts_loss_kwargs:
        logger.warning("this architecture averages the loss by micro batch, so long answers weigh less than planned")


def leave_hangs_to_the_job() -> None:
    """Have no collective time out by itself: the job's watchdog ends a run that hangs, and says where it does.

    PyTorch's own limits, 10 minutes for NCCL and 30 for gloo, know of no slow step and no long save on one rank.
    Call it once the engine has prepared the model: DeepSpeed makes process groups of its own.
    """
    # There is no public way: use_cpu ignores the Trainer's ddp_timeout, and DeepSpeed's groups have the default.
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(_NEVER, group)


def _name_promised(plan: TrainPlan) -> str:
    if uses_deepspeed(plan.engine):
        return f"DEEPSPEED stage {_ZERO_STAGES[plan.engine]}{' offloaded' if plan.offload else ''}"
    if plan.engine == "fsdp2":
        return "FSDP version 2"
    if plan.world_size == 1:
        return "NO"
    return "MULTI_GPU" if plan.device == "cuda" else "MULTI_CPU"


def _name_actual(state: AcceleratorState) -> str:
    name: str = state.distributed_type.value
    if state.distributed_type == DistributedType.DEEPSPEED:
        zero = state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        return f"{name} stage {zero['stage']}{' offloaded' if 'offload_param' in zero else ''}"
    if state.distributed_type == DistributedType.FSDP:
        return f"{name} version {state.fsdp_plugin.fsdp_version}"
    return name


def check_prepared(plan: TrainPlan, prepared: nn.Module) -> None:
    """Raise InternalError unless the engine has taken the model that is trained."""
    if uses_deepspeed(plan.engine):
        from deepspeed import DeepSpeedEngine

        is_kept = isinstance(prepared, DeepSpeedEngine)
    elif plan.engine == "fsdp2":
        is_kept = isinstance(prepared, FSDPModule)
    else:
        is_kept = isinstance(prepared, DistributedDataParallel) == (plan.world_size > 1)
    if not is_kept:
        raise InternalError(f"the plan promised {plan.engine}, and the model is trained as {type(prepared).__name__}")


def settle_gradient_buckets(plan: TrainPlan, trainer: transformers.Trainer, batch: dict[str, Any]) -> None:
    """Have DDP sum gradients in the order in which it does from a run's second step on.

    It arranges them anew after the first backward pass, by when each was ready. Among three processes and more, the
    place of a gradient decides in which order it is summed, and so its last bit. The batch is one of training; nothing
    is learned from it, but random numbers are drawn.
    """
    if plan.engine != "ddp" or plan.world_size < 3:
        return
    model = trainer.model_wrapped
    model.train()
    model(**move_batch(batch, plan.device)).loss.backward()
    model.zero_grad()


def callable_model(plan: TrainPlan, trainer: transformers.Trainer) -> nn.Module:
    """Return what computes logits outside of training, once training has begun: the engine where it has split the
    weights, and else the model itself, which waits for no other process."""
    model: nn.Module = trainer.model if plan.engine == "ddp" else trainer.model_wrapped
    return model
