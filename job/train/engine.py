"""The distributed engine in a worker: what it needs beforehand, and proof that it is the one that the plan names.

Several ways to ask accelerate for processes, ZeRO or FSDP give something smaller, and none of them says so.
"""

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


def callable_model(plan: TrainPlan, trainer: transformers.Trainer) -> nn.Module:
    """Return what computes logits outside of training, once training has begun: the engine where it has split the
    weights, and else the model itself, which waits for no other process."""
    model: nn.Module = trainer.model if plan.engine == "ddp" else trainer.model_wrapped
    return model
