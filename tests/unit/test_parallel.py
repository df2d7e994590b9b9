"""What the machine can't do, and a batch that can't be split, are refused before anything is fetched."""

from collections.abc import Callable

import pytest

from job import support
from job.errors import ConfigError
from job.hardware import Hardware
from job.parallel import plan_parallel
from job.plan import TrainPlan
from job.settings import Settings

Load = Callable[..., Settings]
Machine = Callable[..., Hardware]
PlanFor = Callable[..., TrainPlan]


def refusal(settings: Settings, hardware: Hardware) -> ConfigError:
    with pytest.raises(ConfigError) as raised:
        plan_parallel(settings, hardware)
    return raised.value


@pytest.mark.parametrize(
    ("processes", "global_batch", "micro", "message", "hint"),
    [
        (3, 8, "auto", "SFT_TRAIN__GLOBAL_BATCH_SIZE=8: .* not a multiple of 3 processes", "multiple of 3"),
        (2, 1, "auto", "SFT_TRAIN__GLOBAL_BATCH_SIZE=1: .* not a multiple of 2 processes", "multiple of 2"),
        (1, 8, 3, "=8: .* not a multiple of SFT_TRAIN__MICRO_BATCH_SIZE=3 x 1 process$", "multiple of 3"),
        (2, 8, 8, "=8: .* not a multiple of SFT_TRAIN__MICRO_BATCH_SIZE=8 x 2 processes", "multiple of 16"),
    ],
)
def test_arithmetic_that_cannot_work_out(
    processes: int, global_batch: object, micro: object, message: str, hint: str, load: Load, machine: Machine
) -> None:
    settings = load(PARALLEL__PROCESSES=processes, TRAIN__GLOBAL_BATCH_SIZE=global_batch, TRAIN__MICRO_BATCH_SIZE=micro)
    error = refusal(settings, machine())
    assert error.hint == f"use a {hint}"
    with pytest.raises(ConfigError, match=message):
        raise error


@pytest.mark.parametrize(
    ("hardware", "dtype"),
    [
        ({"gpus": 1, "capability": (7, 5)}, "float16"),
        ({"gpus": 1, "capability": (8, 0)}, "bfloat16"),
        ({"gpus": 2, "capability": (10, 0)}, "bfloat16"),
        ({}, "float32"),
        ({"bf16": "AVX-512 BF16"}, "bfloat16"),
    ],
)
def test_precision_by_hardware(hardware: dict[str, object], dtype: str, plan_for: PlanFor) -> None:
    plan = plan_for(hardware)
    assert plan.dtype == dtype
    assert plan.sources["dtype"].startswith("auto: ")
    assert plan.device == ("cuda" if "gpus" in hardware else "cpu")


def test_deepspeed_on_a_cpu_trains_in_float32(load: Load, machine: Machine) -> None:
    assert plan_parallel(load(PARALLEL__ENGINE="zero3"), machine(bf16="AMX")).dtype == "float32"
    assert plan_parallel(load(PARALLEL__ENGINE="ddp"), machine(bf16="AMX")).dtype == "bfloat16"


def test_one_old_gpu_among_new_ones_decides(load: Load, machine: Machine) -> None:
    old, new = machine(gpus=1, capability=(7, 5)), machine(gpus=1, capability=(9, 0))
    mixed = Hardware(new.gpus + old.gpus, "CPU", 8, None, 2**30)
    assert plan_parallel(load(), mixed).dtype == "float16"


@pytest.mark.parametrize(
    ("hardware", "setting", "value"),
    [
        ({"gpus": 1, "capability": (7, 5)}, "MODEL__DTYPE", "bfloat16"),
        ({}, "MODEL__DTYPE", "float16"),
        ({}, "MODEL__ATTN_IMPLEMENTATION", "flash_attention_2"),
        ({"gpus": 1}, "PARALLEL__PROCESSES", "2"),
    ],
)
def test_what_the_hardware_cannot_do(
    hardware: dict[str, object], setting: str, value: str, load: Load, machine: Machine
) -> None:
    assert refusal(load(**{setting: value}), machine(**hardware)).message.startswith(f"SFT_{setting}={value}: ")


def test_more_processes_than_cores_is_a_warning(load: Load, machine: Machine) -> None:
    parallel = plan_parallel(load(PARALLEL__PROCESSES=4), machine(cores=2))
    assert (parallel.processes, parallel.threads_per_process) == (4, 1)
    assert parallel.warnings == ["SFT_PARALLEL__PROCESSES=4: only 2 CPU cores are here"]


