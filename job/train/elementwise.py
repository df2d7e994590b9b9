"""What layers compute element by element, fused by torch.compile on a GPU: rotary embeddings, and the product of a
gated MLP.

transformers' code takes a kernel, and a pass over memory, for every operation in them, and autograd keeps what lies
between these. What is learned stays the same, but for rounding: a compiled kernel rounds once, at its end.
"""

import inspect
import time
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from job.log import logger
from job.plan import TrainPlan
from job.train.compiling import Function, compile_tried
from job.train.stand_in import compute_by

# Compiling takes some ten seconds and saves some twentieth of a step: it is not worth it for less than this of each
# GPU, which an H100 computes in four minutes.
_LEAST_FLOPS = 1e17
_TRIED_TOKENS = 48
_PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")
_ROTATE = "apply_rotary_pos_emb"


def is_worth_compiling(plan: TrainPlan, parameters: int) -> bool:
    """Return whether a run is long enough: by 4 x parameters x tokens, of which each process has its share."""
    tokens = plan.steps * plan.global_batch_size * plan.train_tokens / plan.train_rows
    return 4 * parameters * tokens / plan.world_size >= _LEAST_FLOPS


def compile_elementwise(model: PeftModel, device: str, dtype: torch.dtype) -> list[str]:
    """Let the layers of a model that runs on a device, in a precision, rotate queries and keys, and multiply by their
    gates, in compiled functions; return what they do so.

    What doesn't compile, or comes to other numbers or gradients when it is tried here, stays as it is, with a warning;
    so does, without a word, what an architecture computes in another way. Do it when the adapter is there.
    """
    began_s = time.monotonic()
    with torch.autocast(device, dtype=dtype) if dtype != torch.float32 else nullcontext():
        generator = torch.Generator(device).manual_seed(0)  # the training's own numbers stay as they are
        draw = partial(torch.randn, device=device, dtype=dtype, generator=generator)
        done = {"rotary embeddings": _compile_rotation(model, draw), "gated MLPs": _compile_gates(model, draw)}
    names = [name for name, is_done in done.items() if is_done]
    logger.info("compiled: %s, in %.1f s", " and ".join(names) or "nothing", time.monotonic() - began_s)
    return names


def _compile_rotation(model: PeftModel, draw: Function) -> bool:
    """Compile the function that the architecture's own module has, in its place there."""
    base = model.get_base_model()
    module, config = inspect.getmodule(type(base)), base.config
    plain = getattr(module, _ROTATE, None)
    heads = getattr(config, "num_attention_heads", None)
    if plain is None or heads is None:
        return False
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    # As attention has them: heads come after the tokens in memory.
    states = [draw(1, _TRIED_TOKENS, number, size).transpose(1, 2) for number in (heads, key_heads)]
    turned = next((2 * len(part.inv_freq) for part in base.modules() if hasattr(part, "inv_freq")), size)
    angles = [draw(1, _TRIED_TOKENS, turned) for _ in ("cos", "sin")]
    compiled = compile_tried(plain, states, angles, what="rotary embeddings stay as they are")
    if compiled is not None:
        setattr(module, _ROTATE, compiled)
    return compiled is not None


def _compile_gates(model: nn.Module, draw: Function) -> bool:
    gated: list[Any] = [module for module in model.modules() if all(hasattr(module, part) for part in _PARTS)]
    plain = {kind for kind in {type(module) for module in gated} if _is_plain(kind)}
    compiled: dict[Any, Function | None] = {}
    for module in gated:
        if type(module) not in plain or any(True for _ in module.act_fn.parameters()):
            continue
        kind = type(module.act_fn)
        if kind not in compiled:
            tried = [draw(1, _TRIED_TOKENS, module.up_proj.out_features) for _ in ("gate", "up")]
            fused = partial(_multiply, module.act_fn)
            compiled[kind] = compile_tried(fused, tried, [], what="gated MLPs stay as they are")
        if (multiply := compiled[kind]) is not None:
            module.forward = partial(_run_mlp, module, multiply)
    return any(multiply is not None for multiply in compiled.values())


def _multiply(activate: Function, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = activate(gate) * up
    return product


def _run_mlp(module: Any, multiply: Function, hidden: torch.Tensor) -> torch.Tensor:
    """Return what an MLP makes of hidden (..., D)."""
    projected: torch.Tensor = module.down_proj(multiply(module.gate_proj(hidden), module.up_proj(hidden)))
    return projected


def _is_plain(kind: Any) -> bool:
    """Prove on numbers of our own that modules of a class compute what `_run_mlp` does."""
    generator = torch.Generator().manual_seed(0)
    gate, up, down = (partial(torch.matmul, other=torch.randn(8, 8, generator=generator)) for _ in _PARTS[:3])
    hidden = torch.randn(3, 8, generator=generator)
    actual = compute_by(kind, hidden, gate_proj=gate, up_proj=up, down_proj=down, act_fn=torch.tanh)
    return actual is not None and torch.equal(actual, down(torch.tanh(gate(hidden)) * up(hidden)))
