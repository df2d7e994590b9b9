"""The model that is trained: rows kept apart, adapters where they were asked for, and nothing broken written down."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from job.errors import ConfigError, DivergedError, InternalError, NotFoundError
from job.plan import TrainPlan
from job.train.adapter import save_adapter
from job.train.dataset import IGNORED, Collate, PadRows, Row, join_rows
from job.train.evaluate import evaluate_rows, mean_loss
from job.train.gather import gather_trained
from job.train.model import check_logits_are_finite, check_rows_stay_apart, load_model
from job.train.trainer import training_arguments

PlanFor = Callable[..., TrainPlan]


def load_fitting(plan: TrainPlan, folder: Path) -> PeftModel:
    """Load a model whose tokenizer fits."""
    return load_model(plan, folder, vocabulary_size=0, new_tokens=[])


@pytest.fixture
def plan(plan_for: PlanFor) -> TrainPlan:
    return plan_for(TRAIN__GLOBAL_BATCH_SIZE=4, MODEL__DTYPE="float32", TRAIN__LOSS="full")


@pytest.fixture
def model(plan: TrainPlan, tiny_model: Path) -> PeftModel:
    return load_fitting(plan, tiny_model)


def make_rows(*lengths: int) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in lengths:
        ids = torch.randint(0, 40_000, (length,), generator=generator)
        labels = torch.where(torch.arange(length) < length // 2, IGNORED, ids)
        rows.append(Row(input_ids=ids, labels=labels))
    return rows


class Rows(list[Row]):
    """Rows that are in no file."""

    def lengths(self) -> np.ndarray:
        return np.array([len(row["input_ids"]) for row in self])


class SeesItsNeighbours(nn.Module):
    """A model that places tokens by their position ids, and masks nothing by them."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, **_: Any) -> Any:
        # An explicit mask is what makes transformers not look for borders in the positions.
        return self.inner(input_ids, position_ids=position_ids, attention_mask=torch.ones_like(input_ids))


class IgnoresPositions(SeesItsNeighbours):
    """A model without position ids at all."""

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, **_: Any) -> Any:
        return self.inner(input_ids)


@pytest.mark.parametrize("lengths", [(20, 30), (5, 200), (3, 2)])
def test_a_llama_keeps_rows_apart(model: PeftModel, plan: TrainPlan, lengths: tuple[int, int]) -> None:
    model.train()
    check_rows_stay_apart(model, plan, *make_rows(*lengths))
    assert model.training


@pytest.mark.parametrize("leaky", [SeesItsNeighbours, IgnoresPositions])
@pytest.mark.parametrize("lengths", [(20, 30), (5, 200), (3, 2)])
def test_a_model_that_does_not_is_refused(
    model: PeftModel, plan: TrainPlan, leaky: type[SeesItsNeighbours], lengths: tuple[int, int]
) -> None:
    with pytest.raises(ConfigError, match="SFT_TRAIN__PACKING=true: joined rows see each other"):
        check_rows_stay_apart(leaky(model), plan, *make_rows(*lengths))


def note_lengths(taken: list[list[int]], collate: Collate) -> Collate:
    def note(rows: list[Row]) -> dict[str, Any]:
        taken.append([len(row["input_ids"]) for row in rows])
        return collate(rows)

    return note


def test_the_loss_is_the_same_joined_padded_and_alone(model: PeftModel, plan: TrainPlan) -> None:
    rows: Any = Rows(make_rows(12, 31, 7, 18, 25))
    joined = evaluate_rows(model, rows, plan, join_rows, rank=0)
    padded = evaluate_rows(model, rows, plan, PadRows(0), rank=0)
    alone = []
    for row in rows:
        loss = model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss.item()
        supervised = int((row["labels"][1:] != IGNORED).sum())
        alone.append((loss * supervised, supervised))
    assert np.allclose(joined, alone, rtol=1e-5)
    assert np.allclose(padded, alone, rtol=1e-5)
    tokens = sum(supervised for _, supervised in alone)
    assert mean_loss(joined) == pytest.approx(sum(loss for loss, _ in alone) / tokens, rel=1e-5)


@pytest.mark.parametrize(
    ("packing", "one_by_one", "expected"),
    [
        (True, False, [[31, 25], [18, 12, 7]]),
        (False, False, [[31], [25, 18], [12, 7]]),  # padding counts
        (True, True, [[31], [25], [18], [12], [7]]),
    ],
)
def test_as_many_rows_are_evaluated_at_a_time_as_make_a_micro_batch(
    packing: bool, one_by_one: bool, expected: list[list[int]], model: PeftModel, plan: TrainPlan
) -> None:
    rows: Any = Rows(make_rows(12, 31, 7, 18, 25))
    plan = plan.model_copy(update={"packing": packing, "micro_batch_tokens": 60})
    taken: list[list[int]] = []
    found = evaluate_rows(
        model, rows, plan, note_lengths(taken, join_rows if packing else PadRows(0)), rank=0, one_by_one=one_by_one
    )
    assert taken == expected
    assert np.allclose(found, evaluate_rows(model, rows, plan, join_rows, rank=0), rtol=1e-5)  # each in its place


