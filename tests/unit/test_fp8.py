"""A base model whose products are in FP8: how far numbers are from the plain ones, what is trained, what is refused."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import torch
from small_training import (
    VOCABULARY,
    held_out_loss,
    load_trained,
    make_small_plan,
    read_metrics,
    save_llama,
    train_here,
)
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from job.errors import ConfigError
from job.hardware import Hardware
from job.parallel import plan_parallel
from job.plan import TrainPlan
from job.settings import Settings
from job.support import why_not_quantization, why_not_split
from job.train.fp8 import Fp8Linear, compile_quantizer, hold_in_fp8, quantize_rows, without_rounding
from job.train.model import load_model

PlanFor = Callable[..., TrainPlan]
HALF_A_STEP = 2**-4  # e4m3 has three bits behind the first one

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


def make_layer(*, bias: bool = False, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Fp8Linear]:
    """A plain layer and the same in FP8; its rows are of very different sizes."""
    torch.manual_seed(0)
    plain = nn.Linear(64, 48, bias=bias)
    with torch.no_grad():
        plain.weight *= torch.logspace(-3, 1, 48)[:, None]
    plain = plain.to(dtype).requires_grad_(False)
    return plain, Fp8Linear(plain)


def test_each_row_is_rounded_by_its_own_scale() -> None:
    torch.manual_seed(0)
    values = torch.randn(5, 64) * torch.tensor([1e-6, 1.0, 1e4, 0.0, 3.0])[:, None]
    codes, scales = quantize_rows(values)
    assert codes.dtype == torch.float8_e4m3fn
    assert scales.shape == (5, 1)
    rounded = codes.float() * scales
    sizes = values.abs().amax(dim=1, keepdim=True)
    assert ((rounded - values).abs() <= HALF_A_STEP * values.abs() + 2e-5 * sizes).all()
    assert torch.equal(codes.float().abs().amax(dim=1), torch.tensor([448.0, 448.0, 448.0, 0.0, 448.0]))


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    yield
    compile_quantizer.cache_clear()
    torch._dynamo.reset()


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(which("g++") is None, reason="without g++ nothing compiles for a CPU: NO compiled kernel was tried")
def test_compiled_it_rounds_alike_whatever_the_shape() -> None:
    torch.manual_seed(0)
    forward, backward = (compile_quantizer("cpu", torch.bfloat16, scaled) for scaled in (0, 1))
    assert quantize_rows not in (forward, backward)
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows, columns in [(48, 64), (7, 96), (130, 16)]:
            values = torch.randn(rows, columns, dtype=torch.bfloat16)
            column_scales = torch.rand(1, columns)
            for found, expected in [
                (forward(values), quantize_rows(values)),
                (backward(values, column_scales), quantize_rows(values, column_scales)),
            ]:
                assert found[0].dtype == torch.float8_e4m3fn
                torch.testing.assert_close(found[1], expected[1])
                # One number in a thousand may fall the other way, into the neighbouring code.
                differ = found[0].float() != expected[0].float()
                assert differ.float().mean() < 0.001
                torch.testing.assert_close(found[0].float(), expected[0].float(), rtol=2 * HALF_A_STEP, atol=1e-2)


@pytest.mark.usefixtures("nothing_compiled")
def test_where_nothing_compiles_it_rounds_step_by_step(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: torch.Tensor) -> Any:
        raise RuntimeError("Cannot find a working triton installation\nand a second line")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    monkeypatch.setattr(logging.getLogger("sft_job"), "propagate", True)
    assert compile_quantizer("cpu", torch.bfloat16, 1) is quantize_rows
    assert caplog.messages == [
        "activations are rounded to FP8 step by step, which is slow, for compiling fails here: Cannot find a working "
        "triton installation"
    ]


def test_what_is_no_number_stays_none() -> None:
    values = torch.ones(2, 16)
    values[0, 3] = torch.nan
    codes, scales = quantize_rows(values)
    assert not torch.isfinite(codes.float() * scales)[0].any()
    assert torch.isfinite(codes.float() * scales)[1].all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_and_gradient_are_those_of_the_rounded_weight(bias: bool, dtype: torch.dtype) -> None:
    plain, layer = make_layer(bias=bias, dtype=dtype)
    activations, weights = torch.randn(3, 7, 64).to(dtype).requires_grad_(), torch.randn(3, 7, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
        product = layer(activations)
    (product.float() * weights).sum().backward()
    assert product.dtype == activations.grad.dtype == dtype  # type: ignore[union-attr]
    offset = plain.bias.float() if bias else 0
    expected = activations.detach().float() @ layer.dequantize().T + offset
    assert cosine_similarity(product.detach().float().flatten(), expected.flatten(), dim=0) > 0.999
    # The rows of a weight differ by a factor of 10,000: a gradient rounded without their scales would lose the small.
    gradient = weights @ layer.dequantize()
    assert cosine_similarity(activations.grad.float().flatten(), gradient.flatten(), dim=0) > 0.999  # type: ignore[union-attr]
    assert cosine_similarity(layer.dequantize(), plain.weight.float(), dim=1).min() > 0.999


@pytest.mark.skipif(
    torch.torch_version.TorchVersion(torch.__version__) < "2.13",
    reason="PyTorch 2.11's form for CPUs takes one scale for all rows; the job multiplies by it on GPUs alone",
)
def test_pytorchs_own_kernel_gives_the_same() -> None:
    """The operator that runs on GPUs has a form for CPUs, with the same scales and the same order of what it takes."""
    _, layer = make_layer()
    torch.manual_seed(1)
    activations = torch.randn(9, 64)
    codes, scales = quantize_rows(activations)
    weight, weight_scales = layer.weight.view(torch.float8_e4m3fn), layer.scales.view(torch.float32)
    expected = torch._scaled_mm(
        codes, weight.T, scale_a=scales, scale_b=weight_scales.T, out_dtype=torch.float32, use_fast_accum=True
    )
    assert torch.allclose(layer(activations), expected, rtol=1e-4, atol=1e-5 * expected.abs().max())


def test_without_rounding_it_is_the_plain_product_of_the_rounded_weight() -> None:
    _, layer = make_layer(bias=True)
    activations = torch.randn(9, 64)
    expected = nn.functional.linear(activations, layer.dequantize(), layer.bias)
    with without_rounding(layer):
        assert torch.equal(layer(activations), expected)
    assert not torch.allclose(layer(activations), expected, rtol=1e-3)


def test_no_cast_of_a_model_reaches_the_codes() -> None:
    _, layer = make_layer()
    before = layer.dequantize()
    assert torch.equal(layer.to(torch.bfloat16).half().dequantize(), before)


def make_llama(hidden_size: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden_size, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes))


def test_all_linear_layers_but_the_head_are_held_so() -> None:
    base = make_llama()
    hold_in_fp8(base, head=base.get_output_embeddings())
    assert sum(type(module) is Fp8Linear for module in base.modules()) == 2 * 7
    assert type(base.get_output_embeddings()) is nn.Linear
    assert base.model.layers[0].mlp.up_proj.weight.nbytes == 64 * 128
    with pytest.raises(ConfigError, match=r"SFT_QUANTIZATION=fp8: .*multiples of 16"):
        hold_in_fp8(nn.Sequential(nn.Linear(10, 20)), head=None)


@pytest.fixture
def plan(plan_for: PlanFor) -> PlanFor:
    return lambda **settings: make_small_plan(plan_for, **settings)


def learn(plan: TrainPlan, folder: Path) -> tuple[float, torch.Tensor]:
    """The loss, and the gradients of an adapter that isn't zero any more."""
    model = load_model(plan, folder, vocabulary_size=0, new_tokens=[])
    torch.manual_seed(0)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    for name, weight in trained.items():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    ids = torch.arange(40).reshape(2, 20)
    logits = model.train()(ids).logits.float()
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return loss.item(), torch.cat([weight.grad.flatten() for weight in trained.values()])  # type: ignore[union-attr]


