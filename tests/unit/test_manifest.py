"""A run's name follows from what is learned, and from nothing else."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.hardware import Hardware
from job.manifest import DataFile, make_manifest, make_run_id
from job.plan import TrainPlan
from job.settings import Settings

Load = Callable[..., Settings]


def run_id(settings: Settings, train: str = "aa", evaluation: str = "bb", revision: str = "main1") -> str:
    return make_run_id(settings, [train], [evaluation], revision)


def test_it_is_16_hex_digits_and_stable(load: Load) -> None:
    assert len(run_id(load())) == 16
    int(run_id(load()), 16)
    assert run_id(load()) == run_id(load())
    assert run_id(load()) == run_id(load(LORA__R=16))  # given or by default: the same run


CHANGES = {
    "MODEL__ID": "org/other",
    "MODEL__CHAT_TEMPLATE": "chatml",
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
    "DATA__URI": "s3://elsewhere/train.jsonl",
    "DATA__EVAL_URI": "s3://elsewhere/eval.jsonl",
    "DATA__BAD_ROWS": "skip",
    "DATA__MAX_BAD_FRACTION": "0.5",
    "DATA__MAX_DROPPED_FRACTION": "0.5",
    "TRAIN__MICRO_BATCH_SIZE": "2",
    "TRAIN__GRADIENT_CHECKPOINTING": "true",
    "TRAIN__LOGGING_STEPS": "1",
    "PARALLEL__ENGINE": "ddp",
    "PARALLEL__PROCESSES": "2",
    "OUTPUT__URI": "s3://elsewhere/out",
    "OUTPUT__OVERWRITE": "true",
    "RUNTIME__WORK_DIR": "/elsewhere",
    "RUNTIME__LOG_FORMAT": "json",
    "RUNTIME__LOG_LEVEL": "debug",
    "RUNTIME__TERMINATION_LOG": "/elsewhere/log",
}


def test_every_setting_is_decided_on() -> None:
    schema = Settings.model_json_schema()
    groups = {group: schema["$defs"][ref["$ref"].rsplit("/", 1)[-1]] for group, ref in schema["properties"].items()}
    every = {f"{group}__{field}".upper() for group, about in groups.items() for field in about["properties"]}
    assert set(CHANGES) | set(KEEPS) == every


@pytest.mark.parametrize("name", CHANGES)
def test_a_training_setting_makes_another_run(name: str, load: Load) -> None:
    assert run_id(load(**{name: CHANGES[name]})) != run_id(load())


@pytest.mark.parametrize("name", KEEPS)
def test_places_logging_and_parallelism_do_not(name: str, load: Load) -> None:
    changed = load(**{name: KEEPS[name]})
    assert changed != load()
    assert run_id(changed) == run_id(load())


def test_data_and_base_model_make_another_run(load: Load) -> None:
    settings = load()
    names = {
        run_id(settings),
        run_id(settings, train="cc"),
        run_id(settings, evaluation="cc"),
        run_id(settings, train="bb", evaluation="aa"),
        run_id(settings, revision="main2"),
        make_run_id(settings, ["aa", "bb"], [], "main1"),
        make_run_id(settings, ["bb", "aa"], [], "main1"),
    }
    assert len(names) == 7


def test_a_manifest_lists_what_lies_in_the_folder(
    load: Load, plan_for: Callable[..., TrainPlan], machine: Callable[..., Hardware], tmp_path: Path
) -> None:
    file = tmp_path / "sub" / "adapter.bin"
    file.parent.mkdir()
    file.write_bytes(b"weights")
    arguments: dict[str, Any] = {"run_id": "0" * 16, "metrics": {"steps": 3}, "files": [file], "folder": tmp_path}
    manifest = make_manifest(
        settings=load(),
        plan=plan_for(),
        hardware=machine(gpus=1),
        data=[DataFile("/d", "etag", "sha", 10, 2)],
        **arguments,
    )
    digest = hashlib.sha256(b"weights").hexdigest()
    assert manifest["files"] == [{"path": "sub/adapter.bin", "sha256": digest, "bytes": 7}]
    assert manifest["data"] == [{"uri": "/d", "etag": "etag", "sha256": "sha", "bytes": 10, "rows": 2}]
    assert manifest["base_model"] == {"id": "org/model", "revision": "abc123"}
    assert manifest["settings"]["lora"]["r"] == 16
    assert "torch" in manifest["packages"]
