"""Answers are those of transformers' own greedy generation, whatever stands around the model; with the adapter off,
they are the base model's."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)

from job.handover import PromptInput, SampleInputs
from job.plan import TrainPlan
from job.train.adapter import add_adapter
from job.train.chunked_loss import chunk_loss
from job.train.gather import find_trained
from job.train.quantize import make_trainable, quantization_options
from job.train.samples import Answerer

PlanFor = Callable[..., TrainPlan]
VOCABULARY = 60
MAX_NEW_TOKENS = 8
PROMPTS = [[5, 9, 3], [7], [11, 12, 13, 14, 15, 16, 17], [20, 21]]

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More would wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def llama() -> PreTrainedModel:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes))


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4))


def bloom() -> PreTrainedModel:
    """A model that takes no positions: it finds them by the mask."""
    return BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4))


def mamba() -> PreTrainedModel:
    """A model without keys and values to keep."""
    return MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4))


def qwen3_5() -> PreTrainedModel:
    """A model of both: layers with attention, and layers that keep a state."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    widths = {"head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    layers = ["linear_attention", "full_attention"]
    return Qwen3_5ForCausalLM(Qwen3_5TextConfig(vocab_size=VOCABULARY, layer_types=layers, **sizes, **heads, **widths))


def make_model(plan: TrainPlan, make: Callable[[], PreTrainedModel], token_ids: list[int]) -> PeftModel:
    """Return a model that is being trained, whose adapter changes what it says."""
    torch.manual_seed(0)
    base = make()
    with torch.no_grad():
        for weight in base.parameters():
            weight.mul_(4)  # else it says the same token for ever
    base.config.use_cache = False
    model = add_adapter(base, plan, token_ids)
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.5)
    return model.train()


def ask(model: PeftModel, plan: TrainPlan, *, batch_size: int = 3, stops: list[int] = [], limit_s: float = 60) -> Any:  # noqa: B006
    samples = SampleInputs(
        prompts=[PromptInput(ids=ids, text="", messages=None, reference=None) for ids in PROMPTS],
        stop_ids=stops,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    answerer = Answerer(model, model.get_base_model(), 0, plan, rank=0, beat=lambda: None)
    return answerer.answer(samples, batch_size=batch_size, until_s=time.monotonic() + limit_s)


def generate(model: PeftModel, stops: list[int] = []) -> list[list[int]]:  # noqa: B006
    """Answer the prompts one by one, as transformers does."""
    model.eval()
    answers = []
    for ids in PROMPTS:
        options = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, "pad_token_id": 0, "use_cache": True}
        output = model.generate(input_ids=torch.tensor([ids]), eos_token_id=stops or None, **options)
        answers.append([token for token in output[0, len(ids) :].tolist() if token not in stops])
    model.train()
    return answers


@pytest.mark.parametrize(
    ("make", "settings", "token_ids"),
    [
        (llama, {}, []),
        (llama, {"TRAIN__LOSS": "chunked", "TRAIN__GRADIENT_CHECKPOINTING": "true"}, []),
        (llama, {"LORA__MODULES_TO_SAVE": "embed_tokens,lm_head"}, []),
        (llama, {"LORA__DORA": "true"}, [7, 50]),
        (gpt2, {"LORA__TARGET_MODULES": "c_attn"}, []),
        (bloom, {"LORA__TARGET_MODULES": "query_key_value"}, []),
        (mamba, {"LORA__TARGET_MODULES": "in_proj"}, []),
        (qwen3_5, {"LORA__TARGET_MODULES": "q_proj,out_proj"}, []),
    ],
    ids=["plain", "chunked and checkpointed", "whole modules", "rows and DoRA", "gpt2", "bloom", "mamba", "qwen3.5"],
)
def test_they_are_those_of_generate(
    plan_for: PlanFor, make: Callable[[], PreTrainedModel], settings: dict[str, str], token_ids: list[int]
) -> None:
    plan = plan_for(**({"MODEL__DTYPE": "float32", "LORA__DROPOUT": 0.3} | settings))
    model = make_model(plan, make, token_ids)
    if plan.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = list(find_trained(model))
    with model.disable_adapter():
        expected_before = generate(model)
    expected_after = generate(model)
    if plan.loss == "chunked":
        chunk_loss(model)
    with model.disable_adapter():
        before = ask(model, plan)
    after = ask(model, plan)
    assert before == expected_before
    assert after == expected_after
    assert before != after
    assert before == generate_plain(make)
    assert model.training
    assert list(find_trained(model)) == trained

    stop = after[2][4]  # the longest prompt's answer ends before it, and others where they say it
    assert ask(model, plan, batch_size=1, stops=[stop]) == [
        answer[: answer.index(stop)] if stop in answer else answer for answer in after
    ]


def generate_plain(make: Callable[[], PreTrainedModel]) -> list[list[int]]:
    """Answer with a base model that never had an adapter."""
    torch.manual_seed(0)
    base = make()
    with torch.no_grad():
        for weight in base.parameters():
            weight.mul_(4)
    return generate(base)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base(plan_for: PlanFor, tmp_path: Any, quantization: str) -> None:
    plan = plan_for(MODEL__DTYPE="float32", QUANTIZATION=quantization)
    llama().save_pretrained(tmp_path)
    options = quantization_options(plan, is_stored_so=False)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **options)
    make_trainable(base, plan)
    model = add_adapter(base, plan, [])
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    with model.disable_adapter():
        assert ask(model, plan, batch_size=1) == generate(model)
    assert ask(model, plan, batch_size=1) == generate(model)


def test_lower_precision_and_no_time(plan_for: PlanFor) -> None:
    plan = plan_for(MODEL__DTYPE="bfloat16", LORA__DROPOUT=0)
    model = make_model(plan, lambda: llama().to(torch.bfloat16), [])
    answers = ask(model, plan)
    assert [len(answer) for answer in answers] == [MAX_NEW_TOKENS] * len(PROMPTS)
    assert ask(model, plan, limit_s=0) == [None] * len(PROMPTS)
