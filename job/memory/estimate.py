"""How much memory one training process needs, part by part: arithmetic on plain numbers.

Of the machine it looks at nothing but the build of PyTorch that is installed. The counts are those of what PyTorch's
autograd keeps for transformers' llama-like decoders under PEFT, read from their sources and compared with the measured
peaks of real runs (tests/unit/test_memory_peaks.py). All sizes are in bytes, for the process that needs the most; the
micro batch that counts is the largest, of `micro_batch_tokens`.
"""

import math
from collections.abc import Iterator
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from job.log import format_bytes
from job.memory.model_shape import ModelShape
from job.memory.setup import Setup
from job.support import Device

# Supervised tokens whose logits exist at a time under SFT_TRAIN__LOSS=chunked.
LOSS_CHUNK_TOKENS = 1024
# Documents of up to so many tokens are attended by plain products on a CPU in 16 bits.
SHORT_TOKENS = 128

_ROUNDING = 1e-6  # of a number of layers, as a share of floating point
_MIB = 2**20
_FLOAT32 = 4
_BYTES_OF_QUANTIZED = {
    "nf4": 0.5 + 1 / 64 + 4 / (64 * 256),  # four bits, an 8-bit scale for 64 of them, a float32 for 256 scales
    "int8": 1.0,  # and a float32 a row
    "fp8": 1.0,  # likewise
}
# What a process holds before any weight: on a CPU, Python with torch, transformers and PEFT; on a GPU, CUDA's context
# with its kernels (not measured by us: 0.5 to 0.6 GiB is what NVML shows for an H100) and cuBLAS's workspace.
_OVERHEAD_BYTES = {"cpu": 560 * _MIB, "cuda": 640 * _MIB}
# More of PyTorch's libraries, on a CPU where they are of the build for GPUs: of 2.15's; of 2.11's it was 310 MiB.
_CUDA_BUILD_BYTES = 390 * _MIB
_NCCL_BYTES = 256 * _MIB
# glibc's heap keeps pages between what is alive: shares of what autograd keeps of all layers without checkpointing, and
# layers' worth, as measured on a CPU; the larger counts. Recomputed layers leave it most: with checkpointing,
# SmolLM2-135M took 3.4 GiB, and 1.7 GiB when every freed block went back at once. On a GPU a margin stands for it.
_FRAGMENTS_OF_KEPT_LAYERS, _FRAGMENTS_OF_CHECKPOINTED_LAYERS = 0.45, 0.75
_FRAGMENTS_IN_LAYERS = 3.0
# Logits of one position while the loss is computed: the log-probabilities, their gradient and that of the logits, all
# float32 (transformers' ForCausalLMLoss upcasts); in 16 bits the forward pass has as much at its worst moment.
_LOGIT_COPIES = 3


class MemoryEstimate(BaseModel):
    """What one process needs at its peak, in bytes, and what there is for it (`available_bytes` of a GPU or the host).

    `is_partial`: the architecture isn't known, so that activations are a guess.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights_bytes: int
    adapter_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    logits_bytes: int
    fragments_bytes: int
    overhead_bytes: int
    total_bytes: int
    available_bytes: int
    is_partial: bool

    @property
    def fits(self) -> bool:
        """Say whether there is enough."""
        return self.total_bytes <= self.available_bytes

    def parts(self) -> dict[str, int]:
        """Return the bytes of each part by its name for people."""
        return {
            name.removesuffix("_bytes"): size
            for name, size in self.model_dump().items()
            if name.endswith("_bytes") and name not in ("total_bytes", "available_bytes")
        }

    def describe(self) -> str:
        """Return the estimate as one line: `weights 12.1 GiB, ..., logits 3.2 GiB: 21.3 GiB of 15.0 GiB`."""
        parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in self.parts().items())
        return f"{parts}: {format_bytes(self.total_bytes)} of {format_bytes(self.available_bytes)}"


def estimate_memory(setup: Setup, shape: ModelShape, available_bytes: int) -> MemoryEstimate:
    """Return what a process needs of the memory that there is for it."""
    trainable = sum(_trainable_parameters(setup, shape))
    kept, working = _activations(setup, shape)
    logits = _logits(setup, shape)
    # The logits are gone when the gradient arrives at a layer, which then needs room of its own.
    activations = kept + max(0, working - logits)
    shards = setup.world_size if setup.engine in ("zero2", "zero3", "fsdp2") else 1
    weights = _weights(setup, shape)
    parts = {
        "weights_bytes": weights,
        "adapter_bytes": trainable * _adapter_itemsize(setup),
        "gradients_bytes": _gradients(setup, trainable),
        "optimizer_bytes": trainable * _optimizer_itemsize(setup) // shards,
        "activations_bytes": activations,
        "logits_bytes": logits,
        "fragments_bytes": _fragments(setup, shape),
        "overhead_bytes": overhead_bytes(setup.device, setup.world_size),
    }
    return MemoryEstimate(
        **parts, total_bytes=sum(parts.values()), available_bytes=available_bytes, is_partial=not shape.is_known
    )


def count_checkpointed_layers(share: float, layers: int) -> int:
    """Return how many of a model's layers a share of them is, at least that much."""
    return math.ceil(share * layers - _ROUNDING)


