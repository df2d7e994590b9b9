"""What counts as visible GPU, core and memory."""

import os
from pathlib import Path

import psutil
import pytest

from job import hardware
from job.errors import ConfigError
from job.hardware import Gpu, select_visible

MACHINE = [(f"GPU-{letter}{number}", Gpu(f"gpu{number}", 2**30, (9, 0))) for number, letter in enumerate("abc")]


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["gpu0", "gpu1", "gpu2"]),
        ("", []),
        ("-1", []),
        ("none", []),
        ("void", []),
        ("NoDevFiles", []),
        ("0", ["gpu0"]),
        ("2,0", ["gpu2", "gpu0"]),
        (" 1 , 2 ", ["gpu1", "gpu2"]),
        ("1,-1,2", ["gpu1"]),
        ("1,7,2", ["gpu1"]),
        ("GPU-c2", ["gpu2"]),
        ("GPU-b,GPU-a0", ["gpu1", "gpu0"]),
        ("0,", ["gpu0"]),
    ],
)
def test_cuda_visible_devices(visible: str | None, names: list[str]) -> None:
    assert [gpu.name for gpu in select_visible(MACHINE, visible)] == names


@pytest.mark.parametrize("visible", ["3", "GPU-x", "MIG-a", "all"])
def test_devices_that_are_not_there_are_refused(visible: str) -> None:
    with pytest.raises(ConfigError, match=f"CUDA_VISIBLE_DEVICES={visible}"):
        select_visible(MACHINE, visible)


def test_a_machine_without_gpus_has_none_whatever_is_asked_for() -> None:
    assert select_visible([], "0,1") == []


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 8), ("400000 100000", 4), ("150000 100000", 1), ("50000 100000", 1), ("6400000 100000", 8)],
)
def test_cores_by_quota(quota: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    (tmp_path / "cpu.max").write_text(quota + "\n")
    assert hardware._count_cores(tmp_path / "cpu.max") == cores
    assert hardware._count_cores(tmp_path / "none") == 8


def test_memory_by_limit(tmp_path: Path) -> None:
    total = psutil.virtual_memory().total
    limit = tmp_path / "memory.max"
    for text, expected in (("max", total), (str(2**20), 2**20), (str(2**60), total)):
        limit.write_text(text + "\n")
        assert hardware._memory_limit_bytes(limit) == expected
    assert hardware._memory_limit_bytes(tmp_path / "none") == total


def test_cpu_name_and_flags(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nmodel name\t: Xeon: the third\nflags\t\t: fpu amx_bf16 avx\n\nprocessor\t: 1\n")
    assert hardware._read_cpuinfo(path) == ("Xeon: the third", {"fpu", "amx_bf16", "avx"})
    assert hardware._read_cpuinfo(tmp_path / "none") == ("unknown", set())
