"""What a container may use, by the files of cgroup v2 and of v1."""

from pathlib import Path

import pytest

from job.cgroup import count_oom_kills, read_cpu_quota, read_memory_limit_bytes

V2 = {"memory.max": "1073741824", "cpu.max": "150000 100000", "memory.events": "low 0\noom 3\noom_kill 2\n"}
V1 = {
    "memory/memory.limit_in_bytes": "1073741824",
    "cpu/cpu.cfs_quota_us": "150000",
    "cpu/cpu.cfs_period_us": "100000",
    "memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
}


def write_files(root: Path, files: dict[str, str]) -> Path:
    for path, text in files.items():
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_text(text + "\n")
    return root


@pytest.mark.parametrize("files", [V2, V1], ids=["v2", "v1"])
def test_limits_and_kills(files: dict[str, str], tmp_path: Path) -> None:
    root = write_files(tmp_path, files)
    assert (read_memory_limit_bytes(root), read_cpu_quota(root), count_oom_kills(root)) == (2**30, 1.5, 2)


@pytest.mark.parametrize(
    "files",
    [{}, {"memory.max": "max", "cpu.max": "max 100000"}, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "1"}],
    ids=["no cgroup", "v2", "v1"],
)
def test_no_limits(files: dict[str, str], tmp_path: Path) -> None:
    root = write_files(tmp_path, files)
    assert (read_memory_limit_bytes(root), read_cpu_quota(root), count_oom_kills(root)) == (None, None, 0)
