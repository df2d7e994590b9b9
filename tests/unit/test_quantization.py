"""A base model held in 4 or 8 bits: what is refused, that gradients come through it, and that what was learned on it
works on the plain one."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from small_training import (
    VOCABULARY,
    held_out_loss,
    load_trained,
    make_small_plan,
    read_metrics,
    save_gpt2,
    save_llama,
    train_here,
)
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from job.errors import ConfigError
from job.handover import NewTokenInput
from job.hardware import Hardware
from job.parallel import plan_parallel
from job.plan import TrainPlan
from job.quantization import find_stored_quantization
from job.settings import Settings
from job.support import why_not_dora, why_not_quantization
from job.train.dataset import Row
from job.train.model import check_rows_stay_apart, load_model, measure_difference, read_logits
from job.train.quantize import comparably

PlanFor = Callable[..., TrainPlan]
ADDED = [NewTokenInput(id=100, piece_ids=[11, 12, 13]), NewTokenInput(id=101, piece_ids=[20])]
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),  # peft's word on a GPT-2, which it then mends
]


@pytest.fixture
def plan(plan_for: PlanFor) -> PlanFor:
    return partial(make_small_plan, plan_for)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantization", "device", "capability", "reason"),
    [
        ("none", "cuda", (5, 0), None),
        ("nf4", "cuda", (6, 0), None),
        ("nf4", "cuda", (5, 2), "compute capability 6.0, and this one has 5.2"),
        ("int8", "cuda", (7, 5), None),
        ("int8", "cuda", (7, 0), "compute capability 7.5, and this one has 7.0"),
        ("int8", "cpu", None, None),
        ("nf4", "cpu", None, None),
    ],
)
def test_what_a_gpu_is_too_old_for(
    quantization: Any, device: Any, capability: tuple[int, int] | None, reason: str | None
) -> None:
    lacking = why_not_quantization(quantization, device, capability)
    assert lacking is None if reason is None else reason in str(lacking)


def test_a_package_that_is_missing_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.support._is_installed", lambda package: package != "bitsandbytes")
    assert why_not_quantization("none", "cpu", None) is None
    assert why_not_quantization("nf4", "cpu", None) == "the package bitsandbytes is not installed"


def test_what_the_machine_cannot_do_is_refused_before_any_download(
    load: Callable[..., Settings], machine: Callable[..., Hardware]
) -> None:
    with pytest.raises(ConfigError, match=r"SFT_QUANTIZATION=int8: .*7\.5.*7\.0"):
        plan_parallel(load(QUANTIZATION="int8"), machine(gpus=1, capability=(7, 0)))
    with pytest.raises(ConfigError, match=r"SFT_LORA__DORA=true: .*int8.* CPU") as raised:
        plan_parallel(load(QUANTIZATION="int8", LORA__DORA="true"), machine())
    assert "nf4" in raised.value.hint
    plan_parallel(load(QUANTIZATION="int8", LORA__DORA="true"), machine(gpus=1))
    assert why_not_dora("nf4", "cpu") is None


@pytest.mark.parametrize(
    ("stored", "expected"), [(None, "none"), (NF4, "nf4"), (INT8, "int8"), (INT8 | {"load_in_4bit": False}, "int8")]
)
def test_weights_that_can_be_trained_on(stored: object, expected: str) -> None:
    assert find_stored_quantization("org/model", {"quantization_config": stored}) == expected
    assert find_stored_quantization("org/model", {}) == "none"


@pytest.mark.parametrize(
    ("stored", "kind"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "fp8"}, "fp8"),
        (NF4 | {"bnb_4bit_quant_type": "fp4"}, "bitsandbytes fp4"),
        (["what is this"], "unknown"),
    ],
)
def test_weights_that_cannot(stored: object, kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"SFT_MODEL__ID=org/model: .*\({kind}\)") as raised:
        find_stored_quantization("org/model", {"quantization_config": stored})
    assert "SFT_QUANTIZATION=nf4" in raised.value.hint


def test_stored_weights_and_settings_that_contradict_them(plan_for: PlanFor) -> None:
    stored = {"stored_quantization": "nf4"}
    assert plan_for(data=stored).quantization == "nf4"
    assert "stored" in plan_for(data=stored).sources["quantization"]
    assert plan_for(data=stored, QUANTIZATION="nf4").quantization == "nf4"
    for asked in ("none", "int8"):
        with pytest.raises(ConfigError, match=f"SFT_QUANTIZATION={asked}: .*stored in 4-bit NF4"):
            plan_for(data=stored, QUANTIZATION=asked)
    with pytest.raises(ConfigError, match=r"SFT_OUTPUT__MERGE=true: .*no whole model"):
        plan_for(data=stored, OUTPUT__MERGE="true")
    with pytest.raises(ConfigError, match="SFT_LORA__DORA=true"):
        plan_for(data={"stored_quantization": "int8"}, LORA__DORA="true")


def test_a_cpu_is_warned_of(plan_for: PlanFor) -> None:
    assert any("slower than float32" in warning for warning in plan_for(QUANTIZATION="nf4").warnings)
    assert not any("slower" in warning for warning in plan_for().warnings)
    assert not any("slower" in warning for warning in plan_for(hardware={"gpus": 1}, QUANTIZATION="nf4").warnings)


def load_fitting(plan: TrainPlan, folder: Path) -> PeftModel:
    return load_model(plan, folder, vocabulary_size=0, new_tokens=[])


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_names_are_checked_on_a_quantised_model_too(plan: PlanFor, tmp_path: Path, quantization: str) -> None:
    folder = save_llama(tmp_path, tied=True)
    with pytest.raises(ConfigError, match="SFT_LORA__TARGET_MODULES=c_attn") as raised:
        load_fitting(plan(QUANTIZATION=quantization, LORA__TARGET_MODULES="c_attn"), folder)
    assert raised.value.hint == "it has down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    with pytest.raises(ConfigError, match=r"MODULES_TO_SAVE: model\.layers\.0\.mlp\.up_proj is quantised"):
        load_fitting(plan(QUANTIZATION=quantization, LORA__MODULES_TO_SAVE="up_proj"), folder)


# -- what is trained ---------------------------------------------------------------------------------------------------


def gradients(model: PeftModel, dtype: str, *, after_evaluation: bool) -> dict[str, torch.Tensor]:
    """The gradients of LoRA's weights by a fixed batch, once B isn't zero any more."""
    ids = torch.arange(40).reshape(2, 20)
    torch.manual_seed(0)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    for name, weight in trained.items():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    with torch.autocast("cpu", dtype=getattr(torch, dtype), enabled=dtype != "float32"):
        if after_evaluation:
            with torch.no_grad():
                model.eval()(ids)
        logits = model.train()(ids).logits.float()
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return {name: weight.grad for name, weight in trained.items() if weight.grad is not None}


@torch.no_grad()
def take_rounded_weights(plain: PeftModel, quantised: PeftModel) -> None:
    """Give a plain model the weights that a quantised one computes with."""
    for name, module in quantised.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, bitsandbytes.nn.Params4bit):
            rounded = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        elif isinstance(weight, bitsandbytes.nn.Int8Params):
            rounded = bitsandbytes.functional.int8_vectorwise_dequant(weight.data, weight.SCB)
        else:
            continue
        plain.get_submodule(name).weight.copy_(rounded)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gradients_come_through_evaluated_or_not(
    plan_for: PlanFor, tmp_path: Path, quantization: str, dtype: str
) -> None:
    """bitsandbytes repacks 4-bit weights when they are evaluated on a CPU with AVX512-BF16, and gradients then end
    there, or it fails where their sizes don't suit its kernel."""
    base = save_llama(tmp_path, tied=True)
    the_plan = plan_for(QUANTIZATION=quantization, LORA__DROPOUT=0, LORA__R=4).model_copy(update={"dtype": dtype})

    def learn(plan: TrainPlan, *, after_evaluation: bool) -> dict[str, torch.Tensor]:
        model = load_fitting(plan, base)
        if plan.quantization != the_plan.quantization:
            take_rounded_weights(model, load_fitting(the_plan, base))
        assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}
        return gradients(model, dtype, after_evaluation=after_evaluation)

    fresh, evaluated = (learn(the_plan, after_evaluation=after) for after in (False, True))
    plain = learn(the_plan.model_copy(update={"quantization": "none"}), after_evaluation=False)
    assert fresh.keys() == evaluated.keys() == plain.keys()
    assert len(fresh) == 2 * 7 * 2
    for name, gradient in fresh.items():
        assert torch.allclose(evaluated[name], gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max()), name
        assert torch.nn.functional.cosine_similarity(gradient.flatten(), plain[name].flatten(), dim=0) > 0.95, name


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_parameters_are_counted_as_they_are(
    plan_for: PlanFor, tiny_model: Path, quantization: str, dtype: str
) -> None:
    plain = load_fitting(plan_for(MODEL__DTYPE=dtype), tiny_model)
    packed = load_fitting(plan_for(MODEL__DTYPE=dtype, QUANTIZATION=quantization), tiny_model)
    assert packed.get_nb_trainable_parameters() == plain.get_nb_trainable_parameters()
    layer, whole = (model.get_base_model().model.layers[0].mlp.up_proj.base_layer for model in (packed, plain))
    assert layer.weight.dtype == (torch.int8 if quantization == "int8" else getattr(torch, dtype))
    assert layer.weight.nbytes == whole.weight.numel() * (1 if quantization == "int8" else 0.5)
    assert type(packed.get_output_embeddings()) is torch.nn.Linear