def overhead_bytes(device: Device, world_size: int) -> int:
    """Return what a process holds that isn't of the model: programs, CUDA's context, buffers of the communication."""
    communication = _NCCL_BYTES if device == "cuda" and world_size > 1 else 0
    idle = _CUDA_BUILD_BYTES if device == "cpu" and _is_built_for_gpus() else 0
    return _OVERHEAD_BYTES[device] + communication + idle


@cache
def _is_built_for_gpus() -> bool:
    """Say whether the PyTorch that is installed, which nobody has imported yet, brings CUDA's libraries."""
    return Path(str(distribution("torch").locate_file("torch/lib/libtorch_cuda.so"))).exists()


def _weights(setup: Setup, shape: ModelShape) -> int:
    """The frozen base model: linear modules but the head in the quantised form, all else in the plan's precision."""
    linear = shape.layers * shape.layer_parameters() if shape.hidden_size else 0
    linear = min(linear, shape.parameters)
    if setup.quantization == "none":
        quantized, largest = float(linear * setup.itemsize), 0
    else:
        quantized = linear * _BYTES_OF_QUANTIZED[setup.quantization]
        matrices = shape.linears().values() if shape.layers else []
        largest = max((inputs * outputs for inputs, outputs in matrices), default=0) * _dequantized_itemsize(setup)
    whole = int(quantized) + (shape.parameters - linear) * setup.itemsize
    if setup.engine not in ("zero3", "fsdp2"):
        return whole + largest
    # Two layers are gathered at a time, one of them ahead, and the embeddings or the head.
    gathered = 2 * int(quantized) // max(1, shape.layers) + shape.vocabulary_size * shape.hidden_size * setup.itemsize
    kept = 0 if setup.offload and setup.device == "cuda" else whole // setup.world_size
    return min(whole, kept + gathered) + largest


def _dequantized_itemsize(setup: Setup) -> int:
    """Bytes of a number of the one matrix that is multiplied with: dequantised, as float32 at first, or transposed."""
    if setup.quantization == "fp8":
        return 1 if setup.device == "cuda" else 1 + _FLOAT32
    return setup.itemsize + _FLOAT32


def _trainable_parameters(setup: Setup, shape: ModelShape) -> Iterator[int]:
    """Yield what is trained: LoRA's and DoRA's parameters, modules trained whole, rows of new tokens."""
    head = {"lm_head": (shape.hidden_size, shape.vocabulary_size)}
    for name, (inputs, outputs) in (shape.linears() | head).items():
        if not _is_targeted(setup, name):
            continue
        copies = 1 if name == "lm_head" else shape.layers
        yield copies * (setup.lora_r * (inputs + outputs) + (outputs if setup.lora_dora else 0))
    embeddings = {"embed_tokens", "lm_head", "wte"} & _leaves(setup.modules_to_save)
    matrix = shape.vocabulary_size * shape.hidden_size
    if embeddings:
        yield matrix if shape.is_tied else matrix * len(embeddings)
    for name in _leaves(setup.modules_to_save) & shape.linears().keys():
        inputs, outputs = shape.linears()[name]
        yield shape.layers * inputs * outputs
    yield len(setup.new_tokens) * shape.hidden_size * (1 if shape.is_tied else 2)


