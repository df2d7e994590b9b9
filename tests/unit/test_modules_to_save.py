"""Modules that are trained whole: which, in what precision, and that they come back with the adapter."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from small_training import held_out_loss, load_trained, make_small_plan, save_gpt2, save_llama, train_here
from transformers import AutoModelForCausalLM, PreTrainedModel

from job.errors import ConfigError, DivergedError, InternalError
from job.handover import NewTokenInput
from job.plan import TrainPlan
from job.train.adapter import add_adapter, save_adapter
from job.train.gather import gather_trained

PlanFor = Callable[..., TrainPlan]
ADDED = [NewTokenInput(id=100, piece_ids=[11, 12, 13]), NewTokenInput(id=101, piece_ids=[20])]

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),  # peft's word on a GPT-2, which it then mends
]


@pytest.fixture
def plan(plan_for: PlanFor) -> PlanFor:
    return partial(make_small_plan, plan_for)


def load_base(folder: Path, dtype: str = "float32") -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def changed(before: PreTrainedModel, after: PreTrainedModel, *, but: str = "_proj") -> set[str]:
    """The names of the weights that differ, LoRA's linear layers aside."""
    old = before.state_dict()
    return {name for name, weight in after.state_dict().items() if but not in name and not weight.equal(old[name])}


@pytest.mark.parametrize("modules", ["embed_tokens", "lm_head", "embed_tokens,lm_head", "lm_head,model.embed_tokens"])
def test_a_tied_matrix_stays_one(plan: PlanFor, tmp_path: Path, modules: str) -> None:
    the_plan, base_folder, root = plan(LORA__MODULES_TO_SAVE=modules), tmp_path / "base", tmp_path / "run"
    result = train_here(the_plan, save_llama(base_folder, tied=True), root)
    assert result["eval_loss"] < result["eval_loss_base"]
    trained = load_trained(base_folder, root / "adapter", vocabulary=100)
    assert held_out_loss(trained, the_plan, root) == pytest.approx(result["eval_loss"], rel=1e-6)
    merged = trained.merge_and_unload()
    assert changed(load_base(base_folder), merged) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert torch.equal(merged.get_input_embeddings().weight, merged.get_output_embeddings().weight)


