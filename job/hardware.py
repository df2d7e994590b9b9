"""What this machine offers for training, found without importing torch: GPUs by NVML, cores and memory by cgroup.

The worker checks later that torch sees the same: a promise made here is kept or the run ends.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from job.cgroup import read_cpu_quota, read_memory_limit_bytes
from job.errors import ConfigError

_BF16_UNITS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16"}  # by the CPU's flag, the faster first


@dataclass(frozen=True)
class Gpu:
    """One GPU: its product name, memory, and CUDA compute capability (major, minor)."""

    name: str
    memory_bytes: int
    compute_capability: tuple[int, int]


@dataclass(frozen=True)
class Hardware:
    """The machine as the job may use it."""

    gpus: tuple[Gpu, ...]
    cpu_name: str
    cpu_cores: int
    cpu_bf16: str | None  # what multiplies bfloat16 faster than float32; None: nothing does
    memory_bytes: int


def find_hardware() -> Hardware:
    """Look at the GPUs that CUDA_VISIBLE_DEVICES leaves visible and at the cores and memory this process may use."""
    cpu_name, cpu_flags = _read_cpuinfo(Path("/proc/cpuinfo"))
    return Hardware(
        gpus=tuple(_find_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))),
        cpu_name=cpu_name,
        cpu_cores=_count_cores(read_cpu_quota()),
        cpu_bf16=_find_bf16_units(cpu_flags),
        memory_bytes=_count_memory_bytes(read_memory_limit_bytes()),
    )


def assume_gpus(hardware: Hardware, count: int, memory_gib: int) -> Hardware:
    """Return a machine as if it had other GPUs, for what is checked in one place and run in another: with bfloat16
    arithmetic, that is of compute capability 8.0, Ampere's."""
    gpu = Gpu(f"GPU with {memory_gib} GiB, assumed", memory_gib * 2**30, (8, 0))
    return replace(hardware, gpus=(gpu,) * count)


def _find_gpus(visible: str | None) -> list[Gpu]:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver: no GPU
        return []
    try:
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            gpu = Gpu(
                name=pynvml.nvmlDeviceGetName(handle),
                memory_bytes=pynvml.nvmlDeviceGetMemoryInfo(handle).total,
                compute_capability=tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
            )
            found.append((pynvml.nvmlDeviceGetUUID(handle), gpu))
    finally:
        pynvml.nvmlShutdown()
    return select_visible(found, visible)


def select_visible(found: list[tuple[str, Gpu]], visible: str | None) -> list[Gpu]:
    """Apply CUDA_VISIBLE_DEVICES to the (UUID, GPU) pairs of the machine: indices or UUID prefixes; CUDA ignores
    whatever follows the first entry that names no device.

    Raises ConfigError when it names GPUs and none of them exists. Source: CUDA programming guide, "CUDA environment
    variables".
    """
    if visible is None:
        return [gpu for _, gpu in found]
    chosen = []
    for entry in (part.strip() for part in visible.split(",")):
        if entry.isdigit() and int(entry) < len(found):
            chosen.append(found[int(entry)][1])
        elif matches := [gpu for uuid, gpu in found if entry and uuid.startswith(entry)]:
            chosen.append(matches[0])
        else:
            break
    if found and not chosen and visible.strip() not in ("", "-1", "none", "void", "NoDevFiles"):
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES={visible}: none of these GPUs exists here ({len(found)} found)",
            hint="name GPUs by number from 0 on, or unset it; MIG instances aren't served yet",
        )
    return chosen


def _read_cpuinfo(path: Path) -> tuple[str, set[str]]:
    name, flags = "unknown", set[str]()
    for line in path.read_text().splitlines() if path.exists() else []:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() == "flags":
            flags = set(value.split())
    return name, flags


def _find_bf16_units(flags: set[str]) -> str | None:
    return next((name for flag, name in _BF16_UNITS.items() if flag in flags), None)


def _count_cores(quota: float | None) -> int:
    """Return the cores that this process may use: its affinity, cut by the container's CPU quota."""
    cores = len(os.sched_getaffinity(0))
    return cores if quota is None else min(cores, max(1, int(quota)))


def _count_memory_bytes(limit_bytes: int | None) -> int:
    total: int = psutil.virtual_memory().total
    return total if limit_bytes is None else min(total, limit_bytes)
