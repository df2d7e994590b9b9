"""Elementwise parts of the layers, compiled: numbers and gradients stay, less is kept, and what can't be compiled or
computes something else is left as it is."""

import logging
from collections.abc import Callable, Iterator
from shutil import which
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from job.plan import TrainPlan
from job.train import elementwise
from job.train.elementwise import compile_elementwise, is_worth_compiling

ROTATE = "apply_rotary_pos_emb"
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}
SHAPES = [(1, 24), (1, 31), (3, 17), (2, 19)]

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),  # peft's word on a GPT-2, which it then mends
]


@pytest.fixture(autouse=True)
def rotation_stays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put back what was compiled in modules of transformers."""
    monkeypatch.setattr(modeling_llama, ROTATE, modeling_llama.apply_rotary_pos_emb)
    yield
    torch._dynamo.reset()


def make_model(model_type: str = "llama", **changes: Any) -> PeftModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(SIZES | changes)))
    model.config.use_cache = False
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora)
    for weight in adapted.parameters():
        if weight.requires_grad:
            nn.init.normal_(weight, std=0.2)
    return adapted.train()


def train_once(model: PeftModel, batch: int, tokens: int) -> list[torch.Tensor]:
    """Return logits, and the gradients of what is trained."""
    ids = torch.randint(0, SIZES["vocab_size"], (batch, tokens), generator=torch.Generator().manual_seed(tokens))
    model.zero_grad()
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    return [output.logits.detach(), *(weight.grad for weight in model.parameters() if weight.requires_grad)]


def count_kept_bytes(model: PeftModel) -> int:
    """Return the bytes that autograd keeps for a step, each piece of memory once."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=torch.arange(40)[None], labels=torch.arange(40)[None]).loss
    del loss
    return sum(kept.values())


def interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have everything done that compiling is, but for the kernels, which take seconds."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiler(function, backend="aot_eager"))


@pytest.mark.skipif(which("g++") is None, reason="without g++ nothing compiles for a CPU: NO compiled kernel was tried")
def test_logits_and_gradients_stay_for_every_shape_and_less_is_kept() -> None:
    model = make_model()
    plain, kept_bytes = [train_once(model, *shape) for shape in SHAPES], count_kept_bytes(model)
    state = torch.get_rng_state()
    assert compile_elementwise(model, "cpu", torch.float32) == ["rotary embeddings", "gated MLPs"]
    assert torch.equal(torch.get_rng_state(), state)
    for shape, expected in zip(SHAPES, plain, strict=True):
        torch.testing.assert_close(train_once(model, *shape), expected, rtol=1e-4, atol=1e-5)
    assert count_kept_bytes(model) <= kept_bytes - 2 * 40 * SIZES["intermediate_size"] * 4  # the activated gates
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(train_once(model, *SHAPES[0]), plain[0], rtol=1e-4, atol=1e-5)


def test_a_shape_that_is_new_compiles_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    interpret(monkeypatch)
    model = make_model()
    compile_elementwise(model, "cpu", torch.float32)
    with torch.compiler.set_stance("fail_on_recompile"):
        for tokens in (24, 7, 333):
            train_once(model, 1, tokens)


@pytest.mark.parametrize(
    ("model_type", "names"),
    [
        ("qwen2", ["rotary embeddings", "gated MLPs"]),
        ("mistral", ["rotary embeddings", "gated MLPs"]),
        ("gemma", ["rotary embeddings", "gated MLPs"]),
        ("phi3", ["rotary embeddings"]),  # gate and up are one
        ("seed_oss", ["rotary embeddings"]),  # with a dropout behind
        ("gpt_neox", ["rotary embeddings"]),  # no gates
        ("gpt2", []),
    ],
)
def test_other_architectures(model_type: str, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    interpret(monkeypatch)
    model = make_model(model_type).eval()
    module = __import__(type(model.get_base_model()).__module__, fromlist=[ROTATE])
    monkeypatch.setattr(module, ROTATE, getattr(module, ROTATE, None), raising=False)
    plain = train_once(model, 1, 24)
    assert compile_elementwise(model, "cpu", torch.float32) == names
    torch.testing.assert_close(train_once(model, 1, 24), plain, rtol=1e-4, atol=1e-5)


def fail(*_: Any) -> Any:
    raise RuntimeError("Failed to find C compiler\nand a second line")


def distort(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
    def run(*given: torch.Tensor) -> Any:
        results = function(*given)
        return tuple(part * 1.01 for part in results) if isinstance(results, tuple) else results * 1.01

    return run


@pytest.mark.parametrize(
    ("compiler", "why"),
    [
        (lambda *_, **__: fail, "stay as they are, for compiling fails here: Failed to find C compiler"),
        (distort, "stay as they are: what was compiled comes to other numbers (0.01)"),
    ],
)
def test_what_does_not_work_here_stays_as_it_is(
    compiler: Any, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setattr(logging.getLogger("sft_job"), "propagate", True)
    model = make_model()
    plain = train_once(model, 1, 24)
    assert compile_elementwise(model, "cpu", torch.float32) == []
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"rotary embeddings {why}",
        f"gated MLPs {why}",
    ]
    assert all(torch.equal(one, other) for one, other in zip(train_once(model, 1, 24), plain, strict=True))


def test_another_function_of_that_name_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    interpret(monkeypatch)

    def rotate(states: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        return states * angles

    monkeypatch.setattr(modeling_llama, ROTATE, rotate)
    assert compile_elementwise(make_model(), "cpu", torch.float32) == ["gated MLPs"]
    assert modeling_llama.apply_rotary_pos_emb is rotate


def test_a_run_is_worth_compiling_for_once_it_is_long(plan_for: Callable[..., TrainPlan]) -> None:
    plan = plan_for(TRAIN__GLOBAL_BATCH_SIZE=8, TRAIN__MAX_STEPS=100)
    step_tokens = 8 * plan.train_tokens / plan.train_rows
    parameters = int(elementwise._LEAST_FLOPS / (4 * step_tokens * 100))
    assert is_worth_compiling(plan, parameters + 1)
    assert not is_worth_compiling(plan, parameters - 1)
    assert not is_worth_compiling(plan.model_copy(update={"processes": 2}), parameters + 1)
