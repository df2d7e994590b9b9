"""What this machine and its packages can run: each answer is the reason why not, or None."""

import importlib.util
from typing import Literal

Device = Literal["cpu", "cuda"]
Engine = Literal["ddp", "zero2", "zero3", "fsdp2"]
Quantization = Literal["none", "nf4", "int8", "fp8"]
Attention = Literal["eager", "sdpa", "varlen", "flash_attention_2", "flex_attention"]

# Architectures that hand what `job.train.varlen` needs down to their attention, and ask no more of it than it has
# (gemma2 caps the scores, qwen2_moe keeps its window to the mask). Read in transformers 5.23, and compared with sdpa in
# tests/unit/test_varlen.py.
VARLEN_MODEL_TYPES = frozenset(
    {"gemma", "gemma3_text", "granite", "llama", "mistral", "mixtral", "olmo2", "phi3"}
    | {"qwen2", "qwen3", "qwen3_moe", "smollm3"}
)

_LEAST_CAPABILITY = {"nf4": (6, 0), "int8": (7, 5), "fp8": (8, 9)}


def uses_deepspeed(engine: Engine) -> bool:
    """Say whether an engine is DeepSpeed's."""
    return engine in ("zero2", "zero3")


def uses_bitsandbytes(quantization: Quantization, optimizer: str) -> bool:
    """Say whether a training computes by bitsandbytes."""
    return quantization in ("nf4", "int8") or optimizer == "paged_adamw_8bit"


def splits_weights(engine: Engine) -> bool:
    """Say whether an engine splits the model's weights among the processes, so that no process holds it whole."""
    return engine in ("zero3", "fsdp2")


def why_not_engine(engine: Engine, device: Device) -> str | None:
    """Return what a distributed engine lacks here."""
    if engine == "fsdp2" and device == "cpu":
        return "it needs a GPU: on a CPU, accelerate would run plain DDP in its place"
    return _why_not_package("deepspeed") if uses_deepspeed(engine) else None


def why_not_offload(engine: Engine) -> str | None:
    """Return why an engine can't keep the base model's weights in host memory."""
    return None if engine == "zero3" else f"{engine} keeps them on the device; zero3 can"


def why_not_split(engine: Engine, quantization: Quantization) -> str | None:
    """Return why an engine that splits the weights among the processes can't split quantised ones."""
    if engine == "zero3" and quantization != "none":
        return "ZeRO-3 splits weights while they are loaded, and quantised ones are made from whole ones"
    if engine == "fsdp2" and quantization == "int8":
        return "FSDP2 can't split bitsandbytes' int8 weights"
    if engine == "fsdp2" and quantization == "fp8":
        return "nobody has tried to split FP8 weights by FSDP2"
    return None


def why_not_dtype(engine: Engine, device: Device, dtype: str) -> str | None:
    """Return why an engine can't train in a precision."""
    # transformers takes bf16 without use_cpu for a wish for a GPU, and DeepSpeed with use_cpu is plain DDP
    if uses_deepspeed(engine) and device == "cpu" and dtype != "float32":
        return f"{engine} on a CPU trains in float32 only"
    return None


def why_not_new_rows(engine: Engine) -> str | None:
    """Return why an engine can't train single rows of embeddings."""
    # PEFT's TrainableTokensLayer reads the base weight outside of the forward pass for which an engine gathers it.
    if splits_weights(engine):
        return "the rows of new tokens can't be trained in embeddings that are split among the processes"
    return None


def why_not_paged_adamw(device: Device) -> str | None:
    """Return what paged 8-bit AdamW lacks here."""
    if device == "cpu":
        return "there is no GPU"
    return _why_not_package("bitsandbytes")


def why_not_quantization(
    quantization: Quantization, device: Device, compute_capability: tuple[int, int] | None
) -> str | None:
    """Return what a quantised base model lacks here; `compute_capability` is that of the least GPU, if known.

    Sources: the table of supported hardware in bitsandbytes' README; aten/src/ATen/native/cuda/RowwiseScaledMM.cu in
    PyTorch.
    """
    if quantization == "none":
        return None
    least = _LEAST_CAPABILITY[quantization]
    if device == "cuda" and compute_capability is not None and compute_capability < least:
        has = ".".join(map(str, compute_capability))
        return f"it needs a GPU of compute capability {'.'.join(map(str, least))}, and this one has {has}"
    return None if quantization == "fp8" else _why_not_package("bitsandbytes")


def why_not_dora(quantization: Quantization, device: Device) -> str | None:
    """Return what keeps DoRA from being trained on a base model held so."""
    if quantization == "fp8":
        return "it needs the weights themselves, and FP8 holds codes"
    if quantization == "int8" and device == "cpu":
        # peft's dequantize_module_weight moves the weight "back" to the CPU, which drops its scales
        return "peft can't train DoRA on an int8 base model on a CPU"
    return None


def why_not_attention(attention: Attention, device: Device) -> str | None:
    """Return what an attention kernel lacks here."""
    if attention == "flash_attention_2":
        return "it needs a GPU" if device == "cpu" else _why_not_package("flash_attn")
    if attention == "flex_attention" and device == "cpu":
        return "it needs a GPU"
    return None


def why_not_varlen(model_type: str, *, packing: bool) -> str | None:
    """Return why attention by document isn't for such a model or plan."""
    if not packing:
        return "it is for joined rows, and SFT_TRAIN__PACKING is false"
    return None if model_type in VARLEN_MODEL_TYPES else f"{model_type} is not known to have it"


def why_not_liger(device: Device) -> str | None:
    """Return what Liger's fused loss lacks here."""
    return "it needs a GPU" if device == "cpu" else _why_not_package("liger_kernel")


def _why_not_package(package: str) -> str | None:
    return None if _is_installed(package) else f"the package {package.replace('_', '-')} is not installed"


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
