"""Whole weights out of, and into, a model that an engine has split among the processes.

Everything here is collective: all processes must call it, in the same order.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from job.errors import InternalError
from job.support import Engine, uses_deepspeed


@torch.no_grad()
def gather_trained(model: PeftModel, engine: Engine) -> dict[str, torch.Tensor]:
    """Return copies of all trained weights, whole and in float32, in host memory, by the names of the parameters."""
    trained = find_trained(model)
    return {name: gather_one(name, weight, engine).to("cpu", copy=True) for name, weight in trained.items()}


def find_trained(model: PeftModel) -> dict[str, nn.Parameter]:
    """Return what is trained, by name, as the engine has split it."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


@torch.no_grad()
def gather_one(name: str, weight: nn.Parameter, engine: Engine) -> torch.Tensor:
    """Return a trained weight, whole and in float32, wherever it lies; it may be the very one that is trained."""
    whole: torch.Tensor | None = weight
    if uses_deepspeed(engine):
        from deepspeed.utils import safe_get_full_fp32_param

        # What the optimizer steps, in float32: the model has a copy of it, in bfloat16 if it computes in that.
        whole = safe_get_full_fp32_param(weight)
    elif isinstance(weight, DTensor):
        whole = weight.full_tensor()
    if whole is None:
        raise InternalError(f"DeepSpeed doesn't train {name}")
    return whole.detach().float()


@torch.no_grad()
def replace_one(weight: nn.Parameter, whole: torch.Tensor, engine: Engine) -> None:
    """Put another value, float32, whole and on the device, in the place of a trained weight."""
    if isinstance(weight, DTensor):
        weight.copy_(distribute_tensor(whole, weight.device_mesh, weight.placements))
        return
    with held_whole([weight], to_write=True):
        weight.copy_(whole)
    if uses_deepspeed(engine):
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(weight, whole)  # what the optimizer steps


def replace_trained(model: PeftModel, weights: dict[str, torch.Tensor], engine: Engine) -> None:
    """Put what `gather_trained` returned into the places of the trained weights."""
    for name, weight in find_trained(model).items():
        replace_one(weight, weights[name].to(weight.device), engine)


@torch.no_grad()
def gather_frozen(weight: torch.Tensor) -> torch.Tensor:
    """Return a copy of a weight that isn't trained, whole and in float32, in host memory."""
    if isinstance(weight, DTensor):
        return weight.full_tensor().to("cpu", torch.float32)
    with held_whole([weight]):
        return weight.detach().to("cpu", torch.float32, copy=True)


@contextmanager
def held_whole(weights: Sequence[torch.Tensor], *, to_write: bool = False) -> Iterator[None]:
    """Have weights whole within the block, where ZeRO-3 has split them while the model was loaded.

    `to_write`: what rank 0 writes into them is kept, and every process must write the same.
    """
    if not is_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(weights), modifier_rank=0 if to_write else None):
        yield
