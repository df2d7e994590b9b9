"""Attention by document gives what each row gets alone, for every architecture that the plan chooses it for."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from job.support import VARLEN_MODEL_TYPES
from job.train.dataset import PadRows, Row, join_rows
from job.train.varlen import JoinRows, attend

LENGTHS = (12, 31, 7, 1, 25)
WINDOW = 8  # less than most rows
SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "pad_token_id": 0,
}
WINDOWED = {
    "gemma3_text": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {"sliding_window": WINDOW},
    "mixtral": {"sliding_window": WINDOW},
    "phi3": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3_moe": {"use_sliding_window": True, "sliding_window": WINDOW},
    "smollm3": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
}
CASES = [(kind, WINDOWED.get(kind, {})) for kind in sorted(VARLEN_MODEL_TYPES)] + [("qwen3", {})]


def make_model(kind: str, attention: str, **sizes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    known = AutoConfig.for_model(kind)
    config = AutoConfig.for_model(
        kind, **{name: size for name, size in SIZES.items() if name in known.to_dict()} | sizes
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()
    model.config.use_cache = False
    return model


def make_rows() -> list[Row]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, 100, (length,), generator=generator) for length in LENGTHS]
    return [{"input_ids": row, "labels": row} for row in rows]


def learn(model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits (B, T, V), and the gradient of the layers' weights with respect to their sum."""
    model.zero_grad()
    inputs = {name: part for name, part in batch.items() if name != "labels"}
    logits = model(**inputs).logits
    logits.sin().sum().backward()
    gradients = [weight.grad.flatten() for name, weight in model.named_parameters() if ".layers." in name]
    return logits.detach(), torch.cat(gradients)


@pytest.mark.parametrize(("kind", "window"), CASES)
def test_each_row_gets_what_it_gets_alone(kind: str, window: dict[str, Any]) -> None:
    rows = make_rows()
    alone, usual = [], make_model(kind, "sdpa", **window)
    gradient = torch.zeros(())
    for row in rows:
        logits, one = learn(usual, join_rows([row]))
        alone.append(logits[0])
        gradient = gradient + one
    model = make_model(kind, "varlen", **window)
    logits, joined_gradient = learn(model, JoinRows("varlen")(rows))
    torch.testing.assert_close(logits[0], torch.cat(alone), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(joined_gradient, gradient, atol=1e-5 * gradient.abs().max().item(), rtol=1e-4)


def test_no_mask_of_all_tokens_by_all_tokens_is_built() -> None:
    seen: list[tuple[int, ...]] = []

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            seen.extend(tuple(part.shape) for part in tree_leaves(made) if isinstance(part, torch.Tensor))
            return made

    total = sum(LENGTHS)
    for attention, is_built in (("sdpa", True), ("varlen", False)):
        seen.clear()
        model = make_model("llama", attention)
        with Shapes():
            learn(model, JoinRows(attention)(make_rows()))
        assert any(shape[-2:] == (total, total) for shape in seen) == is_built


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_padded_rows_and_a_cache_work_as_under_sdpa(kind: str) -> None:
    batch = PadRows(0)(make_rows())
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    found, expected = (make_model(kind, attention).eval() for attention in ("varlen", "sdpa"))
    with torch.no_grad():
        assert torch.equal(found(**inputs).logits, expected(**inputs).logits)
        answers = [
            model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=True) for model in (found, expected)
        ]
    assert torch.equal(*answers)


@pytest.mark.parametrize("asked", ["softcap", "s_aux", "position_bias"])
def test_what_it_does_not_have_is_refused(asked: str) -> None:
    heads = torch.ones(1, 2, 3, 8)
    with pytest.raises(ValueError, match=asked):
        attend(nn.Identity(), heads, heads, heads, None, document_lengths=[1, 2], **{asked: torch.ones(2)})