def test_a_broken_base_model_is_refused_before_the_first_step(model: PeftModel, plan: TrainPlan) -> None:
    (row,) = make_rows(9)
    check_logits_are_finite(model, plan, row)
    with torch.no_grad():
        model.get_base_model().model.norm.weight[3] = float("nan")
    with pytest.raises(DivergedError, match="SFT_MODEL__ID=org/model"):
        check_logits_are_finite(model, plan, row)


def test_an_adapter_only_where_it_was_asked_for(plan_for: PlanFor, tiny_model: Path) -> None:
    model = load_fitting(plan_for(LORA__TARGET_MODULES="q_proj,layers.0.mlp.up_proj", LORA__R=4), tiny_model)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert all("lora_" in name for name in trained)
    places = {name.split(".lora_")[0].split("layers.")[1] for name in trained}
    assert places == {"0.self_attn.q_proj", "1.self_attn.q_proj", "0.mlp.up_proj"}
    assert {min(weight.shape) for weight in trained.values()} == {4}
    assert not model.config.use_cache


@pytest.mark.parametrize("target", ["c_attn", "proj", "q_proj,missing", "mlp"])
def test_target_modules_that_cannot_be_adapted(plan_for: PlanFor, tiny_model: Path, target: str) -> None:
    with pytest.raises(ConfigError, match="SFT_LORA__TARGET_MODULES") as raised:
        load_fitting(plan_for(LORA__TARGET_MODULES=target), tiny_model)
    assert target == "mlp" or "q_proj" in raised.value.hint


def test_what_is_no_language_model_is_refused(plan: TrainPlan, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit", "architectures": ["ViTModel"]}')
    with pytest.raises(ConfigError, match="SFT_MODEL__ID=org/model"):
        load_fitting(plan, tmp_path)


def learn(model: PeftModel, value: float) -> None:
    name, weight = next((name, weight) for name, weight in model.named_parameters() if "lora_B" in name)
    with torch.no_grad():
        weight[0, 0] = value
    assert weight.requires_grad, name


def test_an_adapter_that_learned_is_saved_and_comes_back(
    model: PeftModel, plan: TrainPlan, tiny_model: Path, tmp_path: Path
) -> None:
    learn(model, 0.5)
    save_adapter(model, gather_trained(model, "ddp"), tmp_path, rank=0)
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {path.name for path in tmp_path.iterdir()}
    base = load_fitting(plan, tiny_model).unload()
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    ids = torch.arange(10)[None]
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_an_untouched_adapter_is_not_saved(model: PeftModel, tmp_path: Path) -> None:
    with pytest.raises(InternalError, match="unchanged"):
        save_adapter(model, gather_trained(model, "ddp"), tmp_path, rank=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_adapter_is_not_saved(model: PeftModel, tmp_path: Path, value: float) -> None:
    learn(model, value)
    with pytest.raises(DivergedError, match=r"1 of 28 adapter weights .*lora_B"):
        save_adapter(model, gather_trained(model, "ddp"), tmp_path, rank=0)
    assert list(tmp_path.iterdir()) == []


def test_a_base_model_with_weights_missing_is_refused(plan: TrainPlan, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    weights = load_file(tiny_model / "model.safetensors")
    name = next(name for name in weights if name.endswith("1.mlp.up_proj.weight"))
    rest = {other: weight for other, weight in weights.items() if other != name}
    save_file(rest, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotFoundError, match=f"1 of its weights are missing, {name} first"):
        load_fitting(plan, tmp_path / "model")


def test_a_base_model_whose_weights_are_cut_off_is_refused(plan: TrainPlan, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    whole = (tiny_model / "model.safetensors").read_bytes()
    (tmp_path / "model" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(NotFoundError, match="can't be loaded"):
        load_fitting(plan, tmp_path / "model")


@pytest.mark.parametrize(
    ("optimizer", "device", "name"),
    [
        ("adamw", "cpu", "adamw_torch"),
        ("adamw", "cuda", "adamw_torch_fused"),
        ("paged_adamw_8bit", "cuda", "paged_adamw_8bit"),
    ],
)
def test_the_optimizer_is_the_planned_one(
    plan: TrainPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, device: str, name: str
) -> None:
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda _: None)  # which looks for the GPU
    planned = plan.model_copy(update={"optimizer": optimizer, "device": device})
    assert OptimizerNames(training_arguments(planned, tmp_path, run_name="").optim).value == name