def test_loss_and_gradients_are_nearly_those_of_the_plain_model(plan: PlanFor, tmp_path: Path) -> None:
    base = save_llama(tmp_path, tied=True)
    settings = {"LORA__DROPOUT": 0, "LORA__R": 4}
    expected_loss, expected = learn(plan(**settings), base)
    loss, gradients = learn(plan(QUANTIZATION="fp8", **settings), base)
    assert loss != expected_loss
    assert loss == pytest.approx(expected_loss, rel=2e-3)
    assert cosine_similarity(gradients, expected, dim=0) > 0.99
    assert gradients.norm().item() == pytest.approx(expected.norm().item(), rel=0.05)


@pytest.mark.parametrize(
    "settings", [{}, {"TRAIN__PACKING": "true", "TRAIN__LOSS": "chunked", "TRAIN__GRADIENT_CHECKPOINTING": "true"}]
)
def test_what_was_learned_works_on_the_plain_model(plan: PlanFor, tmp_path: Path, settings: dict[str, str]) -> None:
    base = save_llama(tmp_path / "base", tied=False)
    results: dict[str, Any] = {}
    for kind in ("none", "fp8"):
        the_plan, root = plan(QUANTIZATION=kind, **settings), tmp_path / kind
        results[kind] = train_here(the_plan, base, root)
        assert all(event["grad_norm"] > 0 for event in read_metrics(root) if "loss" in event)
    result, learned = results["fp8"], results["none"]["eval_loss_base"] - results["none"]["eval_loss"]
    assert learned > 0.05
    assert result["total_parameters"] == results["none"]["total_parameters"]
    assert result["eval_loss"] == pytest.approx(results["none"]["eval_loss"], abs=0.1 * learned)
    plain = load_trained(base, tmp_path / "fp8" / "adapter", vocabulary=VOCABULARY)
    loss = held_out_loss(plain, the_plan.model_copy(update={"loss": "full"}), root)
    assert loss == pytest.approx(result["eval_loss"], abs=0.1 * learned)


