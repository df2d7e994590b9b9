"""The frozen base model's products in FP8: weights held in 8-bit floating point, activations rounded on their way in.

Each row of a weight (N, K) has a scale of its own, and each token of the activations, found as it comes. Nothing is
learned here, so the backward pass needs the gradient of the input alone, and it needs no second copy of the weight: its
scales go into the gradient before that is rounded. The kernels want what is summed over to lie side by side, so the
codes are transposed for the moment, a byte each; to keep them in both orders would take as much as bfloat16 does.

Everything is e4m3: with a scale for every row, precision counts for more than e5m2's range, for gradients, too. Head,
embeddings and norms stay as they are, and so do adapters on top. Source: Micikevicius et al., FP8 Formats for Deep
Learning (arXiv 2209.05433).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from job.errors import ConfigError
from job.log import logger
from job.train.compiling import Function, compile_tried

_E4M3 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_E4M3).max  # 448
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # of a row of zeros
_MULTIPLE = 16  # of both sizes of a weight, for the kernels
_TRIED_ROWS = 48


def hold_in_fp8(base: nn.Module, *, head: nn.Module | None) -> None:
    """Put an `Fp8Linear` in the place of every linear layer but the head, wherever the weights are.

    Layers whose sizes don't suit the kernels stay. Raises ConfigError where none of them do.
    """
    linears = {
        name: module for name, module in base.named_modules() if type(module) is nn.Linear and module is not head
    }
    fitting = [name for name, module in linears.items() if not any(size % _MULTIPLE for size in module.weight.shape)]
    if not fitting:
        raise ConfigError(
            f"SFT_QUANTIZATION=fp8: this model has no linear layers whose sizes are multiples of {_MULTIPLE}",
            hint="set SFT_QUANTIZATION=none",
        )
    for name in fitting:
        base.set_submodule(name, Fp8Linear(linears.pop(name)))
    if linears:
        first = next(iter(linears))
        logger.warning("%d linear layers stay out of FP8, for their sizes don't suit: %s first", len(linears), first)


class Fp8Linear(nn.Linear):
    """A frozen linear layer, made of a plain one, that multiplies in FP8.

    Codes and scales are held as bytes: a model is often cast as a whole, and no cast may reach them.
    """

    scales: torch.Tensor

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)  # nn.Linear's own makes weights
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype  # of what comes out
        codes, scales = quantize_rows(linear.weight.detach())
        self.weight = nn.Parameter(codes.view(torch.uint8), requires_grad=False)  # (N, K)
        self.register_buffer("scales", scales.view(torch.uint8))  # (N, 4), of a float32 each
        self.bias = linear.bias
        self.rounds = True

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - nn.Linear's name
        """Return (..., N), given (..., K)."""
        if not self.rounds:
            return nn.functional.linear(input, self.dequantize().to(self.dtype), self.bias)
        product: torch.Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            input, self.weight.view(_E4M3), self.scales.view(torch.float32), self.dtype
        )
        return product if self.bias is None else product + self.bias

    def dequantize(self) -> torch.Tensor:
        """Return the weight (N, K) that this layer multiplies with, float32."""
        return self.weight.view(_E4M3).float() * self.scales.view(torch.float32)


@contextmanager
def without_rounding(model: nn.Module) -> Iterator[None]:
    """Have a model's `Fp8Linear` take activations as they are, while this lasts.

    Else the last bit of an activation decides whether it is rounded up or down, which lie an eighth apart, and every
    layer has more of these: a row's logits in SmolLM2-135M differ by 8.5 % with what is computed beside it, though
    attention keeps them apart. So two ways of computing the same can be compared only without it.
    """
    layers = [module for module in model.modules() if isinstance(module, Fp8Linear)]
    for layer in layers:
        layer.rounds = False
    try:
        yield
    finally:
        for layer in layers:
            layer.rounds = True


def quantize_rows(values: torch.Tensor, column_scales: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Round values (M, K) to e4m3, so that the largest of each row is the largest there is.

    Return codes (M, K) and scales (M, 1), float32: values are codes x scales. With `column_scales` (1, K) the values
    are multiplied by them first.
    """
    wide = values.float() if column_scales is None else values.float() * column_scales
    scales = (wide.abs().amax(dim=1, keepdim=True) / _LARGEST).clamp(min=_SMALLEST_SCALE)  # a NaN stays one
    return (wide / scales).to(_E4M3), scales


class _Product(torch.autograd.Function):
    """Activations (..., K) times a weight: codes (N, K) e4m3 and scales (N, 1)."""

    @staticmethod
    def forward(
        ctx: Any, activations: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.dtype = activations.dtype
        rounded, rounded_scales = _round(activations.flatten(0, -2))
        product = _multiply(rounded, rounded_scales, codes, scales, dtype)  # (M, N)
        return product.view(*activations.shape[:-1], len(codes))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        codes, scales = ctx.saved_tensors
        rounded, rounded_scales = _round(gradient.flatten(0, -2), scales.T)
        inputs = codes.shape[1]
        ones = torch.ones(inputs, 1, device=codes.device)  # the scales are in the gradient
        product = _multiply(rounded, rounded_scales, codes.T.contiguous(), ones, ctx.dtype)  # (M, K)
        return product.view(*gradient.shape[:-1], inputs), None, None, None


def _multiply(
    left: torch.Tensor, left_scales: torch.Tensor, right: torch.Tensor, right_scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return left (M, K) times right (N, K) transposed, each row of both by its scale (M, 1) and (N, 1)."""
    if left.device.type == "cpu":  # the same numbers; PyTorch has a kernel in some versions, which is slower
        with torch.autocast("cpu", enabled=False):
            return (left.float() @ right.float().T * left_scales * right_scales.T).to(dtype)
    # Scaled by row, the kernels return bfloat16, and are fast only with the tensor cores' own sums
    # (https://github.com/pytorch/ao, torchao/float8/config.py).
    product = torch._scaled_mm(
        left, right.T, scale_a=left_scales, scale_b=right_scales.T, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return product.to(dtype)


def _round(values: torch.Tensor, *column_scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `quantize_rows` does: on a GPU in one kernel, for else it takes half the time of a product."""
    if values.device.type == "cpu":
        return quantize_rows(values, *column_scales)
    codes, scales = compile_quantizer(values.device.type, values.dtype, len(column_scales))(values, *column_scales)
    return codes, scales


@cache
def compile_quantizer(device: str, dtype: torch.dtype, scaled: int) -> Function:
    """Return `quantize_rows` of values in a precision, and of column scales if `scaled`, compiled for a device; as it
    is, with a warning, where it doesn't compile or comes to other numbers when it is tried here."""
    generator = torch.Generator(device).manual_seed(0)  # the training's own numbers stay as they are
    values = torch.randn(_TRIED_ROWS, 4 * _MULTIPLE, device=device, dtype=dtype, generator=generator)
    column_scales = [torch.rand(1, 4 * _MULTIPLE, device=device, generator=generator)] * scaled
    what = "activations are rounded to FP8 step by step, which is slow"
    return compile_tried(quantize_rows, [], [values, *column_scales], what=what, dynamic=True) or quantize_rows
