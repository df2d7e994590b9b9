"""What LoRA layers compute: what is dropped, and that all else stays as PEFT and PyTorch have it."""

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, Olmo2Config, PreTrainedConfig

from job.train.lora import Dropout, _Last, lighten_lora

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_model(
    dropout: float, *, dtype: torch.dtype = torch.bfloat16, kind: type[PreTrainedConfig] = LlamaConfig, **config: Any
) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    base = AutoModelForCausalLM.from_config(kind(**sizes, num_attention_heads=2, num_key_value_heads=1))
    base.to(torch.bfloat16).to(dtype)  # weights that bfloat16 can hold
    config = {"target_modules": "all-linear"} | config
    model = get_peft_model(base, LoraConfig(r=4, lora_dropout=dropout, task_type="CAUSAL_LM", **config))
    for name, weights in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weights, std=0.1)
    return model.train()


def train_once(model: nn.Module) -> tuple[float, list[torch.Tensor]]:
    """Return the loss of some tokens, and all gradients."""
    torch.manual_seed(1)
    ids = torch.arange(24).view(2, 12)
    is_float32 = next(model.parameters()).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not is_float32):
        loss = model(input_ids=ids, labels=ids).loss
    model.zero_grad()
    loss.backward()
    return loss.item(), [weights.grad for weights in model.parameters() if weights.grad is not None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_share_is_dropped_and_the_rest_grows_by_as_much(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(400, 999, dtype=dtype, requires_grad=True)  # no multiple of four
    dropped = Dropout(0.25)(x)
    assert dropped.dtype == dtype
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.005)
    kept = dropped[dropped != 0]
    assert torch.equal(kept, torch.full_like(kept, 4 / 3))
    dropped.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, dropped)  # the same ones, by the same factor


