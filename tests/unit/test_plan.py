"""Settings, data and hardware become numbers that work out, or an error that names the setting."""

import random
from collections.abc import Callable

import pytest

from job.errors import ConfigError
from job.hardware import Hardware
from job.plan import (
    DataFacts,
    TrainPlan,
    choose_micro_batch_size,
    count_steps,
    count_warmup_steps,
    make_plan,
    plan_parallel,
)
from job.report import format_plan
from job.settings import Settings

Load = Callable[..., Settings]
Machine = Callable[..., Hardware]
PlanFor = Callable[..., TrainPlan]


def refusal(settings: Settings, hardware: Hardware) -> ConfigError:
    with pytest.raises(ConfigError) as raised:
        plan_parallel(settings, hardware)
    return raised.value


@pytest.mark.parametrize(
    ("processes", "global_batch", "micro", "expected"),  # expected: global, micro, accumulation
    [
        ("auto", "auto", "auto", (8, 8, 1)),
        (2, "auto", "auto", (8, 4, 1)),
        (3, "auto", "auto", (9, 3, 1)),
        (12, "auto", "auto", (12, 1, 1)),
        (1, 64, "auto", (64, 8, 8)),
        (1, 64, 4, (64, 4, 16)),
        (4, 64, 4, (64, 4, 4)),
        (4, 4, 1, (4, 1, 1)),
        (1, 7, "auto", (7, 7, 1)),
        (1, 11, "auto", (11, 1, 11)),
        (2, 12, 3, (12, 3, 2)),
        (1, "auto", 16, (16, 16, 1)),
        (2, "auto", 3, (12, 3, 2)),
    ],
)
def test_batch_arithmetic(
    processes: object, global_batch: object, micro: object, expected: tuple[int, int, int], plan_for: PlanFor
) -> None:
    plan = plan_for(
        {"cores": 16},
        PARALLEL__PROCESSES=processes,
        TRAIN__GLOBAL_BATCH_SIZE=global_batch,
        TRAIN__MICRO_BATCH_SIZE=micro,
    )
    assert (plan.global_batch_size, plan.micro_batch_size, plan.gradient_accumulation_steps) == expected


