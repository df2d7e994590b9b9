"""What the kernel lets this container use, and what it killed for memory: cgroup v2, or else v1.

Kubernetes 1.35 and later refuse cgroup v1 unless told otherwise, but nodes with it are still about. There a container
finds each controller in a folder of its own.
"""

from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


def read_memory_limit_bytes(root: Path = ROOT) -> int | None:
    """Return the container's limit of memory, None where there is none; on v1 that is a number beyond all memory."""
    text = _read(root / "memory.max") or _read(root / "memory" / "memory.limit_in_bytes")
    return None if text in ("", "max") else int(text)


def read_cpu_quota(root: Path = ROOT) -> float | None:
    """Return how many cores' time the container may use, None where that isn't limited."""
    text = _read(root / "cpu.max")
    if text:
        quota_us, period_us = text.split()
    else:
        quota_us = _read(root / "cpu" / "cpu.cfs_quota_us")
        period_us = _read(root / "cpu" / "cpu.cfs_period_us")
    return None if quota_us in ("", "max", "-1") else int(quota_us) / int(period_us)


def count_oom_kills(root: Path = ROOT) -> int:
    """Return how often the kernel killed a process of this container for memory, 0 where it doesn't say."""
    text = _read(root / "memory.events") or _read(root / "memory" / "memory.oom_control")
    counts = dict(line.split() for line in text.splitlines())
    return int(counts.get("oom_kill", 0))


def _read(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""
