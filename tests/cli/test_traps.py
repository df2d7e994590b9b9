"""The traps of fine-tuning, each of which trains today's libraries into nothing without a word: the job must refuse or
warn by itself, through its command line, with the number in the message."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from job_cli import ROOT, Ended, job_environment, run_job

GARDEN = ROOT / "tests" / "data" / "recipes" / "tiny-data.jsonl"  # 78 rows


@pytest.fixture
def environment(tiny_model: Path, tmp_path: Path) -> dict[str, str]:
    """A job on 78 rows, none of them held out."""
    return job_environment(
        tmp_path,
        MODEL__ID=tiny_model,
        DATA__URI=GARDEN,
        DATA__EVAL_FRACTION=0,
        OUTPUT__URI=tmp_path / "slot",
    )


def refuse(environment: dict[str, str], code: int, *words: str) -> Ended:
    """Check a job that must end with this code, and these words in its message."""
    ended = run_job(environment, "check")
    assert ended.code == code, ended.output
    assert "Traceback" not in ended.output
    assert [word for word in words if word not in ended.outcome["message"]] == [], ended.outcome["message"]
    assert ended.outcome["hint"]
    return ended


def warn(environment: dict[str, str], *words: str) -> None:
    """Check a job that is ready to train, with one warning that holds these words."""
    ended = run_job(environment, "check")
    assert ended.code == 0, ended.output
    warnings = read_warnings(ended)
    assert [warning for warning in warnings if all(word in warning for word in words)], warnings


def read_warnings(ended: Ended) -> list[str]:
    return [line.split(" warning: ")[1] for line in ended.output.splitlines() if " warning: " in line]


def read_xray(tmp_path: Path) -> dict[str, Any]:
    xray: dict[str, Any] = json.loads((tmp_path / "work" / "run" / "xray.json").read_text())
    return xray


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# -- warmup ------------------------------------------------------------------------------------------------------------


def test_warmup_of_100_steps_in_a_run_of_10(environment: dict[str, str]) -> None:
    environment |= {"SFT_TRAIN__GLOBAL_BATCH_SIZE": "8", "SFT_TRAIN__EPOCHS": "1", "SFT_TRAIN__WARMUP": "100"}
    ended = refuse(environment, 78, "SFT_TRAIN__WARMUP=100", "10 steps", "only 9 % of SFT_TRAIN__LEARNING_RATE")
    assert "SFT_TRAIN__WARMUP=1," in ended.outcome["hint"]
    assert run_job(environment | {"SFT_TRAIN__WARMUP": "1"}, "check").code == 0  # what the hint says works


def test_warmup_of_half_the_run(environment: dict[str, str]) -> None:
    environment |= {"SFT_TRAIN__GLOBAL_BATCH_SIZE": "2", "SFT_TRAIN__EPOCHS": "1", "SFT_TRAIN__WARMUP": "20"}
    warn(environment, "SFT_TRAIN__WARMUP=20", "20 of the 39 steps", "SFT_TRAIN__WARMUP=3 ")


# -- nothing is supervised ---------------------------------------------------------------------------------------------

LONG_PROMPT = {"prompt": "Tell me all about bread. " * 20, "completion": "It rises."}
SHORT_PROMPT = {"prompt": "What does bread do?", "completion": "It rises."}


def test_every_prompt_fills_the_sequence(environment: dict[str, str], tmp_path: Path) -> None:
    data = write_rows(tmp_path / "long.jsonl", [LONG_PROMPT] * 12)
    environment |= {"SFT_DATA__URI": str(data), "SFT_DATA__MAX_LENGTH": "64", "SFT_DATA__TRUNCATION": "keep_start"}
    ended = refuse(environment, 65, "none of the 12 rows", "nothing of what is supervised within 64 tokens")
    assert "SFT_DATA__MAX_LENGTH" in ended.outcome["hint"]


def test_some_prompts_fill_the_sequence(environment: dict[str, str], tmp_path: Path) -> None:
    data = write_rows(tmp_path / "long.jsonl", [LONG_PROMPT, *[SHORT_PROMPT] * 19])
    environment |= {"SFT_DATA__URI": str(data), "SFT_DATA__MAX_LENGTH": "64", "SFT_DATA__TRUNCATION": "keep_start"}
    warn(environment, "1 of 20 rows are longer than 64 tokens", "1 left out, for nothing that is supervised")
    assert read_xray(tmp_path)["train"] == 19
    environment["SFT_DATA__MAX_DROPPED_FRACTION"] = "0.04"
    refuse(environment, 65, "1 of 20 rows, 5.0%", "SFT_DATA__MAX_DROPPED_FRACTION=0.04")


def test_the_answer_is_cut_off_in_part(environment: dict[str, str], tmp_path: Path) -> None:
    long_answer = {"prompt": "What does bread do?", "completion": "It rises and rises. " * 40}
    data = write_rows(tmp_path / "long.jsonl", [long_answer, *[SHORT_PROMPT] * 19])
    environment |= {"SFT_DATA__URI": str(data), "SFT_DATA__MAX_LENGTH": "64", "SFT_DATA__TRUNCATION": "keep_start"}
    warn(environment, "1 of 20 rows are longer than 64 tokens", "1 cut off", "of them supervised")
    assert read_xray(tmp_path)["too_long"]["lost_supervised_tokens"] > 100


def test_a_template_that_marks_nothing(environment: dict[str, str]) -> None:
    environment["SFT_DATA__TEMPLATE"] = "Q: {{ instruction }} A: {{ output }}"
    ended = refuse(environment, 78, "SFT_DATA__TEMPLATE", "marks nothing to learn")
    assert "{% generation %}" in ended.outcome["hint"]


def test_a_template_that_marks_nothing_in_some_rows(environment: dict[str, str]) -> None:
    environment["SFT_DATA__TEMPLATE"] = (
        "{{ instruction }} {% if output == 'Eight.' %}{% generation %}{{ output }}{% endgeneration %}{% endif %}"
    )
    refuse(environment, 65, "rows", "tiny-data.jsonl:1: the template marks no answer in it")


# -- where an answer ends ----------------------------------------------------------------------------------------------


def test_padding_that_is_eos_leaves_eos_supervised(environment: dict[str, str], tmp_path: Path) -> None:
    environment["SFT_TRAIN__PACKING"] = "false"
    ended = run_job(environment, "check")
    assert ended.code == 0, ended.output
    assert "<|im_end|> is the padding too" in ended.output
    assert "all 78 rows still teach it" in " ".join(ended.output.split())
    end = read_xray(tmp_path)["turn_end"]
    assert end["pad_token"] == "<|im_end|>"
    assert end["stop_tokens"] == ["<|im_end|>"]
    assert (end["rows_that_stop"], end["rows_by_token"]) == (78, {"<|im_end|>": 78})


def test_an_end_of_turn_that_generation_does_not_stop_at(
    environment: dict[str, str], tiny_model: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    edit_json(model / "tokenizer_config.json", eos_token="<|endoftext|>")
    for name in ("config.json", "generation_config.json"):
        edit_json(model / name, eos_token_id=0)  # <|endoftext|>
    environment |= {"SFT_MODEL__ID": str(model), "SFT_TRAIN__MAX_STEPS": "2"}
    ended = run_job(environment)
    assert ended.code == 0, ended.output
    words = ("78 of 78 rows end in <|im_end|>", "stops at <|endoftext|>", "<|im_end|> becomes the EOS")
    assert any(all(word in warning for word in words) for warning in read_warnings(ended)), ended.output
    published = json.loads((tmp_path / "slot" / "tokenizer_config.json").read_text())
    assert published["eos_token"] == "<|im_end|>"


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# -- a loss that leaves the numbers ------------------------------------------------------------------------------------


def test_a_loss_of_nan_stops_at_once(environment: dict[str, str], tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    weights = load_file(model / "model.safetensors")
    # The same function as before, but with numbers in its middle that the gate can drive beyond float32.
    weights["model.layers.1.mlp.up_proj.weight"] *= 1e33
    weights["model.layers.1.mlp.down_proj.weight"] *= 1e-33
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    environment |= {
        "SFT_MODEL__ID": str(model),
        "SFT_MODEL__DTYPE": "float32",
        "SFT_LORA__TARGET_MODULES": "gate_proj",
        "SFT_LORA__R": "1",
        "SFT_LORA__ALPHA": "8192",
        "SFT_TRAIN__LEARNING_RATE": "1",
        "SFT_TRAIN__SCHEDULER": "constant",
        "SFT_TRAIN__MAX_STEPS": "100",
        "SFT_TRAIN__GLOBAL_BATCH_SIZE": "8",
    }
    ended = run_job(environment)
    assert ended.code == 80, ended.output
    step = ended.outcome["step"]
    assert 1 < step < 10  # the learning rate is to blame, and a pass has 10 steps
    assert f"step {step} of 100: loss nan" in ended.outcome["message"]
    assert "learning rate 1;" in ended.outcome["message"]
    order = np.random.default_rng([42, 0]).permutation(78)  # of the first pass
    lines = ", ".join(str(row + 1) for row in sorted(order[8 * (step - 1) : 8 * step]))
    assert f"the rows of this step: {GARDEN}:{lines}" in ended.outcome["message"]
    assert "SFT_TRAIN__LEARNING_RATE=0.25" in ended.outcome["hint"]
    assert f"step {step + 1}/100" not in ended.output
    assert list((tmp_path / "slot").rglob("*")) == []


# -- too little --------------------------------------------------------------------------------------------------------


def test_too_little_data_for_the_learning_rate(environment: dict[str, str]) -> None:
    environment |= {"SFT_TRAIN__LEARNING_RATE": "1e-6", "SFT_TRAIN__EPOCHS": "3", "SFT_TRAIN__GLOBAL_BATCH_SIZE": "2"}
    warn(environment, "too little to learn: 117 steps at up to 1e-06", "SFT_TRAIN__LEARNING_RATE", "-fold")


def test_too_few_steps(environment: dict[str, str]) -> None:
    environment |= {"SFT_TRAIN__EPOCHS": "1", "SFT_TRAIN__GLOBAL_BATCH_SIZE": "8"}
    warn(environment, "only 10 steps of 8 sequences each", "SFT_TRAIN__EPOCHS=3 gives 20 or more")