@pytest.mark.parametrize(
    ("processes", "global_batch", "micro", "message", "hint"),
    [
        (3, 8, "auto", "SFT_TRAIN__GLOBAL_BATCH_SIZE=8 .* not a multiple of 3 processes", "multiple of 3"),
        (2, 1, "auto", "SFT_TRAIN__GLOBAL_BATCH_SIZE=1 .* not a multiple of 2 processes", "multiple of 2"),
        (1, 8, 3, "=8 .* not a multiple of SFT_TRAIN__MICRO_BATCH_SIZE=3 x 1 process$", "multiple of 3"),
        (2, 8, 8, "=8 .* not a multiple of SFT_TRAIN__MICRO_BATCH_SIZE=8 x 2 processes", "multiple of 16"),
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


def test_the_batch_always_adds_up(load: Load, machine: Machine, facts: Callable[..., DataFacts]) -> None:
    generator = random.Random(0)
    accepted = 0
    for _ in range(300):
        settings = load(
            PARALLEL__PROCESSES=generator.choice(["auto", 1, 2, 3, 4, 6, 8]),
            TRAIN__GLOBAL_BATCH_SIZE=generator.choice(["auto", *range(1, 65)]),
            TRAIN__MICRO_BATCH_SIZE=generator.choice(["auto", *range(1, 9)]),
        )
        hardware = machine(gpus=generator.choice([0, 8]))
        try:
            parallel = plan_parallel(settings, hardware)
        except ConfigError:
            continue
        accepted += 1
        data = facts(train_rows=generator.randint(64, 999), max_length_tokens=generator.choice([8, 700, 4096, 5000]))
        plan = make_plan(settings, parallel, data)
        assert (
            plan.global_batch_size
            == plan.micro_batch_size * plan.gradient_accumulation_steps * plan.processes
            == parallel.global_batch_size
        )
        assert min(plan.micro_batch_size, plan.gradient_accumulation_steps, plan.threads_per_process) >= 1
        for asked, planned in (
            (settings.parallel.processes, plan.processes),
            (settings.train.global_batch_size, plan.global_batch_size),
            (settings.train.micro_batch_size, plan.micro_batch_size),
        ):
            assert asked in ("auto", planned)
    assert accepted > 50


@pytest.mark.parametrize(
    ("epochs", "rows", "global_batch", "steps"),
    [(1, 80, 8, 10), (1, 81, 8, 11), (3, 27, 9, 9), (0.1, 30, 1, 3), (0.01, 10, 8, 1), (1, 1, 8, 1), (2.5, 100, 8, 32)],
)
def test_steps_cover_the_epochs(epochs: float, rows: int, global_batch: int, steps: int) -> None:
    assert count_steps(epochs, rows, global_batch) == steps


@pytest.mark.parametrize(
    ("warmup", "steps", "expected"),
    [(0, 10, 0), (0.03, 100, 3), (0.03, 30, 0), (0.1, 30, 3), (1, 2, 1), (9, 10, 9), (0.03, 1, 0), (0.99, 3, 2)],
)
def test_warmup(warmup: float, steps: int, expected: int) -> None:
    assert count_warmup_steps(warmup, steps) == expected


@pytest.mark.parametrize(
    ("warmup", "steps", "percent", "proposal"), [(100, 50, 49, 5), (10, 10, 90, 1), (20, 2, 5, 1), (1, 1, 0, 0)]
)
def test_a_warmup_as_long_as_the_run_is_refused(warmup: float, steps: int, percent: int, proposal: int) -> None:
    with pytest.raises(ConfigError, match=f"SFT_TRAIN__WARMUP={warmup}: the run has {steps} steps.* {percent} %") as e:
        count_warmup_steps(warmup, steps)
    assert e.value.hint.startswith(f"use SFT_TRAIN__WARMUP={proposal},")
    assert count_warmup_steps(proposal, steps) == proposal  # what is proposed works


def test_a_warmup_beyond_max_steps_is_refused_before_the_data_is_there(load: Load, machine: Machine) -> None:
    assert "SFT_TRAIN__WARMUP=20" in refusal(load(TRAIN__MAX_STEPS=10, TRAIN__WARMUP=20), machine()).message


@pytest.mark.parametrize(
    ("share", "max_length", "micro"),
    [(8, 512, 8), (8, 513, 4), (8, 1024, 4), (8, 4096, 1), (8, 9999, 1), (6, 512, 6), (7, 600, 1), (64, 8, 8)],
)
def test_auto_micro_batch(share: int, max_length: int, micro: int) -> None:
    assert choose_micro_batch_size(share, max_length) == micro


@pytest.mark.parametrize(
    ("hardware", "dtype"),
    [
        ({"gpus": 1, "capability": (7, 5)}, "float16"),
        ({"gpus": 1, "capability": (8, 0)}, "bfloat16"),
        ({"gpus": 2, "capability": (10, 0)}, "bfloat16"),
        ({}, "float32"),
        ({"amx": True}, "bfloat16"),
    ],
)
def test_precision_by_hardware(hardware: dict[str, object], dtype: str, plan_for: PlanFor) -> None:
    plan = plan_for(hardware)
    assert plan.dtype == dtype
    assert plan.sources["dtype"].startswith("auto: ")
    assert plan.device == ("cuda" if "gpus" in hardware else "cpu")
    assert plan.gradient_checkpointing == ("gpus" in hardware)


def test_one_old_gpu_among_new_ones_decides(load: Load, machine: Machine) -> None:
    old, new = machine(gpus=1, capability=(7, 5)), machine(gpus=1, capability=(9, 0))
    mixed = Hardware(new.gpus + old.gpus, "CPU", 8, False, 2**30)
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


def test_more_processes_than_cores_is_a_warning(load: Load, machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    parallel = plan_parallel(load(PARALLEL__PROCESSES=4), machine(cores=2))
    assert (parallel.processes, parallel.threads_per_process) == (4, 1)
    assert "SFT_PARALLEL__PROCESSES=4: only 2 CPU cores" in caplog.text


def test_every_value_has_its_source_and_is_shown(plan_for: PlanFor) -> None:
    plan = plan_for(LORA__R=32, TRAIN='{"seed": 7}', TRAIN__EPOCHS=2)
    assert set(plan.sources) == set(TrainPlan.model_fields) - {"sources"}
    expected = {
        "lora_r": (32, "SFT_LORA__R"),
        "lora_alpha": (64, "auto: 2r"),
        "lora_dropout": (0.05, "default"),
        "seed": (7, "SFT_TRAIN__SEED"),
        "model_id": ("org/model", "SFT_MODEL__ID"),
        "steps": (25, "2 epochs of the rows"),
        "warmup_steps": (0, "default (0.03)"),
        "model_revision": ("abc123", "resolved"),
    }
    values = plan.model_dump()
    assert {name: (values[name], plan.sources[name]) for name in expected} == expected
    shown = [line.split()[0] for line in format_plan(plan).splitlines() if line.startswith("  ")]
    assert sorted(shown) == sorted(plan.sources)


@pytest.mark.parametrize(
    ("model_type", "setting", "packing"),
    [("llama", "auto", True), ("qwen3", "auto", True), ("gpt2", "auto", False), ("gpt2", "true", True)],
)
def test_packing_by_architecture(model_type: str, setting: str, packing: bool, plan_for: PlanFor) -> None:
    plan = plan_for(data={"model_type": model_type}, TRAIN__PACKING=setting)
    assert plan.packing is packing
    assert plan.sources["packing"].startswith("SFT_TRAIN__PACKING" if setting != "auto" else f"auto: {model_type} ")


def test_a_single_row(plan_for: PlanFor, caplog: pytest.LogCaptureFixture) -> None:
    plan = plan_for(data={"train_rows": 1, "eval_rows": 0})
    assert (plan.steps, plan.epochs, plan.warmup_steps, plan.logging_steps) == (1, 8.0, 0, 1)
    assert "SFT_TRAIN__GLOBAL_BATCH_SIZE=1 would not" in caplog.text


def test_max_steps_instead_of_epochs(plan_for: PlanFor) -> None:
    plan = plan_for(TRAIN__MAX_STEPS=1000)
    assert (plan.steps, plan.epochs, plan.logging_steps) == (1000, 80.0, 10)
    assert plan.sources["steps"] == "SFT_TRAIN__MAX_STEPS"


def test_a_plan_survives_the_way_to_the_workers(plan_for: PlanFor) -> None:
    for modules in ("all-linear", "q_proj,v_proj"):
        plan = plan_for(LORA__TARGET_MODULES=modules)
        assert TrainPlan.model_validate_json(plan.model_dump_json()) == plan
