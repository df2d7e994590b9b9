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


@pytest.mark.parametrize(("quota", "cores"), [(None, 8), (4.0, 4), (1.5, 1), (0.5, 1), (64.0, 8)])
def test_cores_by_quota(quota: float | None, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert hardware._count_cores(quota) == cores


def test_memory_by_limit() -> None:
    total = psutil.virtual_memory().total
    for limit_bytes, expected in ((None, total), (2**20, 2**20), (2**60, total)):
        assert hardware._count_memory_bytes(limit_bytes) == expected


def test_cpu_name_and_flags(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nmodel name\t: Xeon: the third\nflags\t\t: fpu amx_bf16 avx\n\nprocessor\t: 1\n")
    assert hardware._read_cpuinfo(path) == ("Xeon: the third", {"fpu", "amx_bf16", "avx"})
    assert hardware._read_cpuinfo(tmp_path / "none") == ("unknown", set())


@pytest.mark.parametrize(
    ("flags", "units"),
    [
        ({"avx512f", "avx512_bf16"}, "AVX-512 BF16"),
        ({"avx512_bf16", "amx_bf16"}, "AMX"),
        ({"avx512f", "amx_tile"}, None),
    ],
)
def test_what_multiplies_bfloat16(flags: set[str], units: str | None) -> None:
    assert hardware._find_bf16_units(flags) == units