@pytest.mark.parametrize(
    ("settings", "tied"),
    [
        ({"QUANTIZATION": "nf4"}, True),
        ({"QUANTIZATION": "nf4", "TRAIN__GRADIENT_CHECKPOINTING": "true", "LORA__RSLORA": "true"}, False),
        ({"QUANTIZATION": "nf4", "LORA__DORA": "true"}, True),
        ({"QUANTIZATION": "nf4", "LORA__MODULES_TO_SAVE": "embed_tokens,lm_head"}, False),
        ({"QUANTIZATION": "int8", "TRAIN__GRADIENT_CHECKPOINTING": "true"}, False),
        ({"QUANTIZATION": "int8", "LORA__MODULES_TO_SAVE": "embed_tokens"}, True),
    ],
    ids=str,
)
def test_what_was_learned_works_on_the_plain_model(
    plan: PlanFor, tmp_path: Path, settings: dict[str, str], tied: bool
) -> None:
    the_plan, root = plan(**settings), tmp_path / "run"
    base = save_llama(tmp_path / "base", tied=tied)
    result = train_here(the_plan, base, root, new_tokens=ADDED, vocabulary=102)
    plain = load_trained(base, root / "adapter", vocabulary=102)
    loss = held_out_loss(plain, the_plan, root)
    assert result["eval_loss"] < result["eval_loss_base"] - 0.1
    assert loss == pytest.approx(result["eval_loss"], abs=0.1 * (result["eval_loss_base"] - result["eval_loss"]))
    assert all(event["grad_norm"] > 0 for event in read_metrics(root) if "loss" in event)


