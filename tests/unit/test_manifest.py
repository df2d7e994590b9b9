"""A run's name follows from what is learned, and from nothing else."""

from collections.abc import Callable
from typing import Any

import pytest

from job import manifest
from job.manifest import make_run_id
from job.presets import load_presets
from job.settings import Settings, settings_groups
from job.settings_problems import setting_names

Load = Callable[..., Settings]


def run_id(settings: Settings, **changes: Any) -> str:
    facts: dict[str, Any] = {
        "train": [("aa", 1.0)],
        "evaluation": ["bb"],
        "model_revision": "main1",
        "chat_template": None,
    }
    return make_run_id(settings, **(facts | changes))


def test_it_is_16_hex_digits_and_stable(load: Load) -> None:
    assert len(run_id(load())) == 16
    int(run_id(load()), 16)
    assert run_id(load()) == run_id(load())
    assert run_id(load()) == run_id(load(LORA__R=16))  # given or by default: the same run


CHANGES = {
    "MODEL__ID": "org/other",
    "MODEL__DTYPE": "float32",
    "MODEL__ATTN_IMPLEMENTATION": "eager",
    "DATA__EVAL_FRACTION": "0.2",
    "DATA__COLUMNS": '{"review": "text"}',
    "DATA__TEMPLATE": "{{ q }} {% generation %}{{ a }}{% endgeneration %}",
    "DATA__MAX_LENGTH": "64",
    "DATA__TRUNCATION": "keep_start",
    "DATA__LOSS_ON": "all",
    "LORA__R": "8",
    "LORA__ALPHA": "8",
    "LORA__DROPOUT": "0",
    "LORA__TARGET_MODULES": "q_proj",
    "LORA__MODULES_TO_SAVE": "embed_tokens",
    "LORA__RSLORA": "true",
    "LORA__DORA": "true",
    "QUANTIZATION": "nf4",
    "TRAIN__EPOCHS": "1",
    "TRAIN__MAX_STEPS": "5",
    "TRAIN__LEARNING_RATE": "1e-5",
    "TRAIN__SCHEDULER": "linear",
    "TRAIN__WARMUP": "0",
    "TRAIN__GLOBAL_BATCH_SIZE": "16",
    "TRAIN__PACKING": "false",
    "TRAIN__MAX_GRAD_NORM": "2",
    "TRAIN__OPTIMIZER": "paged_adamw_8bit",
    "TRAIN__EARLY_STOPPING_PATIENCE": "2",
    "TRAIN__SEED": "1",
}
KEEPS = {
    "MODEL__REVISION": "v2",  # counts as the commit that it resolves to
    "MODEL__CHAT_TEMPLATE": "/elsewhere/chat.jinja",  # counts as its text
    "DATA__URI": "s3://elsewhere/train.jsonl",
    "DATA__EVAL_URI": "s3://elsewhere/eval.jsonl",
    "DATA__BAD_ROWS": "skip",
    "DATA__MAX_BAD_FRACTION": "0.5",
    "DATA__MAX_DROPPED_FRACTION": "0.5",
    "TRAIN__MICRO_BATCH_SIZE": "2",
    "TRAIN__GRADIENT_CHECKPOINTING": "true",
    "TRAIN__LOGGING_STEPS": "1",
    "TRAIN__LOSS": "chunked",
    "TRAIN__ACCEPT_PARTIAL": "true",
    "CHECKPOINT__URI": "s3://elsewhere/checkpoints",
    "CHECKPOINT__EVERY_STEPS": "10",
    "CHECKPOINT__EVERY_MINUTES": "1",
    "CHECKPOINT__KEEP": "1",
    "PARALLEL__ENGINE": "ddp",
    "PARALLEL__OFFLOAD": "true",
    "PARALLEL__PROCESSES": "2",
    "PARALLEL__NODES": "2",
    "PARALLEL__NODE_RANK": "1",
    "PARALLEL__HOST": "node-0",
    "PARALLEL__PORT": "1234",
    "PARALLEL__WAIT_MINUTES": "1",
    "EVAL__PROMPTS": '["Who are you?"]',
    "EVAL__SAMPLES": "1",
    "EVAL__MAX_NEW_TOKENS": "7",
    "OUTPUT__URI": "s3://elsewhere/out",
    "OUTPUT__OVERWRITE": "true",
    "OUTPUT__MERGE": "true",
    "OUTPUT__PRIVATE": "false",
    "OUTPUT__PULL_REQUEST": "true",
    "OUTPUT__LICENSE": "apache-2.0",
    "RUNTIME__WORK_DIR": "/elsewhere",
    "RUNTIME__LOG_FORMAT": "json",
    "RUNTIME__REPORT_TO": "mlflow",
    "RUNTIME__LOG_LEVEL": "debug",
    "RUNTIME__TERMINATION_LOG": "/elsewhere/log",
    "RUNTIME__MAX_HOURS": "2",
    "RUNTIME__GRACE_SECONDS": "60",
    "RUNTIME__HANG_MINUTES": "5",
    "RUNTIME__METRICS_PORT": "9400",
}
# What a setting can't be given without.
NEEDED = {"OUTPUT__PULL_REQUEST": {"OUTPUT__URI": "hf://org/name"}}


