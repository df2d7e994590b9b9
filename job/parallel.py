"""Devices, processes, precision and kernels: what is decided before any download.

Neither data nor model is needed for it, so that what the machine can't do, and a batch that can't be split, are
refused at once.
"""

from dataclasses import dataclass
from typing import Literal

from job.choices import Choices
from job.errors import ConfigError
from job.hardware import Hardware
from job.memory.fit import available_bytes
from job.presets import is_given
from job.quantization import check_quantization
from job.schedule import count_warmup_steps
from job.settings import Settings
from job.settings_groups import TrainSettings
from job.support import (
    Device,
    uses_deepspeed,
    why_not_attention,
    why_not_dtype,
    why_not_engine,
    why_not_liger,
    why_not_offload,
    why_not_paged_adamw,
    why_not_split,
)

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class ParallelPlan:
    """Devices, nodes, processes on each of them and precision, each with its source, and what is to be warned of."""

    device: Device
    nodes: int
    processes: int
    threads_per_process: int
    dtype: Dtype
    available_bytes: int  # memory for each process
    compute_capability: tuple[int, int] | None  # of the least capable GPU
    sources: dict[str, str]
    warnings: list[str]

    @property
    def world_size(self) -> int:
        """The processes on all nodes."""
        return self.nodes * self.processes


