"""What LoRA layers compute, in fewer passes over memory than PEFT takes for it.

Left to itself, PEFT copies the input of every LoRA layer to the adapter's float32, and drops of that; autocast then
rounds the copy back to what it was copied from. PyTorch's dropout on a CPU draws one random number after the other, and
multiplies by what remains. Layers that read the same input, such as those of query, key and value, each drop of it
anew, and keep what is left. And the adapter's output is written, scaled and added to the base model's in three passes;
the gradients of the two for their common input are written and added in as many.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear, LoraVariant
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

_VALUES = 2**15  # that a drawn number may have, from _LEAST on
_LEAST = -(2**14)
_Dropped = tuple[torch.Tensor, float]  # an input with elements that are zero, and the factor that keeps its mean
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of an element


def lighten_lora(model: nn.Module, *, gathers_by_module: bool = False) -> None:
    """Let the LoRA layers of a model that runs under autocast read their input as it is, drop of it as cheaply as the
    device allows, and add what they compute in the product itself.

    What is learned stays the same, but for rounding and for which elements are dropped: layers that read the same input
    drop the same of it, and a CPU draws other numbers. `gathers_by_module`: the engine brings a module's weights
    together only while that module runs, so that no other may use them.
    """
    numbers, last = _Numbers(), _Last()
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False
            for name, dropout in layer.lora_dropout.items():
                if isinstance(dropout, nn.Dropout):
                    layer.lora_dropout[name] = Dropout(dropout.p, numbers, last).train(dropout.training)
            if type(layer) is Linear and not gathers_by_module:
                for name, second in layer.lora_B.items():
                    if name not in layer.lora_variant and second.bias is None:
                        layer.lora_variant[name] = _Added()
                if type(layer.get_base_layer()) is nn.Linear:
                    layer.forward = partial(_multiply, layer, layer.forward)


class _Added(LoraVariant):  # type: ignore[misc]
    """PEFT's plain LoRA, its output scaled and added by the product that computes it while training.

    Evaluation computes what plain PEFT does, to the last bit; for a few tokens that is faster, too.
    """

    @staticmethod
    def forward(module: Linear, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any) -> torch.Tensor:
        """Return result (..., O) and what the adapter adds to it for x (..., I)."""
        dropout, first, second = (part[active_adapter] for part in (module.lora_dropout, module.lora_A, module.lora_B))
        scaling = module.scaling[active_adapter]
        if not module.training:
            evaluated: torch.Tensor = result + second(first(dropout(x))) * scaling
            return evaluated
        x, gain = dropout.drop(x) if isinstance(dropout, Dropout) else (dropout(x), 1)
        narrow = first(x).flatten(0, -2)  # (T, R)
        return torch.addmm(result.flatten(0, -2), narrow, second.weight.t(), alpha=scaling * gain).view_as(result)


def _multiply(layer: Linear, forward: Callable[..., torch.Tensor], x: torch.Tensor, **others: Any) -> torch.Tensor:
    """Return what a layer makes of x (..., I): base model and adapter in one function while training without dropout,
    where nothing else is asked for, and else by the layer's own `forward`."""
    name, base = layer.active_adapters[0], layer.get_base_layer()
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    is_trained = layer.training and not (others or layer.disable_adapters or layer.merged)
    is_plain = type(layer.lora_variant.get(name)) is _Added and isinstance(layer.lora_dropout[name], nn.Identity)
    if not (is_trained and is_plain and base.weight.dtype == dtype):
        return forward(x, **others)
    first, second = (part[name].weight.to(dtype) for part in (layer.lora_A, layer.lora_B))
    factors = x.to(dtype), base.weight, base.bias, first, second, layer.scaling[name]
    product: torch.Tensor = _Product.apply(*factors)  # type: ignore[no-untyped-call]
    return product


class _Product(torch.autograd.Function):
    """x (..., I) times a frozen weight (O, I), plus x times the adapter, (R, I) and (O, R), and its scale.

    Where two gradients meet, the second is added by the product that computes it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        first: torch.Tensor,
        second: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        flat = x.flatten(0, -2)  # (T, I)
        narrow = flat @ first.T  # (T, R)
        product = nn.functional.linear(flat, weight, bias).addmm_(narrow, second.T, alpha=scale)  # (T, O)
        ctx.save_for_backward(flat, narrow, weight, first, second)
        ctx.scale = scale
        return product.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat, narrow, weight, first, second = ctx.saved_tensors
        by_product = gradient.flatten(0, -2)  # (T, O)
        by_narrow = (by_product @ second).mul_(ctx.scale)  # (T, R)
        by_second = (by_product.T @ narrow).mul_(ctx.scale)  # (O, R)
        by_x = None
        if ctx.needs_input_grad[0]:
            by_x = (by_product @ weight).addmm_(by_narrow, first).view(*gradient.shape[:-1], -1)
        return by_x, None, None, by_narrow.T @ flat, by_second, None


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


class _Last:
    """What was left of the last input of which was dropped, for as long as somebody else keeps that input."""

    def __init__(self) -> None:
        self._found: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def take(self, x: torch.Tensor, way: tuple[float, bool], drop: Callable[[], _Dropped]) -> _Dropped:
        """Return what `drop` leaves of x, or has left of it before in the same `way`.

        What a backward pass computes again it keeps anew, even of an input that is still there.
        """
        state = way, x._version, torch._C._current_graph_task_id(), torch.is_grad_enabled()
        found = self._found.get(x)  # type: ignore[no-untyped-call]
        if found is None or found[0] != state:
            self._found.clear()
            self._found[x] = found = state, drop()
        dropped: _Dropped = found[1]
        return dropped


class Dropout(nn.Module):
    """Dropout with probability `p`, on a CPU to the nearest 1/32,768; all with the same `last` drop the same."""

    def __init__(self, p: float, numbers: _Numbers | None = None, last: _Last | None = None) -> None:
        super().__init__()
        self.p = p
        self._numbers = numbers or _Numbers()
        self._last = last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x, of which while training elements are zero, and the others so much larger that the mean stays."""
        return self.drop(x, scales=True)[0] if self.training else x

    def drop(self, x: torch.Tensor, *, scales: bool = False) -> _Dropped:
        """Return x with elements that are zero, and by how much that is still to be multiplied for the mean to stay."""
        drop = partial(self._drop, x, scales=scales)
        return drop() if self._last is None else self._last.take(x, (self.p, scales), drop)

    def _drop(self, x: torch.Tensor, *, scales: bool) -> _Dropped:
        if x.device.type != "cpu":
            return nn.functional.dropout(x, self.p), 1
        kept_values = max(_VALUES - round(self.p * _VALUES), 1)
        numbers = self._numbers.draw(x.numel()).bitwise_right_shift_(1)  # 15 bits, which leaves room for the difference
        kept = numbers.sub_(_LEAST + kept_values).bitwise_right_shift_(15).view(x.shape)  # all bits of it, or none
        dropped: torch.Tensor = _Drop.apply(x, kept)  # type: ignore[no-untyped-call]
        gain = _VALUES / kept_values
        return (dropped * gain, 1) if scales else (dropped, gain)


class _Drop(torch.autograd.Function):
    """The elements of x for which `kept` is -1, and zero where it is 0.

    A bitwise and takes far less time than a product with the mask. A byte of each element is remembered.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(kept.to(torch.int8))
        return _keep(x, kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        return _keep(gradient, kept), None


def _keep(x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    bits = _BITS[x.element_size()]
    return (x.view(bits) & kept.to(bits)).view(x.dtype)
