"""What was read back is loaded as users load it, and must be what was trained: whatever is wrong with it, it shows."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_training import make_small_plan, save_gpt2, save_llama, train_here
from transformers import AutoTokenizer

from job.accept import ROWS, Acceptance, AcceptanceTask, find_tolerance, find_wrong_config, name_base_model
from job.accept_process import fresh_process
from job.errors import DataError, RefusedError
from job.handover import NewTokenInput, RunFolder
from job.plan import TrainPlan
from job.train.accept_adapter import accept_adapter, load_base_as_users_do

PlanFor = Callable[..., TrainPlan]
WEIGHTS = "adapter_model.safetensors"

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),  # peft's word on a GPT-2, which it then mends
    pytest.mark.filterwarnings("ignore:Found missing adapter keys"),  # peft's, which is no error to it
]


@pytest.fixture
def plan(plan_for: PlanFor) -> PlanFor:
    return partial(make_small_plan, plan_for)


def train_and_describe(
    plan: TrainPlan, base: Path, root: Path, new_token_ids: dict[str, int] | None = None, vocabulary: int = 100
) -> AcceptanceTask:
    """Train on small rows, name the base model as publishing does, and return the task of the fresh process."""
    new = [NewTokenInput(id=number, piece_ids=[11, 12]) for number in (new_token_ids or {}).values()]
    train_here(plan, base, root, new_tokens=new, vocabulary=vocabulary)
    path = root / "adapter" / "adapter_config.json"
    name, revision = name_base_model(plan.model_id, plan.model_revision)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name, "revision": revision}))
    return AcceptanceTask(
        plan=plan.model_copy(update={"new_tokens": list(new_token_ids or {})}),
        model_folder=base,
        new_token_ids=new_token_ids or {},
        rows=ROWS.validate_json(RunFolder(root).acceptance_rows.read_bytes()),
        log_format="text",
        log_level="info",
    )


def load_here(task: AcceptanceTask, adapter: Path) -> Acceptance:
    return accept_adapter(load_base_as_users_do(task), adapter, task)


@pytest.mark.parametrize(
    ("settings", "tied"),
    [
        ({"LORA__RSLORA": "true", "LORA__DORA": "true", "TRAIN__LOSS": "chunked"}, True),
        ({"LORA__MODULES_TO_SAVE": "embed_tokens,lm_head", "MODEL__DTYPE": "bfloat16"}, True),
        ({"LORA__MODULES_TO_SAVE": "lm_head", "TRAIN__PACKING": "true"}, False),
        ({"QUANTIZATION": "nf4", "TRAIN__EARLY_STOPPING_PATIENCE": 1, "TRAIN__LEARNING_RATE": 0.3}, True),
        ({"QUANTIZATION": "int8", "TRAIN__PACKING": "true"}, False),
        ({"MODEL__DTYPE": "bfloat16"}, None),
    ],
    ids=str,
)
def test_what_was_trained_is_found_again(
    plan: PlanFor, tmp_path: Path, settings: dict[str, Any], tied: bool | None
) -> None:
    base = save_gpt2(tmp_path / "base") if tied is None else save_llama(tmp_path / "base", tied=tied)
    task = train_and_describe(plan(**settings), base, tmp_path / "run")
    accepted = load_here(task, tmp_path / "run" / "adapter")
    assert accepted.rows == 8
    assert accepted.skipped is None
    assert accepted.loss is not None
    assert accepted.loss == pytest.approx(accepted.loss_trained, rel=find_tolerance(task.plan.dtype, "nf4"))
    if task.plan.dtype == "float32" and task.plan.quantization == "none":
        assert accepted.loss == pytest.approx(accepted.loss_trained, rel=1e-5)
    if task.plan.early_stopping_patience is None:
        result = RunFolder(tmp_path / "run").read_result()  # the very rows that are held out
        assert accepted.loss_trained == pytest.approx(result["eval_loss"], rel=1e-2)


def edit(adapter: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the weights, in a file that is whole."""
    weights = load_file(adapter / WEIGHTS)
    change(weights)
    save_file(weights, adapter / WEIGHTS)