def plan_parallel(settings: Settings, hardware: Hardware) -> ParallelPlan:
    """Choose device, processes and precision, and refuse what can't work on this machine or doesn't work out.

    Raises ConfigError.
    """
    choices = Choices()
    gpus = hardware.gpus
    device: Device = "cuda" if gpus else "cpu"
    choices.put("device", device, f"found {len(gpus)} x {gpus[0].name}" if gpus else "no GPU found")
    _choose_processes(choices, settings, hardware)
    processes = choices.values["processes"]
    choices.take("nodes", settings.parallel, "nodes")
    choices.put("threads_per_process", max(1, hardware.cpu_cores // processes), f"{hardware.cpu_cores} cores")
    _choose_dtype(choices, settings, hardware)
    _check_engine(settings, device)
    check_quantization(settings, device, min((gpu.compute_capability for gpu in gpus), default=None))
    _check_attention(settings, device)
    _check_optimizer(settings.train, device)
    _check_loss(settings.train, device)
    _check_batch_arithmetic(settings.train, processes * settings.parallel.nodes)
    if settings.train.max_steps is not None and is_given(settings.train, "warmup"):
        count_warmup_steps(settings.train.warmup, settings.train.max_steps)
    return ParallelPlan(
        **choices.values,
        available_bytes=available_bytes(hardware, processes),
        compute_capability=min((gpu.compute_capability for gpu in gpus), default=None),
        sources=choices.sources,
        warnings=choices.warnings,
    )


def batch_multiple(train: TrainSettings, world_size: int) -> int:
    """Return what every global batch must be a multiple of: all processes, times the micro batch if that is given."""
    return world_size if train.micro_batch_size == "auto" else train.micro_batch_size * world_size


def _choose_processes(choices: Choices, settings: Settings, hardware: Hardware) -> None:
    gpus = len(hardware.gpus)
    asked = settings.parallel.processes
    if asked != "auto" and gpus and asked > gpus:
        raise ConfigError(
            f"SFT_PARALLEL__PROCESSES={asked}: only {gpus} GPU{'s are' if gpus > 1 else ' is'} visible",
            hint="ask for one process a GPU, or leave it at auto; CUDA_VISIBLE_DEVICES limits what is visible",
        )
    if asked != "auto" and not gpus and asked > hardware.cpu_cores:
        choices.warnings.append(f"SFT_PARALLEL__PROCESSES={asked}: only {hardware.cpu_cores} CPU cores are here")
    why = f"one per GPU ({gpus} found)" if gpus else "one on a CPU"
    choices.take("processes", settings.parallel, "processes", auto=max(1, gpus), why=why)


def _choose_dtype(choices: Choices, settings: Settings, hardware: Hardware) -> None:
    choose = _choose_dtype_on_gpu if hardware.gpus else _choose_dtype_on_cpu
    automatic, why = choose(choices, settings, hardware)
    choices.take("dtype", settings.model, "dtype", auto=automatic, why=why)


def _choose_dtype_on_gpu(_: Choices, settings: Settings, hardware: Hardware) -> tuple[Dtype, str]:
    has_bf16 = all(gpu.compute_capability >= (8, 0) for gpu in hardware.gpus)
    if settings.model.dtype == "bfloat16" and not has_bf16:
        raise ConfigError(
            f"SFT_MODEL__DTYPE=bfloat16: {hardware.gpus[0].name} has no bfloat16 arithmetic",
            hint="use float16, or leave it at auto",
        )
    return ("bfloat16", "the GPU has it") if has_bf16 else ("float16", "the GPU has no bfloat16")


def _choose_dtype_on_cpu(choices: Choices, settings: Settings, hardware: Hardware) -> tuple[Dtype, str]:
    asked, engine = settings.model.dtype, settings.parallel.engine
    lacking = None if engine == "auto" else why_not_dtype(engine, "cpu", "bfloat16")
    if asked == "float16":
        raise ConfigError(
            "SFT_MODEL__DTYPE=float16: training in float16 needs a GPU", hint="use float32, or leave it at auto"
        )
    if asked == "bfloat16" and lacking is not None:
        raise ConfigError(f"SFT_MODEL__DTYPE=bfloat16: {lacking}", hint="use float32 or ddp, or leave it at auto")
    if asked == "bfloat16" and hardware.cpu_bf16 is None:
        choices.warnings.append(
            "SFT_MODEL__DTYPE=bfloat16: this CPU has neither AMX nor AVX-512 BF16; float32 is 25 to 30 times faster"
        )
    if lacking is not None:
        return "float32", lacking
    if hardware.cpu_bf16 is not None:
        return "bfloat16", f"the CPU has {hardware.cpu_bf16}"
    return "float32", "the CPU has neither AMX nor AVX-512 BF16"


def _check_engine(settings: Settings, device: Device) -> None:
    """Refuse an engine that was asked for and can't run here, or can't do what else was asked for."""
    engine, offload = settings.parallel.engine, settings.parallel.offload
    if offload is True and device == "cpu":
        raise ConfigError(
            "SFT_PARALLEL__OFFLOAD=true: there is no GPU, so the weights are in host memory anyway",
            hint="leave it at auto",
        )
    if engine == "auto":
        return
    if lacking := why_not_engine(engine, device):
        hint = "install it (pip install deepspeed), or use ddp" if uses_deepspeed(engine) else "use ddp, zero2 or zero3"
        raise ConfigError(f"SFT_PARALLEL__ENGINE={engine}: {lacking}", hint=hint)
    if offload is True and (lacking := why_not_offload(engine)):
        raise ConfigError(f"SFT_PARALLEL__OFFLOAD=true: {lacking}", hint="set SFT_PARALLEL__ENGINE=zero3")
    if lacking := why_not_split(engine, settings.quantization):
        raise ConfigError(
            f"SFT_QUANTIZATION={settings.quantization}: {lacking}", hint="use ddp, zero2 or no quantization"
        )


def _check_attention(settings: Settings, device: Device) -> None:
    asked = settings.model.attn_implementation
    lacking = None if asked == "auto" else why_not_attention(asked, device)
    if lacking is not None:
        raise ConfigError(f"SFT_MODEL__ATTN_IMPLEMENTATION={asked}: {lacking}", hint="use sdpa, or leave it at auto")


def _check_optimizer(train: TrainSettings, device: Device) -> None:
    lacking = why_not_paged_adamw(device) if train.optimizer == "paged_adamw_8bit" else None
    if lacking is not None:
        raise ConfigError(f"SFT_TRAIN__OPTIMIZER=paged_adamw_8bit: {lacking}", hint="use adamw, or leave it at auto")


def _check_loss(train: TrainSettings, device: Device) -> None:
    lacking = why_not_liger(device) if train.loss == "liger" else None
    if lacking is not None:
        raise ConfigError(f"SFT_TRAIN__LOSS=liger: {lacking}", hint="use chunked, or leave it at auto")


def _check_batch_arithmetic(train: TrainSettings, world_size: int) -> None:
    multiple = batch_multiple(train, world_size)
    if train.global_batch_size == "auto" or train.global_batch_size % multiple == 0:
        return
    micro = "" if train.micro_batch_size == "auto" else f"SFT_TRAIN__MICRO_BATCH_SIZE={train.micro_batch_size} x "
    raise ConfigError(
        f"SFT_TRAIN__GLOBAL_BATCH_SIZE={train.global_batch_size}: can't be split, for it is not a multiple of "
        f"{micro}{world_size} process{'es' if world_size > 1 else ''}",
        hint=f"use a multiple of {multiple}",
    )