def test_what_cannot_be(
    load: Callable[..., Settings], machine: Callable[..., Hardware], plan_for: PlanFor, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"SFT_QUANTIZATION=fp8: .*8\.9, and this one has 8\.0"):
        plan_parallel(load(QUANTIZATION="fp8"), machine(gpus=1, capability=(8, 0)))
    with pytest.raises(ConfigError, match="SFT_LORA__DORA=true"):
        plan_parallel(load(QUANTIZATION="fp8", LORA__DORA="true"), machine(gpus=1))
    for engine in ("zero3", "fsdp2"):
        assert why_not_split(engine, "fp8") is not None
    assert why_not_split("zero2", "fp8") is None
    base = save_llama(tmp_path, tied=True)
    with pytest.raises(ConfigError, match=r"MODULES_TO_SAVE: model\.layers\.0\.mlp\.up_proj is quantised"):
        load_model(
            plan_for(QUANTIZATION="fp8", LORA__MODULES_TO_SAVE="up_proj"), base, vocabulary_size=0, new_tokens=[]
        )


def test_it_needs_no_package_and_a_cpu_is_warned_of(plan_for: PlanFor, monkeypatch: pytest.MonkeyPatch) -> None:
    assert any("multiplies the rounded numbers" in warning for warning in plan_for(QUANTIZATION="fp8").warnings)
    on_gpu, plain = plan_for(hardware={"gpus": 1}, QUANTIZATION="fp8"), plan_for(hardware={"gpus": 1})
    assert not any("fp8" in warning for warning in on_gpu.warnings)
    assert 0.5 < on_gpu.memory.weights_bytes / plain.memory.weights_bytes < 0.65  # embeddings stay
    monkeypatch.setattr("job.support._is_installed", lambda _: False)
    assert why_not_quantization("fp8", "cuda", (9, 0)) is None