def configure(adapter: Path, **values: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def swap(first: str, second: str, weights: dict[str, torch.Tensor]) -> None:
    one, other = (next(name for name in weights if part in name) for part in (first, second))
    weights[one], weights[other] = weights[other], weights[one]


def zero(part: str, weights: dict[str, torch.Tensor]) -> None:
    for name in [name for name in weights if part in name]:
        weights[name] = torch.zeros_like(weights[name])


def drop(part: str, weights: dict[str, torch.Tensor]) -> None:
    del weights[next(name for name in weights if part in name)]


def rename(part: str, new: str, weights: dict[str, torch.Tensor]) -> None:
    for name in [name for name in weights if part in name]:
        weights[name.replace(part, new)] = weights.pop(name)


A_AND_B = "layers.0.self_attn.q_proj.lora_"
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "B of two layers swapped": (
        lambda folder: edit(folder, partial(swap, f"{A_AND_B}B", "layers.1.self_attn.q_proj.lora_B")),
        r"its loss on 8 rows is \d\.\d{4}, and the trained model's was \d\.\d{4}",
    ),
    "A of two layers swapped": (
        lambda folder: edit(folder, partial(swap, f"{A_AND_B}A", "layers.1.self_attn.q_proj.lora_A")),
        r"its loss on 8 rows is",
    ),
    "every A zeroed": (lambda folder: edit(folder, partial(zero, "lora_A")), "its loss on 8 rows is"),
    "every B zeroed": (lambda folder: edit(folder, partial(zero, "lora_B")), "its loss on 8 rows is"),
    "a tensor missing": (lambda folder: edit(folder, partial(drop, f"{A_AND_B}B")), r"q_proj\.lora_B\.weight is miss"),
    "tensors of other layers": (
        lambda folder: edit(folder, partial(rename, "layers.1.", "layers.7.")),
        r"layers\.1\..* and others are missing",
    ),
    "A in the place of B": (
        lambda folder: edit(folder, partial(swap, f"{A_AND_B}A", f"{A_AND_B}B")),
        "can't be loaded",
    ),
    "another alpha": (lambda folder: configure(folder, lora_alpha=64), "lora_alpha is 64, and it was trained with 32"),
    "another r": (lambda folder: configure(folder, r=8), "r is 8, and it was trained with 16"),
    "another base model": (
        lambda folder: configure(folder, base_model_name_or_path="org/other"),
        "base_model_name_or_path is org/other, and it was trained with org/model",
    ),
    "another revision": (
        lambda folder: configure(folder, revision="f" * 40),
        rf"revision is {'f' * 40}, and it was trained with None",
    ),
    "no weights": (lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 100), "can't be loaded"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("trained")
    return save_llama(folder / "base", tied=True), folder / "run"


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_shows(plan: PlanFor, trained: tuple[Path, Path], tmp_path: Path, damage: str) -> None:
    base, root = trained
    the_plan = plan(TRAIN__MAX_STEPS=24, TRAIN__LEARNING_RATE=3e-2)
    task_file = root / "task.json"
    if not task_file.exists():  # trained once
        task_file.write_text(train_and_describe(the_plan, base, root).model_dump_json())
    task = AcceptanceTask.model_validate_json(task_file.read_text())
    adapter = shutil.copytree(root / "adapter", tmp_path / "adapter")
    act, message = DAMAGE[damage]
    act(adapter)
    with pytest.raises(DataError, match=message):
        load_here(task, adapter)


def test_another_revision_of_the_base_model_shows(plan: PlanFor, tmp_path: Path) -> None:
    task = train_and_describe(plan(), save_llama(tmp_path / "base", tied=True), tmp_path / "run")
    other = save_llama(tmp_path / "other", tied=False)
    with pytest.raises(DataError, match="its loss on 8 rows is"):
        load_here(task.model_copy(update={"model_folder": other}), tmp_path / "run" / "adapter")


def test_new_tokens_have_their_own_ids_and_rows(plan: PlanFor, tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    known = len(tokenizer)
    ids = {"<|new|>": known, "<|other|>": known + 1}
    tokenizer.add_special_tokens({"additional_special_tokens": list(ids)})
    root, adapter = tmp_path / "run", tmp_path / "run" / "adapter"
    task = train_and_describe(plan(), tiny_model, root, ids, vocabulary=len(tokenizer))
    tokenizer.save_pretrained(adapter)
    assert load_here(task, adapter).rows == 8

    good = (adapter / WEIGHTS).read_bytes()
    rows = next(name for name in load_file(adapter / WEIGHTS) if "token_adapter" in name)
    edit(adapter, lambda weights: weights.update({rows: weights[rows].flip(0).contiguous()}))
    with pytest.raises(DataError, match="its loss on 8 rows is"):
        load_here(task, adapter)

    (adapter / WEIGHTS).write_bytes(good)
    text = (adapter / "tokenizer.json").read_text()
    (adapter / "tokenizer.json").write_text(
        text.replace("<|new|>", "<|?|>").replace("<|other|>", "<|new|>").replace("<|?|>", "<|other|>")
    )
    with pytest.raises(DataError, match=rf"its new tokens are \{{'<\|new\|>': {known + 1}, .* and were"):
        load_here(task, adapter)


def test_an_adapter_too_weak_to_be_seen_is_warned_of(
    plan: PlanFor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = train_and_describe(
        plan(TRAIN__LEARNING_RATE=1e-6), save_llama(tmp_path / "base", tied=True), tmp_path / "run"
    )
    load_here(task, tmp_path / "run" / "adapter")
    assert "is not proved" in caplog.text


def test_in_a_process_of_its_own(plan: PlanFor, tmp_path: Path) -> None:
    task = train_and_describe(plan(), save_llama(tmp_path / "base", tied=True), tmp_path / "run")
    folder, adapter = RunFolder(tmp_path / "run"), tmp_path / "run" / "adapter"
    edit(adapter, partial(zero, "lora_B"))
    with fresh_process(task, folder) as process, pytest.raises(RefusedError, match="isn't what was trained"):
        process.accept(adapter, limit_s=100)
    with fresh_process(task, folder) as process:
        assert process.accept(adapter, limit_s=0.1).skipped == "it took longer than 0.00166667 minutes"
    assert find_processes(folder.root) == []


def find_processes(folder: Path) -> list[str]:
    lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in lines if str(folder) in line and sys.executable in line]


@pytest.mark.parametrize(
    ("model_id", "revision", "name"),
    [
        ("org/model", "a" * 40, ("org/model", "a" * 40)),
        ("hf://org/model@main", "a" * 40, ("org/model", "a" * 40)),
        ("s3://bucket/model", "b" * 64, ("s3://bucket/model", None)),
        ("/models/llama", "b" * 64, ("/models/llama", None)),
    ],
)
def test_the_base_model_is_named_for_those_who_load_it(
    plan: PlanFor, model_id: str, revision: str, name: tuple[str, str | None]
) -> None:
    assert name_base_model(model_id, revision) == name
    the_plan = plan().model_copy(update={"model_id": model_id, "model_revision": revision})
    config: dict[str, Any] = {"r": 16, "lora_alpha": 32, "use_rslora": False, "use_dora": False}
    assert (
        find_wrong_config({"base_model_name_or_path": name[0], "revision": name[1], **config}, the_plan.model_dump())
        is None
    )
