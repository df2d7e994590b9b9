"""Devices, processes, precision and kernels: what is decided before any download.

Neither data nor model is needed for it, so that what the machine can't do, and a batch that can't be split, are
refused at once.
"""

import importlib.util
from dataclasses import dataclass
from typing import Literal

from job.choices import Choices
from job.errors import ConfigError
from job.hardware import Hardware
from job.presets import is_given
from job.schedule import count_warmup_steps
from job.settings import Settings
from job.settings_groups import TrainSettings

Dtype = Literal["float32", "bfloat16", "float16"]
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class ParallelPlan:
    """Devices, processes and precision, each with its source, and what is to be warned of."""

    device: Device
    processes: int
    threads_per_process: int
    dtype: Dtype
    sources: dict[str, str]
    warnings: list[str]


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
    choices.put("threads_per_process", max(1, hardware.cpu_cores // processes), f"{hardware.cpu_cores} cores")
    _choose_dtype(choices, settings, hardware)
    _check_attention(settings, device)
    _check_optimizer(settings.train, device)
    _check_batch_arithmetic(settings.train, processes)
    if settings.train.max_steps is not None and is_given(settings.train, "warmup"):
        count_warmup_steps(settings.train.warmup, settings.train.max_steps)
    return ParallelPlan(**choices.values, sources=choices.sources, warnings=choices.warnings)


def batch_multiple(train: TrainSettings, processes: int) -> int:
    """Return what every global batch must be a multiple of: the processes, times the micro batch if that is given."""
    return processes if train.micro_batch_size == "auto" else train.micro_batch_size * processes


def why_not_paged_adamw(device: Device) -> str | None:
    """Return what paged 8-bit AdamW lacks here, None where it can run."""
    if device == "cpu":
        return "there is no GPU"
    if not _is_installed("bitsandbytes"):
        return "the package bitsandbytes is not installed"
    return None


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
    asked = settings.model.dtype
    if hardware.gpus:
        has_bf16 = all(gpu.compute_capability >= (8, 0) for gpu in hardware.gpus)
        if asked == "bfloat16" and not has_bf16:
            raise ConfigError(
                f"SFT_MODEL__DTYPE=bfloat16: {hardware.gpus[0].name} has no bfloat16 arithmetic",
                hint="use float16, or leave it at auto",
            )
        automatic, why = ("bfloat16", "the GPU has it") if has_bf16 else ("float16", "the GPU has no bfloat16")
    else:
        amx = hardware.cpu_has_bf16_matrix_units
        if asked == "float16":
            raise ConfigError(
                "SFT_MODEL__DTYPE=float16: training in float16 needs a GPU", hint="use float32, or leave it at auto"
            )
        if asked == "bfloat16" and not amx:
            choices.warnings.append(
                "SFT_MODEL__DTYPE=bfloat16: this CPU has no AMX; float32 is 25 to 30 times faster here"
            )
        automatic, why = ("bfloat16", "the CPU has AMX") if amx else ("float32", "the CPU has no bfloat16 matrix units")
    choices.take("dtype", settings.model, "dtype", auto=automatic, why=why)


def _check_attention(settings: Settings, device: Device) -> None:
    if settings.model.attn_implementation != "flash_attention_2":
        return
    if device == "cpu":
        raise ConfigError(
            "SFT_MODEL__ATTN_IMPLEMENTATION=flash_attention_2: needs a GPU", hint="use sdpa, or leave it at auto"
        )
    if not _is_installed("flash_attn"):
        raise ConfigError(
            "SFT_MODEL__ATTN_IMPLEMENTATION=flash_attention_2: the package flash-attn is not installed",
            hint="install flash-attn, use sdpa, or leave it at auto",
        )


def _check_optimizer(train: TrainSettings, device: Device) -> None:
    lacking = why_not_paged_adamw(device) if train.optimizer == "paged_adamw_8bit" else None
    if lacking is not None:
        remedy = "use adamw, or leave it at auto"
        raise ConfigError(
            f"SFT_TRAIN__OPTIMIZER=paged_adamw_8bit: {lacking}",
            hint=remedy if device == "cpu" else f"install bitsandbytes, {remedy}",
        )


def _check_batch_arithmetic(train: TrainSettings, processes: int) -> None:
    multiple = batch_multiple(train, processes)
    if train.global_batch_size == "auto" or train.global_batch_size % multiple == 0:
        return
    micro = "" if train.micro_batch_size == "auto" else f"SFT_TRAIN__MICRO_BATCH_SIZE={train.micro_batch_size} x "
    raise ConfigError(
        f"SFT_TRAIN__GLOBAL_BATCH_SIZE={train.global_batch_size}: can't be split, for it is not a multiple of "
        f"{micro}{processes} process{'es' if processes > 1 else ''}",
        hint=f"use a multiple of {multiple}",
    )


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
