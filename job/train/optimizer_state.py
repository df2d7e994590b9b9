"""What the optimizer remembers, by the names of the parameters, whole, whatever engine has split it.

So a checkpoint of any engine and number of processes can be gone on from under any other. Everything here but the loss
scale is collective: all processes must call it, in the same order.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer

from job.plan import TrainPlan
from job.support import uses_deepspeed

_AVERAGES = ("exp_avg", "exp_avg_sq")  # Adam's, of the gradient and of its square

Parameters = Mapping[str, nn.Parameter]  # what is trained, by name


class LossScale(BaseModel):
    """The factor that keeps float16's gradients from vanishing: its size, for how many steps it has not overflowed,
    and how many overflows DeepSpeed bears before it lowers it (None under other engines)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scale: float
    good_steps: int
    hysteresis: int | None


def can_be_saved(plan: TrainPlan) -> bool:
    """Say whether the optimizer's states can be told apart by parameter: 8-bit ones of DeepSpeed's partitions share
    their scales among several."""
    return not (uses_deepspeed(plan.engine) and plan.optimizer == "paged_adamw_8bit")


def gather_states(trainer: Trainer, parameters: Parameters, plan: TrainPlan) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Yield name of the parameter, name of the state and the state, whole, wherever it lies; nothing before the first
    step. A plain number is an int64 without dimensions."""
    if not can_be_saved(plan):
        return
    if uses_deepspeed(plan.engine):
        yield from _gather_from_deepspeed(trainer.model_wrapped.optimizer, parameters)
        return
    for name, parameter in parameters.items():
        for key, state in sorted(trainer.optimizer.state.get(parameter, {}).items()):
            whole = state.full_tensor() if isinstance(state, DTensor) else state
            yield name, key, whole if isinstance(whole, torch.Tensor) else torch.tensor(whole)


def restore_states(
    trainer: Trainer,
    parameters: Parameters,
    plan: TrainPlan,
    keys: Mapping[str, list[str]],
    read: Callable[[str, str], torch.Tensor],
) -> None:
    """Put back what `gather_states` yielded: `keys` are the names of the states by that of the parameter, and `read`
    returns one, on the plan's device."""
    if not keys:
        return
    if uses_deepspeed(plan.engine):
        _restore_in_deepspeed(trainer.model_wrapped.optimizer, parameters, plan, read)
        return
    saved = trainer.optimizer.state_dict()
    saved["state"] = {
        index: {key: _as_before(read(name, key), parameter) for key in keys[name]}
        for index, (name, parameter) in enumerate(_in_order(trainer.optimizer, parameters))
        if name in keys
    }
    trainer.optimizer.load_state_dict(saved)


def _in_order(optimizer: torch.optim.Optimizer, parameters: Parameters) -> list[tuple[str, nn.Parameter]]:
    """Return names and parameters in the order in which an optimizer's state_dict counts them."""
    names = {parameter: name for name, parameter in parameters.items()}
    return [(names[parameter], parameter) for group in optimizer.param_groups for parameter in group["params"]]


def _as_before(state: torch.Tensor, parameter: nn.Parameter) -> Any:
    if state.ndim == 0:
        return int(state) if state.dtype == torch.int64 else state.cpu()
    if isinstance(parameter, DTensor):
        return distribute_tensor(state, parameter.device_mesh, parameter.placements)
    return state


def _gather_from_deepspeed(zero: Any, parameters: Parameters) -> Iterator[tuple[str, str, torch.Tensor]]:
    from deepspeed.utils import safe_get_full_optimizer_state

    flat = next(iter(zero.optimizer.state.values()), None)
    if flat is None:
        return
    for name, parameter in parameters.items():
        for key in _AVERAGES:
            yield name, key, safe_get_full_optimizer_state(parameter, key)
        yield name, "step", flat["step"]


def _restore_in_deepspeed(
    zero: Any, parameters: Parameters, plan: TrainPlan, read: Callable[[str, str], torch.Tensor]
) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state

    _make_states(zero, plan, read(next(iter(parameters)), "step"))  # all have taken as many steps
    for name, parameter in parameters.items():
        for key in _AVERAGES:
            safe_set_full_optimizer_state(parameter, read(name, key), key)


def _make_states(zero: Any, plan: TrainPlan, step: torch.Tensor) -> None:
    """Have PyTorch's optimizer hold states for the flat partitions that DeepSpeed lets it step, as it does from the
    first step on: before, there is nothing to write into."""
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    options = zero.optimizer.defaults
    device = plan.device if options["fused"] or options["capturable"] else "cpu"
    flats = zero.fp32_partitioned_groups_flat if plan.engine == "zero3" else zero.single_partition_of_fp32_groups
    for flat in flats:
        averages = {key: torch.zeros_like(flat, requires_grad=False) for key in _AVERAGES}
        zero.optimizer.state[flat] = {"step": step.to(device, copy=True), **averages}
    if plan.engine != "zero3":
        for group, flat in zip(zero.bit16_groups, flats, strict=True):
            lazy_init_hp_params_optimizer_state(group, flat, zero.optimizer.state)


def read_loss_scale(trainer: Trainer, plan: TrainPlan) -> LossScale | None:
    """Return the loss scale, of a run in float16."""
    if plan.dtype != "float16":
        return None
    if uses_deepspeed(plan.engine):
        scaler = trainer.model_wrapped.optimizer.loss_scaler
        good_steps = scaler.cur_iter - scaler.last_overflow_iter - 1
        return LossScale(scale=scaler.cur_scale, good_steps=good_steps, hysteresis=scaler.cur_hysteresis)
    state = trainer.accelerator.scaler.state_dict()
    return LossScale(scale=state["scale"], good_steps=state["_growth_tracker"], hysteresis=None)


def restore_loss_scale(trainer: Trainer, plan: TrainPlan, saved: LossScale | None) -> None:
    """Put the loss scale back, where this run and the one that saved it are in float16."""
    if saved is None or plan.dtype != "float16":
        return
    if not uses_deepspeed(plan.engine):
        scaler = trainer.accelerator.scaler
        state = {"scale": saved.scale, "_growth_tracker": saved.good_steps}
        scaler.load_state_dict(scaler.state_dict() | state)
        return
    scaler = trainer.model_wrapped.optimizer.loss_scaler
    scaler.cur_scale = saved.scale
    scaler.last_overflow_iter, scaler.cur_iter = -1, saved.good_steps  # it only looks at the difference
    if saved.hysteresis is not None:
        scaler.cur_hysteresis = saved.hysteresis