def test_a_warmup_beyond_max_steps_is_refused_before_the_data_is_there(load: Load, machine: Machine) -> None:
    assert "SFT_TRAIN__WARMUP=20" in refusal(load(TRAIN__MAX_STEPS=10, TRAIN__WARMUP=20), machine()).message


@pytest.mark.parametrize(
    ("gpus", "installed", "reason", "hint"),
    [
        (0, True, "there is no GPU", "use adamw, or leave it at auto"),
        (0, False, "there is no GPU", "use adamw, or leave it at auto"),
        (1, False, "the package bitsandbytes is not installed", "use adamw, or leave it at auto"),
    ],
)
def test_paged_adamw_needs_a_gpu_and_its_package(
    gpus: int, installed: bool, reason: str, hint: str, load: Load, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(support, "_is_installed", lambda package: installed)
    error = refusal(load(TRAIN__OPTIMIZER="paged_adamw_8bit"), machine(gpus=gpus))
    assert error.message == f"SFT_TRAIN__OPTIMIZER=paged_adamw_8bit: {reason}"
    assert error.hint == hint


def test_paged_adamw_on_a_gpu_with_its_package(plan_for: PlanFor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "_is_installed", lambda package: package == "bitsandbytes")
    plan = plan_for({"gpus": 1}, TRAIN__OPTIMIZER="paged_adamw_8bit")
    assert (plan.optimizer, plan.sources["optimizer"]) == ("paged_adamw_8bit", "SFT_TRAIN__OPTIMIZER")
    assert plan_for({"gpus": 1}).optimizer == "adamw"


@pytest.mark.parametrize(
    ("gpus", "settings", "message", "hint"),
    [
        (0, {"PARALLEL__ENGINE": "fsdp2"}, "SFT_PARALLEL__ENGINE=fsdp2: it needs a GPU", "zero3"),
        (0, {"PARALLEL__OFFLOAD": "true"}, "SFT_PARALLEL__OFFLOAD=true: there is no GPU", "auto"),
        (1, {"PARALLEL__OFFLOAD": "true", "PARALLEL__ENGINE": "zero2"}, "OFFLOAD=true: zero2 keeps them", "=zero3"),
        (1, {"PARALLEL__OFFLOAD": "true", "PARALLEL__ENGINE": "ddp"}, "OFFLOAD=true: ddp keeps them", "=zero3"),
        (0, {"MODEL__DTYPE": "bfloat16", "PARALLEL__ENGINE": "zero2"}, "DTYPE=bfloat16: zero2 on a CPU", "float32"),
        (1, {"QUANTIZATION": "nf4", "PARALLEL__ENGINE": "zero3"}, "SFT_QUANTIZATION=nf4: ZeRO-3 splits", "zero2"),
        (1, {"QUANTIZATION": "int8", "PARALLEL__ENGINE": "fsdp2"}, "SFT_QUANTIZATION=int8: FSDP2 can't", "zero2"),
    ],
)
def test_an_engine_that_cannot_do_it(
    gpus: int, settings: dict[str, str], message: str, hint: str, load: Load, machine: Machine
) -> None:
    error = refusal(load(**settings), machine(gpus=gpus))
    assert message in error.message
    assert hint in error.hint


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_an_engine_whose_package_is_missing(
    engine: str, load: Load, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(support, "_is_installed", lambda package: package != "deepspeed")
    error = refusal(load(PARALLEL__ENGINE=engine), machine())
    assert error.message == f"SFT_PARALLEL__ENGINE={engine}: the package deepspeed is not installed"
    assert "pip install deepspeed" in error.hint


@pytest.mark.parametrize(
    ("gpus", "settings"),
    [
        (0, {"PARALLEL__ENGINE": "zero2"}),
        (0, {"PARALLEL__ENGINE": "zero3"}),
        (1, {"PARALLEL__ENGINE": "zero3", "PARALLEL__OFFLOAD": "true"}),
        (1, {"PARALLEL__ENGINE": "fsdp2", "QUANTIZATION": "nf4"}),
        (1, {"PARALLEL__ENGINE": "zero2", "QUANTIZATION": "int8"}),
    ],
)
def test_an_engine_that_can(gpus: int, settings: dict[str, str], load: Load, machine: Machine) -> None:
    assert plan_parallel(load(**settings), machine(gpus=gpus)).warnings == []
