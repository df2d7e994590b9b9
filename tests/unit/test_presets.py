"""Defaults by base model: which one is meant, for how many rows, and that the environment wins."""

from collections.abc import Callable
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from job import plan as plan_module
from job import presets as presets_module
from job import support
from job.plan import TrainPlan
from job.presets import Preset, find_preset, is_given, load_presets
from job.settings import Settings

PlanFor = Callable[..., TrainPlan]

SEVEN = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
# r, alpha, epochs asked for, micro batch x gradient accumulation
RECIPES = {
    "Qwen/Qwen2.5-0.5B-Instruct": (16, 32, 5, 2, 4),
    "Qwen/Qwen2.5-1.5B-Instruct": (8, 16, 4, 1, 4),
    "Qwen/Qwen2.5-7B-Instruct": (8, 16, 3, 1, 4),
}


@pytest.fixture
def bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "_is_installed", lambda package: True)


@pytest.mark.parametrize("model_id", RECIPES)
def test_78_rows_of_each_model(model_id: str, plan_for: PlanFor, bitsandbytes: None) -> None:
    plan = plan_for({"gpus": 1}, {"train_rows": 78}, MODEL__ID=model_id)
    r, alpha, epochs, micro, accumulation = RECIPES[model_id]
    assert (plan.lora_r, plan.lora_alpha, plan.lora_dropout, plan.target_modules) == (r, alpha, 0.05, SEVEN)
    assert (plan.micro_batch_size, plan.gradient_accumulation_steps) == (micro, accumulation)
    assert plan.sources["steps"] == f"{epochs} x 78 rows in batches of {micro * accumulation}"
    assert plan.epochs == pytest.approx(epochs, rel=0.03)
    assert (plan.learning_rate, plan.optimizer, plan.logging_steps) == (5e-5, "paged_adamw_8bit", 1)
    assert 10 * plan.warmup_steps <= plan.steps
    assert plan.warnings == []


@pytest.mark.parametrize("preset", load_presets(), ids=lambda preset: preset.name)
def test_all_that_a_preset_says_is_in_the_plan(preset: Preset, plan_for: PlanFor, bitsandbytes: None) -> None:
    model_id = preset.models[0].replace("*", "")
    plan = plan_for({"gpus": 1}, {"train_rows": preset.max_rows}, MODEL__ID=model_id).model_dump()
    for group in (preset.lora, preset.train):
        for field in group.model_fields_set:
            name = f"lora_{field}" if f"lora_{field}" in plan else field
            assert plan["sources"][name] == preset.describe(), field
            value = getattr(group, field)
            assert plan[name] == (pytest.approx(value, rel=0.01) if field == "epochs" else value)
    assert preset.describe() == f"preset {preset.name} (at most 1,000 rows)"


@pytest.mark.parametrize(
    ("model_id", "name"),
    [
        ("Qwen/Qwen2.5-0.5B", "qwen2.5-0.5b"),
        ("qwen/QWEN2.5-0.5b-instruct", "qwen2.5-0.5b"),
        ("/models/Qwen2.5-0.5B-Instruct/", "qwen2.5-0.5b"),
        ("s3://models/Qwen2.5-1.5B-Instruct", "qwen2.5-1.5b"),
        ("hf://Qwen/Qwen2.5-7B@main", "qwen2.5-7b"),
        ("Qwen2.5-7B-Instruct-1M", "qwen2.5-7b"),
        ("Qwen/Qwen2.5-72B", None),
        ("Qwen/Qwen2.5-3B", None),
        ("Qwen/Qwen3-0.5B", None),
        ("org/my-Qwen2.5-0.5B", None),
        ("Qwen2.5-0.5B/checkpoints", None),
        ("Qwen/Qwen215-0xB", None),
    ],
)
def test_a_preset_is_found_by_the_last_part_of_the_name(model_id: str, name: str | None) -> None:
    preset = find_preset(model_id)
    assert (preset and preset.name) == name
    assert sum(preset.matches(model_id) for preset in load_presets()) <= 1


@pytest.mark.parametrize(("rows", "applies"), [(1, True), (1000, True), (1001, False)])
def test_presets_are_for_few_rows(rows: int, applies: bool, plan_for: PlanFor) -> None:
    plan = plan_for(data={"train_rows": rows}, MODEL__ID="Qwen/Qwen2.5-7B")
    assert plan.learning_rate == (5e-5 if applies else 2e-4)
    assert any(source.startswith("preset") for source in plan.sources.values()) == applies


def test_the_environment_wins_over_a_preset_and_auto_leaves_it_the_choice(plan_for: PlanFor) -> None:
    plan = plan_for(
        data={"train_rows": 78},
        MODEL__ID="Qwen/Qwen2.5-0.5B",
        LORA__R=4,
        LORA='{"dropout": 0.05}',
        TRAIN__LEARNING_RATE=2e-4,
        TRAIN__EPOCHS="auto",
        TRAIN__GLOBAL_BATCH_SIZE=6,
    )
    assert (plan.lora_r, plan.sources["lora_r"]) == (4, "SFT_LORA__R")
    assert (plan.lora_alpha, plan.sources["lora_alpha"]) == (8, "auto: 2r")
    assert (plan.lora_dropout, plan.sources["lora_dropout"]) == (0.05, "SFT_LORA__DROPOUT")
    assert (plan.learning_rate, plan.sources["learning_rate"]) == (2e-4, "SFT_TRAIN__LEARNING_RATE")
    assert plan.sources["max_grad_norm"] == plan.sources["seed"] == "default"  # not in the preset
    assert plan.steps == 65  # 5 epochs
    assert plan.sources["epochs"] == "preset qwen2.5-0.5b (at most 1,000 rows)"
    assert (plan.global_batch_size, plan.micro_batch_size, plan.gradient_accumulation_steps) == (6, 2, 3)
    assert plan_for(data={"train_rows": 78}, MODEL__ID="Qwen/Qwen2.5-0.5B", TRAIN__MAX_STEPS=9).steps == 9


