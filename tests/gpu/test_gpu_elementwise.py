"""Elementwise parts of the layers compiled on a GPU: fewer kernels, with the numbers and gradients of transformers'."""

import copy
import statistics

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from job.train.elementwise import compile_elementwise

# What the compiler itself is warned of.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

ROUNDING = 1.3  # of what transformers' own bfloat16 is from float32, on average
IDS = torch.arange(1, 300)[None]


def make_model() -> PeftModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "vocab_size": 300}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=2))
    model = get_peft_model(base.bfloat16(), LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    for weight in model.parameters():
        if weight.requires_grad:
            nn.init.normal_(weight, std=0.1)
    return model.to("cuda").train()


def learn(model: PeftModel, dtype: torch.dtype = torch.bfloat16) -> tuple[list[torch.Tensor], int]:
    """Return logits and gradients, and how many kernels that took."""
    model.zero_grad()
    ids = IDS.cuda()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = model(input_ids=ids, labels=ids, use_cache=False)
        output.loss.backward()
        torch.cuda.synchronize()
    gradients = [weight.grad for weight in model.parameters() if weight.requires_grad]
    return [output.logits.detach(), *gradients], len(profile.events())


def find_error(actual: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Return how far tensors lie from the exact ones, relative to their size, on average."""
    pairs = zip(actual, exact, strict=True)
    return statistics.mean(((one.float() - other).norm() / other.norm()).item() for one, other in pairs)


def test_numbers_and_gradients_stay_by_fewer_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)
    model = make_model()
    exact, _ = learn(copy.deepcopy(model).float(), torch.float32)
    plain, plain_kernels = learn(model)
    assert compile_elementwise(model, "cuda", torch.bfloat16) == ["rotary embeddings", "gated MLPs"]
    learn(model)
    compiled, kernels = learn(model)
    assert kernels < plain_kernels
    assert 0 < find_error(compiled, exact) < ROUNDING * find_error(plain, exact) < ROUNDING / 10