def _leaves(names: list[str]) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name in names}


def _is_targeted(setup: Setup, name: str) -> bool:
    if isinstance(setup.target_modules, str):  # all-linear leaves the head out
        return name != "lm_head" and name not in _leaves(setup.modules_to_save)
    return name in _leaves(setup.target_modules)


def _adapter_itemsize(setup: Setup) -> int:
    """Whatever is trained is float32; autocast keeps a copy in 16 bits beside it until the step is done."""
    return _FLOAT32 if setup.dtype == "float32" else _FLOAT32 + setup.itemsize


def _gradients(setup: Setup, trainable: int) -> int:
    if setup.world_size == 1:
        return trainable * _FLOAT32
    if setup.engine == "ddp":
        return 2 * trainable * _FLOAT32  # DDP's buckets hold them a second time
    return trainable * _FLOAT32 + trainable * _FLOAT32 // setup.world_size  # a bucket on the way to its shard


def _optimizer_itemsize(setup: Setup) -> int:
    """AdamW's two moments; DeepSpeed keeps a flat float32 copy of what it trains, too."""
    moments = 2 if setup.optimizer == "paged_adamw_8bit" else 2 * _FLOAT32
    return moments + (_FLOAT32 if setup.engine in ("zero2", "zero3") else 0)


def _activations(setup: Setup, shape: ModelShape) -> tuple[int, int]:
    """Return what is kept from the forward pass to the backward pass, and what one layer needs for its backward pass
    beside that."""
    layer, gradients = _layer(setup, shape)
    final = setup.micro_batch_tokens * shape.hidden_size * _FLOAT32  # the last norm's input
    inputs = setup.micro_batch_tokens * shape.hidden_size * setup.itemsize
    checkpointed = count_checkpointed_layers(setup.gradient_checkpointing, shape.layers)
    kept = final + checkpointed * inputs + (shape.layers - checkpointed) * layer
    # The first layers are computed again, when what was kept of the others is gone.
    return kept, gradients if checkpointed < shape.layers else layer + gradients


def _layer(setup: Setup, shape: ModelShape) -> tuple[int, int]:
    """Return what autograd keeps of one layer, and the gradients in and behind its widest part."""
    kept = int(setup.micro_batch_tokens * _layer_bytes_of_token(setup, shape))
    gradients = setup.micro_batch_tokens * (3 * shape.intermediate_size + 2 * shape.hidden_size) * _FLOAT32
    if setup.lora_dora:  # the weight with the adapter in it, and its norm
        gradients += 2 * _FLOAT32 * max(inputs * outputs for inputs, outputs in shape.linears().values())
    return kept, gradients


def _fragments(setup: Setup, shape: ModelShape) -> int:
    if setup.device == "cuda":
        return 0
    layer, gradients = _layer(setup, shape)
    checkpointed = count_checkpointed_layers(setup.gradient_checkpointing, shape.layers)
    of_all = _FRAGMENTS_OF_CHECKPOINTED_LAYERS * checkpointed * layer
    of_all += _FRAGMENTS_OF_KEPT_LAYERS * (shape.layers - checkpointed) * layer
    return int(max(of_all, _FRAGMENTS_IN_LAYERS * (layer + gradients)))


