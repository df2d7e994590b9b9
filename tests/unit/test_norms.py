"""RMS norms in one kernel: what they compute is what transformers' modules do, and those that compute more stay."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from job.memory.model_shape import KNOWN, read_model_shape
from job.train.norms import fuse_norms

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
}
IDS = torch.arange(24).view(2, 12)


def make_model(model_type: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES))
    for name, weight in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(weight, 0.2, 2.0)  # ones would hide a norm without its weight
    return model.to(dtype)


@pytest.mark.parametrize("model_type", KNOWN)
def test_the_memory_estimate_knows_which_norms_run_in_one_kernel(model_type: str) -> None:
    config = AutoConfig.for_model(model_type, **SIZES)
    shape = read_model_shape(config.to_dict(), stored_bytes=0)
    assert shape.is_known
    norms = fuse_norms(make_model(model_type))
    assert (norms > SIZES["num_hidden_layers"] * shape.norms_per_layer) == shape.has_plain_norms
    assert norms == 0 or shape.has_plain_norms


def train_once(model: nn.Module) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return logits, and the gradient of every weight."""
    output = model(input_ids=IDS, labels=IDS)
    model.zero_grad()
    output.loss.backward()
    return output.logits.detach(), [weight.grad for weight in model.parameters() if weight.grad is not None]


@pytest.mark.parametrize(
    ("model_type", "norms"), [("llama", 5), ("qwen2", 5), ("mistral", 5), ("qwen3", 9), ("phi3", 5), ("olmo2", 9)]
)
def test_logits_and_gradients_stay(model_type: str, norms: int) -> None:
    model = make_model(model_type)
    logits, gradients = train_once(model)
    assert fuse_norms(model) == norms
    fused_logits, fused_gradients = train_once(model)
    torch.testing.assert_close(fused_logits, logits)
    torch.testing.assert_close(fused_gradients, gradients)


def test_every_norm_runs_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("qwen3")
    fuse_norms(model)
    called = []
    rms_norm: Callable[..., torch.Tensor] = nn.functional.rms_norm
    monkeypatch.setattr(nn.functional, "rms_norm", lambda *given: called.append(1) or rms_norm(*given))
    model(input_ids=IDS)
    assert len(called) == 9


@pytest.mark.parametrize("model_type", ["gemma", "gemma3_text"])
def test_a_norm_that_adds_to_its_weight_stays(model_type: str) -> None:
    model = make_model(model_type)
    before, _ = train_once(model)
    assert fuse_norms(model) == 0
    after, _ = train_once(model)
    assert torch.equal(after, before)


def test_rounding_is_no_worse_in_16_bits() -> None:
    exact = make_model("llama", torch.bfloat16).model.norm
    rounded = copy.deepcopy(exact)
    fused = copy.deepcopy(exact)
    exact.float()
    assert fuse_norms(fused) == 1
    torch.manual_seed(1)
    hidden = torch.randn(1000, 32, dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs = [norm(hidden) for norm in (rounded, fused)]
        error, fused_error = (((output.float() - exact(hidden.float())).abs().mean().item()) for output in outputs)
    assert outputs[1].dtype == torch.bfloat16
    assert 0 < fused_error <= error


def test_a_norm_that_is_trained_whole_learns() -> None:
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"], task_type="CAUSAL_LM")
    model = get_peft_model(make_model("llama"), lora)
    _, gradients = train_once(model)
    fuse_norms(model)
    _, fused_gradients = train_once(model)
    assert len(gradients) == 9  # two pairs of LoRA, and all that end so
    torch.testing.assert_close(fused_gradients, gradients)


def test_a_weight_in_another_precision_is_left_to_the_module() -> None:
    norm = make_model("llama").model.norm  # float32, as quantized models have them
    hidden = torch.randn(4, 32, dtype=torch.bfloat16)
    expected = norm(hidden)
    fuse_norms(norm)
    actual = norm(hidden)
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)


def test_a_norm_that_may_be_given_a_gate_stays() -> None:
    class GatedRMSNorm(type(make_model("llama").model.norm)):  # type: ignore[misc]
        def forward(self, hidden: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
            normalized = GatedRMSNorm.__base__.forward(self, hidden)
            return normalized if gate is None else normalized * gate

    assert fuse_norms(GatedRMSNorm(32)) == 0