def test_every_setting_is_decided_on() -> None:
    every = {f"SFT_{name}" for name in (*CHANGES, *KEEPS)}
    assert every == set(setting_names(settings_groups()))


@pytest.mark.parametrize("name", CHANGES)
def test_a_training_setting_makes_another_run(name: str, load: Load) -> None:
    assert run_id(load(**{name: CHANGES[name]})) != run_id(load())


@pytest.mark.parametrize("name", KEEPS)
def test_places_logging_and_parallelism_do_not(name: str, load: Load) -> None:
    changed = load(**{name: KEEPS[name]} | NEEDED.get(name, {}))
    assert changed != load()
    assert run_id(changed) == run_id(load())


def test_data_and_base_model_make_another_run(load: Load) -> None:
    settings = load()
    names = {
        run_id(settings),
        run_id(settings, train=[("cc", 1.0)]),
        run_id(settings, train=[("aa", 0.5)]),
        run_id(settings, evaluation=["cc"]),
        run_id(settings, train=[("bb", 1.0)], evaluation=["aa"]),
        run_id(settings, model_revision="main2"),
        run_id(settings, chat_template="{{ messages }}"),
        run_id(settings, train=[("aa", 1.0), ("bb", 1.0)], evaluation=[]),
        run_id(settings, train=[("bb", 1.0), ("aa", 1.0)], evaluation=[]),
    }
    assert len(names) == 9


def test_the_base_models_preset_counts_as_far_as_it_is_used(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the rows are few enough for it follows from the data, which is in the name already."""
    names = {
        "MODEL__ID": "Qwen/Qwen2.5-0.5B",
        "LORA__R": "16",  # the default's value, and the preset's: given, it holds for many rows too
        "LORA__DROPOUT": "0.05",
        "TRAIN__EPOCHS": "5",
    }
    with_preset = load(MODEL__ID="Qwen/Qwen2.5-0.5B")
    given = load(**names)
    micro = load(MODEL__ID="Qwen/Qwen2.5-0.5B", TRAIN__MICRO_BATCH_SIZE="2")
    before = [run_id(settings) for settings in (with_preset, given, micro)]
    assert before[0] == before[2] != before[1]

    (preset,) = [preset for preset in load_presets() if preset.matches("Qwen2.5-0.5B")]
    changed = preset.model_copy(update={"train": preset.train.model_copy(update={"epochs": 6.0})})
    monkeypatch.setattr(manifest, "find_preset", lambda model_id: changed)
    assert run_id(with_preset) != before[0]
    assert run_id(given) == before[1]
    monkeypatch.setattr(manifest, "find_preset", lambda model_id: preset.model_copy(update={"max_rows": 99}))
    assert run_id(with_preset) != before[0]
    monkeypatch.setattr(manifest, "find_preset", lambda model_id: None)
    assert run_id(with_preset) != before[0]
