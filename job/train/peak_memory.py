"""The peak of the memory that training really needed, beside what the plan estimated."""

from pathlib import Path

import torch
import torch.distributed as dist

from job.log import format_bytes, logger
from job.memory.estimate import MemoryEstimate, overhead_bytes
from job.plan import TrainPlan


def measure_peak(plan: TrainPlan) -> dict[str, int]:
    """Return `peak_memory_bytes` of the process that needed the most; each process must call it.

    On a GPU that is what PyTorch's tensors took, without CUDA's own memory, and `peak_memory_reserved_bytes` what
    PyTorch had taken from CUDA for them; on a CPU, the largest resident size of the process so far.
    """
    peaks = [own_peak_bytes(plan)]
    if plan.device == "cuda":
        peaks.append(torch.cuda.max_memory_reserved())
    if plan.world_size > 1:
        worst = torch.tensor(peaks, dtype=torch.int64, device=plan.device)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        peaks = worst.tolist()
    return dict(zip(("peak_memory_bytes", "peak_memory_reserved_bytes"), peaks, strict=False))


def own_peak_bytes(plan: TrainPlan) -> int:
    """Return what `measure_peak` calls `peak_memory_bytes`, of this process alone; it takes microseconds, and waits for
    no GPU."""
    return torch.cuda.max_memory_allocated() if plan.device == "cuda" else _peak_resident_bytes()


def compare_with_estimate(plan: TrainPlan, peak_bytes: int) -> None:
    """Log the measured peak against the plan's estimate of the same memory."""
    estimated = comparable_bytes(plan.memory, plan)
    logger.info(
        "peak memory of a process: %s, %s estimated for the longest rows (%+.0f %%)",
        format_bytes(peak_bytes),
        format_bytes(estimated),
        100 * (estimated - peak_bytes) / peak_bytes,
    )


def comparable_bytes(estimate: MemoryEstimate, plan: TrainPlan) -> int:
    """Return the estimate of what `measure_peak` measures."""
    outside = overhead_bytes("cuda", plan.world_size) if plan.device == "cuda" else 0
    return estimate.total_bytes - outside


def _peak_resident_bytes() -> int:
    # getrusage would count what the process was before it became this program
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
