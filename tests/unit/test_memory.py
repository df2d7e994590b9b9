"""Shapes of base models out of their configurations, and what the memory estimate makes of them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from job.memory.estimate import (
    LOSS_CHUNK_TOKENS,
    MemoryEstimate,
    count_checkpointed_layers,
    estimate_memory,
    overhead_bytes,
)
from job.memory.model_shape import ModelShape, read_model_shape
from job.memory.setup import Setup, pick_setup
from job.plan import TrainPlan

GIB = 2**30
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
LLAMA_8B_PARAMETERS = 8_030_261_248
SETUP = Setup(
    device="cuda",
    dtype="bfloat16",
    quantization="none",
    engine="ddp",
    offload=False,
    nodes=1,
    processes=1,
    attn_implementation="sdpa",
    packing=True,
    max_length_tokens=1024,
    micro_batch_size=4,
    micro_batch_tokens=4096,
    gradient_checkpointing=1.0,
    loss="full",
    optimizer="adamw",
    lora_r=16,
    lora_dropout=0.05,
    lora_dora=False,
    target_modules="all-linear",
    modules_to_save=[],
)

KEPT: dict[str, Any] = {"gradient_checkpointing": 0.0}  # what autograd keeps, of all layers


@pytest.fixture
def llama_8b() -> ModelShape:
    return read_model_shape(LLAMA_8B, 2 * LLAMA_8B_PARAMETERS)


def estimate(shape: ModelShape, **changes: Any) -> MemoryEstimate:
    return estimate_memory(replace(SETUP, **changes), shape, 80 * GIB)


def test_parameters_are_counted_by_the_architecture(llama_8b: ModelShape) -> None:
    assert (llama_8b.parameters, llama_8b.is_known) == (LLAMA_8B_PARAMETERS, True)
    assert (llama_8b.head_dim, llama_8b.kv_size, llama_8b.query_size) == (128, 1024, 4096)


def test_neither_a_wrong_dtype_nor_quantised_files_mislead() -> None:
    quantized = {"quantization_config": {"quant_method": "bitsandbytes"}, "torch_dtype": "float32"}
    shape = read_model_shape(LLAMA_8B | quantized, LLAMA_8B_PARAMETERS // 2)
    assert (shape.parameters, shape.is_known) == (LLAMA_8B_PARAMETERS, True)


@pytest.mark.parametrize(
    "configuration",
    [
        {},
        {"model_type": "mamba", "hidden_size": 768, "num_hidden_layers": 24, "vocab_size": 50_000, "dtype": "float16"},
        {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50_257, "dtype": "float16"},
        {"model_type": "llava", "text_config": LLAMA_8B, "torch_dtype": "bfloat16"},
        LLAMA_8B | {"num_hidden_layers": "many"},
        LLAMA_8B | {"hidden_size": None, "num_attention_heads": True, "torch_dtype": 7},
        LLAMA_8B | {"text_config": 3, "model_type": ["llama"]},
    ],
)
def test_of_what_is_not_known_the_weights_are_counted(configuration: dict[str, object]) -> None:
    shape = read_model_shape(configuration, 2_000_000)
    assert not shape.is_known
    for changes in (
        {},
        {"quantization": "nf4"},
        {"engine": "zero3", "processes": 2},
        KEPT,
    ):
        partial = estimate(shape, **changes)
        assert partial.is_partial
        assert min(partial.parts().values()) >= 0
        assert 0 < partial.weights_bytes <= 4_000_000 * 4096


def test_sizes_of_a_nested_text_model_are_found() -> None:
    shape = read_model_shape({"model_type": "llava", "text_config": LLAMA_8B}, 2 * LLAMA_8B_PARAMETERS)
    assert (shape.model_type, shape.hidden_size, shape.layers) == ("llama", 4096, 32)


def test_the_parts_make_the_total(llama_8b: ModelShape) -> None:
    whole = estimate(llama_8b)
    assert sum(whole.parts().values()) == whole.total_bytes
    assert whole.describe().startswith("weights 15.0 GiB, adapter ")
    assert whole.describe().endswith(" of 80.0 GiB")
    assert whole.fits
    assert not whole.model_copy(update={"available_bytes": whole.total_bytes - 1}).fits


@pytest.mark.parametrize(
    ("changes", "weights_gib"),
    [
        ({}, 14.96),
        ({"dtype": "float32"}, 29.92),
        ({"quantization": "nf4"}, 5.6),  # of which embeddings and head in bfloat16 are 1.96
        ({"quantization": "int8"}, 8.8),
        ({"engine": "zero2", "processes": 4}, 14.96),
        ({"engine": "zero3", "processes": 4}, 14.96 / 4 + 1.79),  # and what is gathered at a time
        ({"engine": "fsdp2", "processes": 4, "quantization": "nf4"}, 5.3 / 4 + 1.5),
        ({"engine": "zero3", "offload": True}, 1.79),
    ],
)
def test_weights(changes: dict[str, Any], weights_gib: float, llama_8b: ModelShape) -> None:
    assert estimate(llama_8b, **changes).weights_bytes / GIB == pytest.approx(weights_gib, rel=0.03)


@pytest.mark.parametrize(
    ("changes", "trained"),
    [
        ({}, 41_943_040),  # what PEFT counts for r 16 on llama 3.1 8B
        ({"lora_r": 8}, 20_971_520),
        ({"target_modules": ["q_proj", "v_proj"]}, 6_815_744),
        ({"target_modules": ["model.layers.0.self_attn.q_proj"]}, 32 * 16 * 8192),  # one too many is better
        ({"target_modules": ["lm_head"]}, 16 * (4096 + 128_256)),
        ({"lora_dora": True}, 41_943_040 + 32 * (4096 + 1024 + 1024 + 4096 + 14_336 + 14_336 + 4096)),
        ({"modules_to_save": ["lm_head"]}, 41_943_040 + 4096 * 128_256),
        ({"modules_to_save": ["lm_head", "embed_tokens"]}, 41_943_040 + 2 * 4096 * 128_256),
        ({"new_tokens": ["<a>", "<b>"]}, 41_943_040 + 2 * 2 * 4096),
    ],
)
def test_what_is_trained(changes: dict[str, Any], trained: int, llama_8b: ModelShape) -> None:
    found = estimate(llama_8b, dtype="float32", **changes)
    assert (found.adapter_bytes, found.gradients_bytes, found.optimizer_bytes) == (
        4 * trained,
        4 * trained,
        8 * trained,
    )


def test_what_engines_and_optimizers_add_to_what_is_trained(llama_8b: ModelShape) -> None:
    alone = estimate(llama_8b)
    assert estimate(llama_8b, processes=2).gradients_bytes == 2 * alone.gradients_bytes  # DDP's buckets
    assert estimate(llama_8b, optimizer="paged_adamw_8bit").optimizer_bytes == alone.optimizer_bytes // 4
    sharded = estimate(llama_8b, engine="zero2", nodes=2, processes=4)
    assert sharded.optimizer_bytes == alone.optimizer_bytes * 12 // 8 // 8
    assert sharded.gradients_bytes < 2 * alone.gradients_bytes


@pytest.mark.parametrize(
    ("smaller", "larger"),
    [
        ({}, KEPT),
        ({}, {"micro_batch_tokens": 4097}),
        ({"gradient_checkpointing": 31 / 32}, {"gradient_checkpointing": 30 / 32}),
        ({"gradient_checkpointing": 1 / 32}, KEPT),
        (
            {"attn_implementation": "flash_attention_2", "gradient_checkpointing": 0.0},
            KEPT,
        ),
        ({"packing": False, "gradient_checkpointing": 0.0}, KEPT),
        ({"loss": "chunked"}, {}),
        (KEPT | {"lora_dropout": 0}, KEPT),
        (KEPT, KEPT | {"lora_dora": True}),
        (KEPT, KEPT | {"attn_implementation": "eager"}),
        (KEPT, KEPT | {"quantization": "int8"}),
        ({"dtype": "bfloat16"}, {"dtype": "float32"}),
    ],
)
def test_what_needs_more_activations(smaller: dict[str, Any], larger: dict[str, Any], llama_8b: ModelShape) -> None:
    def size(changes: dict[str, Any]) -> int:
        found = estimate(llama_8b, **changes)
        return found.activations_bytes + found.logits_bytes

    assert size(smaller) < size(larger)


def test_the_last_layers_activations_are_kept(llama_8b: ModelShape) -> None:
    def size(layers: int) -> int:
        return estimate(llama_8b, loss="chunked", gradient_checkpointing=layers / 32).activations_bytes

    inputs = 4096 * 4096 * 2  # of one layer, in bytes: all that is kept of one that is computed again
    saved = size(0) - size(1)
    assert saved > 10 * inputs
    assert [size(layers) for layers in range(32)] == [size(0) - layers * saved for layers in range(32)]
    assert size(32) > size(31) - saved  # one layer is there all the same, when it is computed again


def test_a_share_of_the_layers_is_never_too_few() -> None:
    for layers in (1, 7, 28, 30, 32, 80):
        counts = [count_checkpointed_layers(number / layers, layers) for number in range(layers + 1)]
        assert counts == [*range(layers + 1)]
    assert (count_checkpointed_layers(0.5, 7), count_checkpointed_layers(0.01, 32)) == (4, 1)


def test_norms_in_one_kernel_keep_no_copy_of_their_input(llama_8b: ModelShape) -> None:
    def keeps(**changes: Any) -> int:
        return estimate(replace(llama_8b, **changes), **KEPT).activations_bytes

    copies = 32 * 4096 * 2 * 4096 * 2  # layers, tokens, norms, hidden size, bytes
    assert keeps(model_type="gemma") - keeps() == copies
    on_cpu = {"device": "cpu", "attn_implementation": "eager"}
    others = estimate(replace(llama_8b, model_type="gemma"), **KEPT, **on_cpu)
    assert estimate(llama_8b, **KEPT, **on_cpu) == others


def test_logits_by_loss(llama_8b: ModelShape) -> None:
    tokens, vocabulary, hidden = 4 * 1024, 128_256, 4096
    assert estimate(llama_8b).logits_bytes == tokens * (12 * vocabulary + 4 * hidden)
    chunked = estimate(llama_8b, loss="chunked").logits_bytes
    assert chunked == LOSS_CHUNK_TOKENS * 10 * vocabulary + tokens * 4 * hidden
    assert estimate(llama_8b, loss="liger").logits_bytes < chunked
    assert estimate(llama_8b, loss="chunked", micro_batch_tokens=8192).logits_bytes - chunked == tokens * 4 * hidden


def test_a_process_needs_something_before_any_model() -> None:
    assert overhead_bytes("cuda", 2) > overhead_bytes("cuda", 1) > 0
    assert overhead_bytes("cpu", 2) == overhead_bytes("cpu", 1) > 0


def test_a_plan_holds_its_setup(plan_for: Callable[..., TrainPlan], small_shape: ModelShape) -> None:
    plan = plan_for(TRAIN__MICRO_BATCH_SIZE=2, LORA__R=8)
    setup = pick_setup(plan.model_dump())
    assert (setup.micro_batch_size, setup.lora_r, setup.world_size) == (2, 8, 1)
    assert estimate_memory(setup, small_shape, plan.memory.available_bytes) == plan.memory