@pytest.mark.parametrize("p", [0.00001, 0.3, 0.999999])
def test_every_probability_is_kept_to(p: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(1000, 1000)
    dropped = Dropout(p)(x)
    assert torch.isfinite(dropped).all()
    assert (dropped == 0).float().mean().item() == pytest.approx(p, abs=0.002)


def test_no_element_is_dropped_more_often_than_others() -> None:
    torch.manual_seed(0)
    dropout, x = Dropout(0.25), torch.ones(2000, 8)
    rates = (dropout(x) == 0).float().mean(dim=0)
    assert rates.min() > 0.2
    assert rates.max() < 0.3
    both = (dropout(x) == 0) & (dropout(x) == 0)
    assert both.float().mean().item() == pytest.approx(0.0625, abs=0.01)  # and draws don't depend on each other


def test_a_seed_decides_and_evaluation_drops_nothing() -> None:
    dropout, x = Dropout(0.5), torch.randn(7, 11)
    draws = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        draws.append(dropout(x))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert dropout.eval()(x) is x


def test_dropouts_of_one_model_drop_the_same_of_one_input() -> None:
    last = _Last()
    one, other, x = Dropout(0.5, last=last), Dropout(0.5, last=last), torch.randn(40, 50, requires_grad=True) * 1
    dropped = one(x)
    assert other(x) is dropped
    assert not torch.equal(other(x * 1), dropped)  # another input, and now the last
    assert not torch.equal(one(x), dropped)
    assert one(x).requires_grad
    with torch.no_grad():
        assert not other(x).requires_grad
        before = one(x)
        x.add_(1)
        assert not torch.equal(other(x), before)  # it isn't what it was
    assert (Dropout(0.9, last=last)(x) == 0).float().mean() > 0.8


def test_what_was_dropped_of_the_last_input_goes_with_it() -> None:
    last, x = _Last(), torch.randn(40, 50)
    dropped = weakref.ref(Dropout(0.5, last=last)(x))
    assert dropped() is not None
    del x
    assert dropped() is None


@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_layers_with_the_same_input_drop_of_it_once(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(0.5, **config)
    lighten_lora(model)
    inputs: list[torch.Tensor] = []
    drop = Dropout._drop

    def note(dropout: Dropout, x: torch.Tensor, *, scales: bool) -> tuple[torch.Tensor, float]:
        inputs.append(x)
        return drop(dropout, x, scales=scales)

    monkeypatch.setattr(Dropout, "_drop", note)
    train_once(model)
    assert len(inputs) == len({id(x) for x in inputs}) == 2 * 4  # of attention, its output, the gate, the way down


def distance(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Return how far gradients are from others, as a share of these."""
    assert len(found) == len(expected) > 0
    squares = sum((one - other).square().sum() for one, other in zip(found, expected, strict=True))
    return float((squares / sum(gradient.square().sum() for gradient in expected)).sqrt())


def test_by_module_loss_and_gradients_are_bitwise_those_of_peft() -> None:
    as_it_comes, lightened = make_model(0.0), make_model(0.0)
    lighten_lora(lightened, gathers_by_module=True)
    expected_loss, expected = train_once(as_it_comes)
    loss, gradients = train_once(lightened)
    assert loss == expected_loss
    assert len(gradients) == len(expected) > 0
    assert all(map(torch.equal, gradients, expected))


@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed but:UserWarning")
@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"lora_bias": True}], ids=["lora", "dora", "bias"])
def test_without_dropout_loss_and_gradients_are_those_of_peft(config: dict[str, Any]) -> None:
    as_it_comes, lightened = (make_model(0.0, dtype=torch.float32, **config) for _ in range(2))
    lighten_lora(lightened)
    expected_loss, expected = train_once(as_it_comes)
    loss, gradients = train_once(lightened)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert distance(gradients, expected) < 1e-5


def test_with_dropout_they_are_those_of_its_factor_in_a_pass_of_its_own() -> None:
    by_module, lightened = (make_model(0.5, dtype=torch.float32) for _ in range(2))
    lighten_lora(by_module, gathers_by_module=True)
    lighten_lora(lightened)
    expected_loss, expected = train_once(by_module)  # seeded, so that the same elements are dropped
    loss, gradients = train_once(lightened)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert distance(gradients, expected) < 1e-5


class CountSums(TorchDispatchMode):
    """Counts the sums of two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.add.Tensor
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("dropout", "fewer"), [(0.0, 25), (0.5, 14)])
def test_what_base_model_and_adapter_compute_is_summed_by_their_products(dropout: float, fewer: int) -> None:
    """In all of 14 layers, and without dropout also their gradients, in all but 3 whose input is not learned."""
    counts = []
    for gathers_by_module in (True, False):
        model = make_model(dropout)
        lighten_lora(model, gathers_by_module=gathers_by_module)
        with CountSums() as sums:
            train_once(model)
        counts.append(sums.count)
    assert counts[0] - counts[1] == fewer


def test_in_16_bits_they_are_as_exact_as_those_of_peft() -> None:
    exact, as_it_comes, lightened = make_model(0.0, dtype=torch.float32), make_model(0.0), make_model(0.0)
    lighten_lora(lightened)
    _, expected = train_once(exact)
    assert distance(train_once(lightened)[1], expected) < 1.2 * distance(train_once(as_it_comes)[1], expected) < 0.1


def test_evaluation_is_bitwise_that_of_peft() -> None:
    as_it_comes, lightened = make_model(0.5).eval(), make_model(0.5).eval()
    lighten_lora(lightened)
    expected_loss, expected = train_once(as_it_comes)
    loss, gradients = train_once(lightened)
    assert loss == expected_loss
    assert all(map(torch.equal, gradients, expected))


def test_an_adapter_that_is_switched_off_adds_nothing() -> None:
    model = make_model(0.0, dtype=torch.float32).eval()
    lighten_lora(model)
    ids = torch.arange(12)[None]
    disable: Callable[..., Any] = model.disable_adapter
    with torch.no_grad(), disable():
        off = model(input_ids=ids).logits
        bare = model.get_base_model()(input_ids=ids).logits  # type: ignore[operator]
    assert torch.equal(off, bare)
    assert not torch.allclose(off, model(input_ids=ids).logits)


@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_the_input_of_a_lora_layer_is_not_copied_to_another_precision(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(0.5, **config)
    lighten_lora(model)
    seen: list[torch.dtype] = []
    drop = Dropout.drop

    def note(dropout: Dropout, x: torch.Tensor, **others: bool) -> tuple[torch.Tensor, float]:
        seen.append(x.dtype)
        return drop(dropout, x, **others)

    monkeypatch.setattr(Dropout, "drop", note)
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    _, gradients = train_once(model)
    assert seen == [torch.bfloat16] * len(layers)
    assert all(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(
    ("kind", "targets"),
    [(LlamaConfig, "all-linear"), (Olmo2Config, ["q_proj", "v_proj"])],  # no norm before what olmo2 computes twice
)
def test_gradient_checkpointing_computes_the_same_twice(kind: type[Any], targets: Any, dropout: float) -> None:
    plain, checkpointed = (make_model(dropout, kind=kind, target_modules=targets) for _ in range(2))
    for model in (plain, checkpointed):
        lighten_lora(model)
    enable: Callable[..., None] = checkpointed.gradient_checkpointing_enable
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for expected, found in zip(train_once(plain)[1], train_once(checkpointed)[1], strict=True):
        assert torch.equal(expected, found)