@pytest.mark.parametrize(
    ("processes", "settings", "expected", "source"),
    [
        (1, {}, (8, 2, 4), "preset qwen2.5-0.5b (at most 1,000 rows)"),
        (4, {}, (8, 2, 1), "preset qwen2.5-0.5b (at most 1,000 rows)"),
        (8, {}, (8, 1, 1), "preset qwen2.5-0.5b (at most 1,000 rows)"),
        (
            3,
            {},
            (9, 3, 1),
            "preset qwen2.5-0.5b (at most 1,000 rows): 8, rounded up to a multiple of 3 for 3 processes",
        ),
        (
            1,
            {"TRAIN__MICRO_BATCH_SIZE": 3},
            (9, 3, 3),
            "preset qwen2.5-0.5b (at most 1,000 rows): 8, rounded up to a multiple of 3 for 1 process in micro batches "
            "of 3",
        ),
        (1, {"TRAIN__GLOBAL_BATCH_SIZE": 7}, (7, 7, 1), "SFT_TRAIN__GLOBAL_BATCH_SIZE"),
    ],
)
def test_a_presets_batch_gives_way(
    processes: int, settings: dict[str, object], expected: tuple[int, int, int], source: str, plan_for: PlanFor
) -> None:
    plan = plan_for({"gpus": processes}, MODEL__ID="Qwen/Qwen2.5-0.5B", **settings)
    assert (plan.global_batch_size, plan.micro_batch_size, plan.gradient_accumulation_steps) == expected
    assert plan.sources["global_batch_size"] == source
    if expected[1] != 2 and "TRAIN__MICRO_BATCH_SIZE" not in settings:
        assert "names 2, which doesn't divide" in plan.sources["micro_batch_size"]


@pytest.mark.parametrize(
    ("gpus", "installed", "why"),
    [(0, True, "there is no GPU"), (1, False, "the package bitsandbytes is not installed")],
)
def test_a_presets_optimizer_gives_way(
    gpus: int, installed: bool, why: str, plan_for: PlanFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(support, "_is_installed", lambda package: installed)
    plan = plan_for({"gpus": gpus}, MODEL__ID="Qwen/Qwen2.5-0.5B")
    assert plan.optimizer == "adamw"
    assert plan.sources["optimizer"] == (
        f"auto: preset qwen2.5-0.5b (at most 1,000 rows) names paged_adamw_8bit, but {why}"
    )


@pytest.mark.parametrize("warmup", [0.5, 40])
def test_a_presets_warmup_is_cut_and_a_given_one_is_not(
    warmup: float, plan_for: PlanFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = Preset.model_validate(
        {"name": "p", "models": ["*"], "max_rows": 99, "lora": {}, "train": {"epochs": 2, "warmup": warmup}}
    )
    monkeypatch.setattr(plan_module, "find_preset", lambda model_id: preset)
    plan = plan_for(data={"train_rows": 78})
    assert (plan.steps, plan.warmup_steps, plan.warnings) == (20, 2, [])
    assert plan.sources["warmup_steps"] == "rule short-warmup: a tenth of the steps"
    given = plan_for(data={"train_rows": 78}, TRAIN__WARMUP=0.5)
    assert (given.warmup_steps, given.sources["warmup_steps"]) == (10, "SFT_TRAIN__WARMUP (0.5)")
    assert given.warnings[0].startswith("SFT_TRAIN__WARMUP=0.5: 10 of the 20 steps only warm up")


def test_what_is_given(load: Callable[..., Settings]) -> None:
    settings = load(LORA__R=16, TRAIN__EPOCHS="auto")
    assert is_given(settings.lora, "r")
    assert not is_given(settings.lora, "dropout")
    assert not is_given(settings.train, "epochs")


def broken(path: tuple[str, ...], value: object) -> list[Any]:
    """Return the presets as they are read, with one value changed in the first."""
    entries: list[Any] = yaml.safe_load(presets_module._PATH.read_text(encoding="utf-8"))
    target = entries[0]
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return entries


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("max_rows",), 0),
        (("models",), []),
        (("rows",), 5),
        (("lora", "r"), 0),
        (("lora", "rank"), 8),
        (("lora", "dropout"), 1),
        (("train", "optimizer"), "sgd"),
        (("train", "epochs"), -1),
        (("data",), {"truncation": "drop"}),
    ],
)
def test_a_preset_holds_what_settings_take_and_nothing_else(
    path: tuple[str, ...], value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = yaml.safe_dump(broken(path, value))
    load_fresh = load_presets.__wrapped__
    monkeypatch.setattr(presets_module, "_PATH", Text(text))
    with pytest.raises(ValidationError, match=path[-1]):
        load_fresh()


class Text:
    """A file that isn't one."""

    def __init__(self, text: str) -> None:
        self._text = text

    def read_text(self, *, encoding: str) -> str:
        return self._text


def test_presets_are_told_apart_by_their_names() -> None:
    names = [preset.name for preset in load_presets()]
    assert len(set(names)) == len(names) >= 3