def test_a_gpt2_whose_layers_are_stored_transposed(plan: PlanFor, tmp_path: Path) -> None:
    the_plan, root, base = plan(QUANTIZATION="nf4"), tmp_path / "run", save_gpt2(tmp_path / "base")
    result = train_here(the_plan, base, root)
    loss = held_out_loss(load_trained(base, root / "adapter", vocabulary=VOCABULARY), the_plan, root)
    assert loss == pytest.approx(result["eval_loss"], abs=0.1 * (result["eval_loss_base"] - result["eval_loss"]))


@pytest.mark.parametrize("stored", [NF4, INT8])
def test_weights_that_are_stored_quantised_are_trained_on_as_they_are(
    plan: PlanFor, tmp_path: Path, stored: dict[str, Any]
) -> None:
    plain, packed, root = save_llama(tmp_path / "plain", tied=False), tmp_path / "packed", tmp_path / "run"
    options = BitsAndBytesConfig(**{name: value for name, value in stored.items() if name != "quant_method"})
    AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.float32, quantization_config=options, device_map={"": "cpu"}
    ).save_pretrained(packed)
    configuration = json.loads((packed / "config.json").read_text())
    found = find_stored_quantization("m", configuration)
    assert found == ("nf4" if stored is NF4 else "int8")
    the_plan = plan().model_copy(update={"quantization": found})
    result = train_here(the_plan, packed, root)
    assert result["eval_loss"] < result["eval_loss_base"]
    loss = held_out_loss(load_trained(plain, root / "adapter", vocabulary=VOCABULARY), the_plan, root)
    assert loss == pytest.approx(result["eval_loss"], abs=0.1 * (result["eval_loss_base"] - result["eval_loss"]))