def _layer_bytes_of_token(setup: Setup, shape: ModelShape) -> float:
    """Return what autograd keeps of one layer for a token: the inputs of norms, attention, gate and LoRA."""
    norms = shape.norms_per_layer * shape.hidden_size
    norms += shape.query_size + shape.kv_size if shape.has_qk_norms else 0
    # A norm that a GPU computes in one kernel keeps the residual stream itself, others a copy of it in float32.
    norms *= setup.itemsize if setup.device == "cuda" and shape.has_plain_norms else _FLOAT32
    gate = 3 * shape.intermediate_size * setup.itemsize  # before and behind the activation function, and what it gates
    return norms + _attention_bytes_of_token(setup, shape) + gate + _adapter_bytes_of_token(setup, shape)


def _attention_bytes_of_token(setup: Setup, shape: ModelShape) -> float:
    # Rows that are joined or padded need a mask, with which keys and values are repeated for each head. Every layer
    # keeps a mask of its own: PyTorch turns it from booleans into numbers there.
    is_masked = setup.micro_batch_size > 1
    attended = setup.micro_batch_tokens if setup.packing else setup.max_length_tokens
    itemsize = setup.itemsize
    if setup.attn_implementation == "eager":
        probabilities = _FLOAT32 if itemsize == _FLOAT32 else _FLOAT32 + itemsize
        return 4 * shape.query_size * itemsize + shape.heads * attended * probabilities
    if setup.attn_implementation == "sdpa" and is_masked:
        return (4 * shape.query_size + attended) * itemsize + shape.heads * _FLOAT32
    fused = 2 * (shape.query_size + shape.kv_size) * itemsize + shape.heads * _FLOAT32
    if setup.attn_implementation != "varlen" or setup.device != "cpu" or itemsize == _FLOAT32:
        return fused
    # Queries, keys and values for each head, and the probabilities, all in float32; and what comes out.
    length = min(setup.max_length_tokens, SHORT_TOKENS)
    plain = (3 * shape.query_size + shape.heads * length) * _FLOAT32 + shape.query_size * itemsize
    return max(fused, plain * length / setup.max_length_tokens)


def _adapter_bytes_of_token(setup: Setup, shape: ModelShape) -> float:
    """Return what LoRA keeps: A's output, its input behind dropout, and dropout's mask in bytes; modules with the same
    input share these two."""
    kept, read, adapted = 0.0, dict[int, int](), dict[int, int]()
    for name, (inputs, outputs) in shape.linears().items():
        if setup.quantization == "int8":
            read[_input_of(name)] = inputs  # bitsandbytes keeps it, too
        if not _is_targeted(setup, name):
            continue
        kept += setup.lora_r * setup.itemsize
        if setup.lora_dora:
            kept += 2 * outputs * _FLOAT32  # the base module's result and LoRA's, for the gradient of the magnitude
        adapted[_input_of(name)] = inputs
    if setup.lora_dropout == 0:
        return kept + sum((read | adapted).values()) * setup.itemsize
    return kept + sum(read.values()) * setup.itemsize + sum(adapted.values()) * (setup.itemsize + 1)


def _input_of(name: str) -> int:
    """Say which of a layer's four inputs a linear module has: of attention, of its output, of the gate, of the way
    down."""
    return {"o_proj": 1, "gate_proj": 2, "up_proj": 2, "gate_up_proj": 2, "down_proj": 3}.get(name, 0)


def _logits(setup: Setup, shape: ModelShape) -> int:
    """Return what the loss needs for the logits and their gradient."""
    hidden_gradient = setup.micro_batch_tokens * shape.hidden_size * _FLOAT32
    tokens = setup.micro_batch_tokens
    if setup.loss == "chunked":
        # A GPU makes float32 of them all at once, and then the logarithms; a CPU does so with a few rows at a time.
        bytes_of_logit = setup.itemsize + (2 * _FLOAT32 if setup.device == "cuda" else 0)
        return bytes_of_logit * min(tokens, LOSS_CHUNK_TOKENS) * shape.vocabulary_size + hidden_gradient
    if setup.loss == "liger":  # so many tokens at a time that a chunk of logits is about as large as the hidden states
        tokens = min(tokens, 2 * tokens * shape.hidden_size // max(1, shape.vocabulary_size) + 1)
    return _LOGIT_COPIES * _FLOAT32 * tokens * shape.vocabulary_size + hidden_gradient
