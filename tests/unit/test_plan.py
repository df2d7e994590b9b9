"""Settings, data and hardware become numbers that work out, or an error that names the setting."""

import random
from collections.abc import Callable

import pytest

from job.batch import choose_micro_batch_size
from job.errors import ConfigError
from job.hardware import Hardware
from job.parallel import plan_parallel
from job.plan import DataFacts, TrainPlan, make_plan
from job.settings import Settings

Load = Callable[..., Settings]
Machine = Callable[..., Hardware]
PlanFor = Callable[..., TrainPlan]


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


def test_the_batch_always_adds_up(load: Load, machine: Machine, facts: Callable[..., DataFacts]) -> None:
    generator = random.Random(0)
    accepted = 0
    for _ in range(300):
        settings = load(
            MODEL__ID=generator.choice(["org/model", "Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-7B-Instruct"]),
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
        assert plan.global_batch_size == plan.micro_batch_size * plan.gradient_accumulation_steps * plan.processes
        assert min(plan.micro_batch_size, plan.gradient_accumulation_steps, plan.threads_per_process) >= 1
        for asked, planned in (
            (settings.parallel.processes, plan.processes),
            (settings.train.global_batch_size, plan.global_batch_size),
            (settings.train.micro_batch_size, plan.micro_batch_size),
        ):
            assert asked in ("auto", planned)
    assert accepted > 50


@pytest.mark.parametrize(
    ("share", "row_tokens", "micro", "padded"),
    [
        (8, 512, 8, 8),
        (8, 513, 4, 4),
        (8, 1024, 4, 4),
        (8, 4096, 1, 1),
        (8, 9999, 1, 1),
        (6, 512, 6, 6),
        (7, 600, 1, 1),
        (64, 8, 64, 8),
        (96, 100, 32, 8),
    ],
)
def test_auto_micro_batch(share: int, row_tokens: int, micro: int, padded: int) -> None:
    def count_tokens(size: int) -> int:
        return size * row_tokens

    assert choose_micro_batch_size(share, count_tokens, packing=True) == micro
    assert choose_micro_batch_size(share, count_tokens, packing=False) == padded


def test_every_value_has_its_source(plan_for: PlanFor) -> None:
    plan = plan_for(LORA__R=32, LORA__MODULES_TO_SAVE="lm_head", TRAIN='{"seed": 7}', TRAIN__EPOCHS=2)
    assert set(plan.sources) == set(TrainPlan.model_fields) - {"sources", "warnings"}
    expected = {
        "lora_r": (32, "SFT_LORA__R"),
        "lora_alpha": (64, "auto: 2r"),
        "lora_dropout": (0.05, "default"),
        "modules_to_save": (["lm_head"], "SFT_LORA__MODULES_TO_SAVE"),
        "chat_template": ("the tokenizer's own", "default"),
        "truncation": ("drop", "default"),
        "seed": (7, "SFT_TRAIN__SEED"),
        "model_id": ("org/model", "SFT_MODEL__ID"),
        "steps": (25, "2 x 100 rows in batches of 8"),
        "epochs": (2.0, "SFT_TRAIN__EPOCHS"),
        "warmup_steps": (0, "default (0.03)"),
        "model_revision": ("abc123", "resolved"),
        "global_batch_size": (8, "auto"),
        "eval_interval_steps": (None, "no early stopping"),
    }
    values = plan.model_dump()
    assert {name: (values[name], plan.sources[name]) for name in expected} == expected
    assert plan.warnings == []


@pytest.mark.parametrize(
    ("model_type", "setting", "packing"),
    [("llama", "auto", True), ("qwen3", "auto", True), ("gpt2", "auto", False), ("gpt2", "true", True)],
)
def test_packing_by_architecture(model_type: str, setting: str, packing: bool, plan_for: PlanFor) -> None:
    plan = plan_for(data={"model_type": model_type}, TRAIN__PACKING=setting)
    assert plan.packing is packing
    assert plan.sources["packing"].startswith("SFT_TRAIN__PACKING" if setting != "auto" else f"auto: {model_type} ")


def test_a_single_row(plan_for: PlanFor) -> None:
    plan = plan_for(data={"train_rows": 1, "eval_rows": 0})
    assert (plan.steps, plan.epochs, plan.warmup_steps, plan.logging_steps) == (2, 16.0, 0, 1)
    assert any("SFT_TRAIN__GLOBAL_BATCH_SIZE=1 would not" in warning for warning in plan.warnings)


@pytest.mark.parametrize(
    ("rows", "steps", "source"),
    [
        (4000, 1500, "auto: 3 passes"),
        (134, 51, "auto: 3 passes"),
        (133, 67, "rule few-rows: 4 passes, for 67 steps from 133 rows"),
        (72, 54, "rule few-rows: 6 passes, for 54 steps from 72 rows"),
        (36, 45, "rule few-rows: 10 passes, for 45 steps from 36 rows"),
    ],
)
def test_few_rows_are_passed_over_more_often(rows: int, steps: int, source: str, plan_for: PlanFor) -> None:
    plan = plan_for(data={"train_rows": rows})
    assert (plan.steps, plan.sources["epochs"]) == (steps, source)
    given = plan_for(data={"train_rows": rows}, TRAIN__EPOCHS=1)
    assert (given.epochs, given.sources["epochs"]) == (pytest.approx(1, rel=0.12), "SFT_TRAIN__EPOCHS")
    assert plan_for(data={"train_rows": rows}, TRAIN__MAX_STEPS=30).steps == 30


def test_max_steps_instead_of_epochs(plan_for: PlanFor) -> None:
    plan = plan_for(TRAIN__MAX_STEPS=1000)
    assert (plan.steps, plan.epochs, plan.logging_steps) == (1000, 80.0, 10)
    assert plan.sources["steps"] == "SFT_TRAIN__MAX_STEPS"
    assert plan.sources["logging_steps"] == "auto: about 100 a run"


def test_78_rows_at_batch_8_for_one_epoch(plan_for: PlanFor) -> None:
    settings = {"TRAIN__EPOCHS": 1, "TRAIN__GLOBAL_BATCH_SIZE": 8}
    plan = plan_for(data={"train_rows": 78}, **settings)
    assert (plan.steps, plan.warmup_steps, plan.logging_steps) == (10, 0, 1)
    assert plan.warnings == [
        "only 10 steps of 8 sequences each: SFT_TRAIN__EPOCHS=3 gives 20 or more, so does a smaller "
        "SFT_TRAIN__GLOBAL_BATCH_SIZE"
    ]
    with pytest.raises(ConfigError, match=r"SFT_TRAIN__WARMUP=100: the run has 10 steps.* 9 % of") as error:
        plan_for(data={"train_rows": 78}, **settings, TRAIN__WARMUP=100)
    assert error.value.hint.startswith("use SFT_TRAIN__WARMUP=1,")
    long = plan_for(data={"train_rows": 78}, **settings, TRAIN__WARMUP=4)
    assert long.warmup_steps == 4
    assert "SFT_TRAIN__WARMUP=4: 4 of the 10 steps only warm up; SFT_TRAIN__WARMUP=1 is" in long.warnings[0]
    assert plan_for(data={"train_rows": 78}, **settings, TRAIN__WARMUP=1).warnings == plan.warnings


def test_the_recipe_of_small_rates_and_many_steps_is_not_warned_of(plan_for: PlanFor) -> None:
    plan = plan_for(
        data={"train_rows": 36, "eval_rows": 4},
        TRAIN='{"learning_rate": 5e-6, "global_batch_size": 1, "epochs": 10, "early_stopping_patience": 3}',
    )
    assert (plan.steps, plan.warnings) == (360, [])
    assert (plan.early_stopping_patience, plan.eval_interval_steps) == (3, 36)
    assert plan.sources["eval_interval_steps"] == "one pass of the rows"


@pytest.mark.parametrize(
    ("settings", "longer"),
    [({"TRAIN__EPOCHS": 10}, "SFT_TRAIN__EPOCHS"), ({"TRAIN__MAX_STEPS": 45}, "SFT_TRAIN__MAX_STEPS")],
)
def test_too_little_to_learn_is_warned_of(settings: dict[str, object], longer: str, plan_for: PlanFor) -> None:
    (warning,) = plan_for(data={"train_rows": 36}, TRAIN__LEARNING_RATE=5e-6, **settings).warnings
    assert "45 steps at up to 5e-06 sum to 1.1e-04" in warning
    assert f"raise SFT_TRAIN__LEARNING_RATE or {longer} 5-fold" in warning


def test_early_stopping_needs_held_out_rows(plan_for: PlanFor) -> None:
    with pytest.raises(ConfigError, match="SFT_TRAIN__EARLY_STOPPING_PATIENCE=2: none of the 36 rows") as error:
        plan_for(data={"train_rows": 36, "eval_rows": 0}, TRAIN__EARLY_STOPPING_PATIENCE=2)
    assert error.value.hint == "set SFT_DATA__EVAL_URI, or SFT_DATA__EVAL_FRACTION=0.1"


def test_a_patience_that_outlasts_the_run_is_warned_of(plan_for: PlanFor) -> None:
    patience = {"TRAIN__EARLY_STOPPING_PATIENCE": 3, "TRAIN__GLOBAL_BATCH_SIZE": 2}
    (warning,) = plan_for(**patience, TRAIN__EPOCHS=3).warnings
    assert warning.startswith("SFT_TRAIN__EARLY_STOPPING_PATIENCE=3: the run has only 3 evaluations")
    assert plan_for(**patience, TRAIN__EPOCHS=4).warnings == []


def test_what_the_machine_lacks_is_warned_of_in_the_plan(plan_for: PlanFor) -> None:
    plan = plan_for({"cores": 2}, PARALLEL__PROCESSES=4, MODEL__DTYPE="bfloat16")
    assert plan.warnings[0] == "SFT_PARALLEL__PROCESSES=4: only 2 CPU cores are here"
    assert plan.warnings[1].startswith("SFT_MODEL__DTYPE=bfloat16: this CPU has neither AMX nor")


def test_the_data_says_which_tokens_are_new(plan_for: PlanFor) -> None:
    plan = plan_for(data={"chat_template": "chatml", "new_tokens": ["<|im_start|>"]}, MODEL__CHAT_TEMPLATE="chatml")
    assert (plan.chat_template, plan.new_tokens) == ("chatml", ["<|im_start|>"])
    assert plan.sources["chat_template"] == "SFT_MODEL__CHAT_TEMPLATE"


def test_a_plan_survives_the_way_to_the_workers(plan_for: PlanFor) -> None:
    for modules in ("all-linear", "q_proj,v_proj"):
        plan = plan_for(LORA__TARGET_MODULES=modules)
        assert TrainPlan.model_validate_json(plan.model_dump_json()) == plan


def test_checkpoints_that_stay_on_this_machine_are_warned_of(plan_for: PlanFor) -> None:
    def warned(**settings: object) -> bool:
        return any("begin anew" in warning for warning in plan_for(**settings).warnings)

    assert warned(OUTPUT__URI="hf://o/n")
    assert not warned(OUTPUT__URI="hf://o/n", CHECKPOINT__URI="s3://b/c")
    assert not warned()
