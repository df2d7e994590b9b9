"""The base model in 4 or 8 bits, by bitsandbytes or in FP8: linear layers but the head; embeddings, norms and head
stay."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from job.errors import ConfigError
from job.plan import TrainPlan
from job.train.fp8 import Fp8Linear, hold_in_fp8, without_rounding


def is_stored_quantized(folder: Path) -> bool:
    """Say whether the weights in a model's folder are quantised already."""
    return bool(json.loads((folder / "config.json").read_bytes()).get("quantization_config"))


def quantization_options(plan: TrainPlan, *, is_stored_so: bool) -> dict[str, object]:
    """Return what `from_pretrained` must be given to hold the model as planned on this process's own device."""
    if plan.quantization in ("none", "fp8"):  # FP8 is made of what was loaded
        return {}
    device = "cpu" if plan.device == "cpu" else torch.cuda.current_device()
    options: dict[str, object] = {"device_map": {"": device}}
    if not is_stored_so:  # else transformers takes it from the model's configuration
        options["quantization_config"] = _make_config(plan)
    return options


def _make_config(plan: TrainPlan) -> BitsAndBytesConfig:
    if plan.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    dtype = getattr(torch, plan.dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,  # FSDP shards parameters of one dtype together
    )


def make_trainable(base: PreTrainedModel, plan: TrainPlan) -> None:
    """Put FP8 in place; have 4-bit layers compute in the planned precision, and pass gradients on wherever they are.

    On a CPU with AVX512-BF16, bitsandbytes repacks a layer's weights at the first evaluation for a kernel that has no
    backward pass; trained afterwards, no gradient comes through it, with no error (0.50, nn/modules.py).
    """
    if plan.quantization == "fp8":
        hold_in_fp8(base, head=base.get_output_embeddings())
    if plan.quantization != "nf4":
        return
    from bitsandbytes.nn import Linear4bit

    for module in base.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype = getattr(torch, plan.dtype)


@contextmanager
def comparably(model: nn.Module, plan: TrainPlan) -> Iterator[None]:
    """Have a row's logits depend on that row alone, but for the last bits, while this lasts: FP8 layers take
    activations as they are, and 8-bit layers round every activation by its own row.

    LLM.int8 takes columns with a large value in any row of the batch out of the rounding. So a row's logits depend on
    its neighbours, though attention keeps them apart: by 7 to 10 % in SmolLM2-135M, and not at all without this.
    """
    if plan.quantization != "int8":
        with without_rounding(model):
            yield
        return
    from bitsandbytes.nn import Linear8bitLt

    states = [module.state for module in model.modules() if isinstance(module, Linear8bitLt)]
    thresholds = [state.threshold for state in states]
    for state in states:
        state.threshold = 0.0
    try:
        yield
    finally:
        for state, threshold in zip(states, thresholds, strict=True):
            state.threshold = threshold


def check_can_be_saved_whole(name: str, module: nn.Module, plan: TrainPlan) -> None:
    """Raise ConfigError for a module to save that has quantised weights: its numbers are codes, not weights."""
    if plan.quantization == "fp8":
        is_coded = any(isinstance(part, Fp8Linear) for part in module.modules())
    else:
        from bitsandbytes.nn import Int8Params, Params4bit

        is_coded = any(isinstance(weight, Int8Params | Params4bit) for weight in module.parameters())
    if is_coded:
        raise ConfigError(
            f"SFT_LORA__MODULES_TO_SAVE: {name} is quantised, so it can't be trained whole",
            hint="give it LoRA by SFT_LORA__TARGET_MODULES, or set SFT_QUANTIZATION=none",
        )