def test_outliers_of_a_row_do_not_reach_its_neighbour_in_the_proof(plan: PlanFor, tmp_path: Path) -> None:
    """With them, LLM.int8 computes a row differently beside one that has large activations."""
    base = save_llama(tmp_path, tied=True)
    the_plan = plan(QUANTIZATION="int8")
    model = load_fitting(the_plan, base)
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        model.get_base_model().model.layers[0].input_layernorm.weight.fill_(3.0)
        embeddings[1, 0] = 100.0  # after the norm, a column far beyond the threshold
    ids, cpu = torch.arange(2, 14), torch.device("cpu")
    rows = [Row(input_ids=tokens, labels=tokens) for tokens in (torch.ones(12, dtype=torch.int64), ids)]

    @torch.no_grad()
    def difference() -> float:
        alone, joined = read_logits(model, rows[1:], cpu), read_logits(model, rows, cpu)[-12:]
        return measure_difference(joined, alone)

    model.eval()
    assert difference() > 1e-3
    with comparably(model, the_plan):
        assert difference() < 1e-4
    assert difference() > 1e-3
    check_rows_stay_apart(model, the_plan, *rows)


# -- rsLoRA and DoRA ---------------------------------------------------------------------------------------------------


def test_rank_stabilised_lora_is_scaled_by_the_root_of_its_rank(plan_for: PlanFor, tiny_model: Path) -> None:
    model = load_fitting(plan_for(LORA__RSLORA="true", LORA__R=16, LORA__ALPHA=8), tiny_model)
    assert model.get_base_model().model.layers[0].self_attn.q_proj.scaling == {"default": 8 / 4}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_dora_learns_magnitudes(plan: PlanFor, tmp_path: Path, quantization: str) -> None:
    the_plan, root = plan(LORA__DORA="true", QUANTIZATION=quantization), tmp_path / "run"
    base = save_llama(tmp_path / "base", tied=True)
    train_here(the_plan, base, root)
    fresh = load_fitting(the_plan, base)
    before = {
        name.replace(".default.weight", ""): weight
        for name, weight in fresh.named_parameters()
        if "lora_magnitude_vector" in name
    }
    adapter = load_file(root / "adapter" / "adapter_model.safetensors")
    after = {name: weight for name, weight in adapter.items() if "lora_magnitude_vector" in name}
    assert after.keys() == before.keys()
    assert len(after) == 7 * 2
    for name, weight in after.items():
        assert weight.dtype == torch.float32
        assert not torch.equal(weight, before[name]), name
    assert json.loads((root / "adapter" / "adapter_config.json").read_text())["use_dora"]


def test_dora_on_embeddings(plan: PlanFor, tmp_path: Path) -> None:
    the_plan, root = plan(LORA__DORA="true", LORA__TARGET_MODULES="embed_tokens,q_proj"), tmp_path / "run"
    base = save_llama(tmp_path / "base", tied=False)
    result = train_here(the_plan, base, root)
    loss = held_out_loss(load_trained(base, root / "adapter", vocabulary=VOCABULARY), the_plan, root)
    assert loss == pytest.approx(result["eval_loss"], rel=1e-5)
    assert loss < result["eval_loss_base"]