@pytest.mark.parametrize(
    ("modules", "weights"),
    [
        ("embed_tokens,lm_head", {"model.embed_tokens.weight", "lm_head.weight"}),
        ("embed_tokens", {"model.embed_tokens.weight"}),
        ("lm_head", {"lm_head.weight"}),
        ("norm", {"model.norm.weight"}),  # not input_layernorm, which ends in the same letters
        ("layers.1.input_layernorm", {"model.layers.1.input_layernorm.weight"}),
    ],
)
def test_modules_are_trained_whole_and_no_others(
    plan: PlanFor, tmp_path: Path, modules: str, weights: set[str]
) -> None:
    the_plan, base_folder, root = plan(LORA__MODULES_TO_SAVE=modules), tmp_path / "base", tmp_path / "run"
    result = train_here(the_plan, save_llama(base_folder, tied=False), root)
    trained = load_trained(base_folder, root / "adapter", vocabulary=100)
    assert held_out_loss(trained, the_plan, root) == pytest.approx(result["eval_loss"], rel=1e-6)
    assert changed(load_base(base_folder), trained.merge_and_unload()) == weights


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("modules", ["embed_tokens", "lm_head", "embed_tokens,lm_head"])
def test_new_tokens_in_a_matrix_that_is_trained_whole(plan: PlanFor, tmp_path: Path, tied: bool, modules: str) -> None:
    the_plan, base_folder, root = plan(LORA__MODULES_TO_SAVE=modules), tmp_path / "base", tmp_path / "run"
    result = train_here(the_plan, save_llama(base_folder, tied=tied), root, new_tokens=ADDED, vocabulary=102)
    trained = load_trained(base_folder, root / "adapter", vocabulary=102)
    assert held_out_loss(trained, the_plan, root) == pytest.approx(result["eval_loss"], rel=1e-6)
    assert result["eval_loss"] < result["eval_loss_base"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_whole_modules_are_trained_in_float32_on_a_base_in_bfloat16(
    plan: PlanFor, tmp_path: Path, tied: bool, checkpointing: str
) -> None:
    the_plan = plan(
        LORA__MODULES_TO_SAVE="embed_tokens,lm_head,norm",
        MODEL__DTYPE="bfloat16",
        TRAIN__GRADIENT_CHECKPOINTING=checkpointing,
        TRAIN__PACKING="true",
    )
    base_folder, root = save_llama(tmp_path / "base", tied=tied, dtype=torch.bfloat16), tmp_path / "run"
    result = train_here(the_plan, base_folder, root)
    weights = load_file(root / "adapter" / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    trained = load_trained(base_folder, root / "adapter", vocabulary=100, dtype="bfloat16")
    # Whoever loads it so rounds what was trained whole to bfloat16.
    assert held_out_loss(trained, the_plan, root) == pytest.approx(result["eval_loss"], rel=5e-3)
    assert result["eval_loss"] < result["eval_loss_base"]


def adapt(plan: TrainPlan, folder: Path, dtype: str = "float32") -> PeftModel:
    return add_adapter(load_base(folder, dtype), plan, [])


def test_everything_that_is_trained_is_float32(plan: PlanFor, tmp_path: Path) -> None:
    base_folder = save_llama(tmp_path, tied=True)
    model = add_adapter(load_base(base_folder, "bfloat16"), plan(LORA__MODULES_TO_SAVE="norm"), [5, 6])
    trained = {name: weight.dtype for name, weight in model.named_parameters() if weight.requires_grad}
    assert set(trained.values()) == {torch.float32}
    assert any("norm" in name for name in trained)
    assert any("trainable_tokens" in name for name in trained)


@pytest.mark.parametrize("name", ["missing", "orm", "embed_tokens,rotary_emb"])
def test_a_module_that_the_model_does_not_have(plan: PlanFor, tmp_path: Path, name: str) -> None:
    save_llama(tmp_path, tied=True)
    wrong = name.rsplit(",", maxsplit=1)[-1]
    with pytest.raises(ConfigError, match=f"^SFT_LORA__MODULES_TO_SAVE={wrong}: the model has no such") as raised:
        adapt(plan(LORA__MODULES_TO_SAVE=name), tmp_path)
    assert "embed_tokens, gate_proj, input_layernorm, k_proj, " in raised.value.hint
    assert "0" not in raised.value.hint


def test_a_module_in_both_lists_is_refused(plan: PlanFor, tmp_path: Path) -> None:
    save_llama(tmp_path, tied=False)
    settings: dict[str, Any] = {"LORA__TARGET_MODULES": "q_proj,lm_head", "LORA__MODULES_TO_SAVE": "lm_head"}
    with pytest.raises(ConfigError, match=r"SFT_LORA__MODULES_TO_SAVE: lm_head is in SFT_LORA__TARGET_MODULES, too"):
        adapt(plan(**settings), tmp_path)
    # all-linear means all the others
    model = adapt(plan(LORA__MODULES_TO_SAVE="lm_head,layers.0.mlp.up_proj"), tmp_path)
    lora = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert not any("lm_head" in name or "layers.0.mlp.up_proj" in name for name in lora)
    assert any("layers.1.mlp.up_proj" in name for name in lora)


@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`")
def test_a_tied_matrix_that_peft_would_tear_apart_is_refused(plan: PlanFor, tmp_path: Path) -> None:
    save_gpt2(tmp_path)
    with pytest.raises(ConfigError, match="one matrix") as raised:
        adapt(plan(LORA__MODULES_TO_SAVE="wte"), tmp_path)
    assert "SFT_LORA__MODULES_TO_SAVE" in raised.value.hint


def learn(model: PeftModel, part: str, value: float = 0.5) -> None:
    for name, weight in model.named_parameters():
        if weight.requires_grad and part in name:
            with torch.no_grad():
                weight[..., 0] = value


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("trainable_tokens", "norm.weight is unchanged after training"),
        ("norm", "embed_tokens is unchanged after training"),
    ],
)
def test_a_part_that_learned_nothing_is_not_saved(plan: PlanFor, tmp_path: Path, part: str, message: str) -> None:
    base = load_base(save_llama(tmp_path / "base", tied=True))
    model = add_adapter(base, plan(LORA__MODULES_TO_SAVE="norm"), [5, 6])
    learn(model, "lora_B")
    learn(model, part)
    with pytest.raises(InternalError, match=message):
        save_adapter(model, gather_trained(model, "ddp"), tmp_path / "adapter", rank=0)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("part", ["trainable_tokens", "norm"])
def test_a_broken_part_is_not_saved(plan: PlanFor, tmp_path: Path, part: str) -> None:
    base = load_base(save_llama(tmp_path / "base", tied=True))
    model = add_adapter(base, plan(LORA__MODULES_TO_SAVE="norm"), [5, 6])
    learn(model, "")
    learn(model, part, float("nan"))
    with pytest.raises(DivergedError, match=f"1 of 30 adapter weights .*{part}"):
        save_adapter(model, gather_trained(model, "ddp"), tmp_path / "adapter", rank=0)


def test_a_head_with_a_bias_cannot_be_trained_by_row(plan: PlanFor, tmp_path: Path) -> None:
    base = load_base(save_llama(tmp_path, tied=False))
    base.lm_head = torch.nn.Linear(32, 100, bias=True)
    with pytest.raises(ConfigError, match="lm_head, because it has a bias") as raised:
        add_adapter(base, plan(), [5, 6])
    assert raised.value.hint.endswith("SFT_LORA__MODULES_TO_SAVE=lm_head")
    model = add_adapter(base, plan(LORA__MODULES_TO_SAVE="lm_head"), [5, 6])
    names = {name for name, weight in model.named_parameters() if weight.requires_grad and "lora_" not in name}
    assert {name.split("base_model.model.")[1].rsplit(".default")[0] for name in names} == {
        "lm_head.modules_to_save",
        "model.embed_tokens.token_adapter.trainable_tokens_delta",
    }
