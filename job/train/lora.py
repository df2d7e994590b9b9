"""What LoRA layers compute, in fewer passes over memory than PEFT takes for it.

Left to itself, PEFT copies the input of every LoRA layer to the adapter's float32, and drops of that; autocast then
rounds the copy back to what it was copied from. PyTorch's dropout on a CPU draws one random number after the other. And
the adapter's output is written, scaled and added to the base model's in three passes.
"""

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear, LoraVariant
from torch import nn
from torch.autograd.function import once_differentiable

_VALUES = 2**16  # that a drawn number may have
_LEAST = -(2**15)


def lighten_lora(model: nn.Module, *, gathers_by_module: bool = False) -> None:
    """Let the LoRA layers of a model that runs under autocast read their input as it is, drop of it as cheaply as the
    device allows, and add what they compute in the product itself.

    What is learned stays the same, but for rounding and for which elements are dropped on a CPU. `gathers_by_module`:
    the engine brings a module's weights together only while that module runs, so that no other may use them.
    """
    numbers = _Numbers()
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False
            for name, dropout in layer.lora_dropout.items():
                if isinstance(dropout, nn.Dropout):
                    layer.lora_dropout[name] = Dropout(dropout.p, numbers).train(dropout.training)
            if type(layer) is Linear and not gathers_by_module:
                for name, second in layer.lora_B.items():
                    if name not in layer.lora_variant and second.bias is None:
                        layer.lora_variant[name] = _Added()


class _Added(LoraVariant):  # type: ignore[misc]
    """PEFT's plain LoRA, its output scaled and added by the product that computes it while training.

    Evaluation computes what plain PEFT does, to the last bit; for a few tokens that is faster, too.
    """

    @staticmethod
    def forward(module: Linear, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any) -> torch.Tensor:
        """Return result (..., O) and what the adapter adds to it for x (..., I)."""
        narrow = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))  # (..., R)
        second, scaling = module.lora_B[active_adapter], module.scaling[active_adapter]
        if not module.training:
            evaluated: torch.Tensor = result + second(narrow) * scaling
            return evaluated
        added = torch.addmm(result.flatten(0, -2), narrow.flatten(0, -2), second.weight.t(), alpha=scaling)
        return added.view_as(result)


class _Numbers:
    """Random numbers of 16 bits, in memory that all layers share: new one for each would leave holes in the heap."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.int64)

    def draw(self, count: int) -> torch.Tensor:
        """Return numbers (count,) int16, which are there until the next ones are drawn."""
        needed = -(-count // 4)  # of each number of 64 bits come four
        if len(self._memory) < needed:
            self._memory = torch.empty(needed, dtype=torch.int64)
        return self._memory[:needed].random_(-(2**63), None).view(torch.int16)[:count]


class Dropout(nn.Module):
    """Dropout with probability `p`, on a CPU to the nearest 1/65,536."""

    def __init__(self, p: float, numbers: _Numbers | None = None) -> None:
        super().__init__()
        self.p = p
        self._numbers = numbers or _Numbers()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x, of which while training elements are zero, and the others so much larger that the mean stays."""
        if not self.training:
            return x
        if x.device.type != "cpu":
            return nn.functional.dropout(x, self.p)
        dropped_values = min(round(self.p * _VALUES), _VALUES - 1)
        is_dropped = self._numbers.draw(x.numel()).view(x.shape) < _LEAST + dropped_values
        dropped: torch.Tensor = _Drop.apply(x, is_dropped, _VALUES / (_VALUES - dropped_values))  # type: ignore[no-untyped-call]
        return dropped


class _Drop(torch.autograd.Function):
    """What is not dropped of x, times `scale`: a byte of each element is remembered, where PyTorch would have a number.

    A product with the mask would be a second copy in between.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, is_dropped: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(is_dropped)
        ctx.scale = scale
        return (x * scale).masked_fill_(is_dropped, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (is_dropped,) = ctx.saved_tensors
        return (gradient * ctx.scale).masked_fill_(is_dropped, 0), None, None
