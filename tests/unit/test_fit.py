"""What is left open is chosen by whether it fits, what is given is kept, and each choice says why."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from test_memory import LLAMA_8B, LLAMA_8B_PARAMETERS

from job import support
from job.errors import ConfigError
from job.hardware import Hardware
from job.memory import fit
from job.memory.estimate import MemoryEstimate
from job.memory.model_shape import read_model_shape
from job.plan import TrainPlan

PlanFor = Callable[..., TrainPlan]
GIB = 2**30
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}


@pytest.fixture
def plan_8b(plan_for: PlanFor) -> PlanFor:
    shape = read_model_shape(LLAMA_8B, 2 * LLAMA_8B_PARAMETERS)

    def make(gpus: int, gpu_gib: float, length: int = 1024, **settings: object) -> TrainPlan:
        data = {"shape": shape, "max_length_tokens": length}
        return plan_for({"gpus": gpus, "gpu_gib": gpu_gib}, data, **settings)

    return make


@pytest.fixture
def plan_70b(plan_for: PlanFor) -> PlanFor:
    shape = read_model_shape(LLAMA_70B, 141_107_412_992)
    assert shape.parameters == 70_553_706_496

    def make(gpus: int, gpu_gib: float, **settings: object) -> TrainPlan:
        return plan_for({"gpus": gpus, "gpu_gib": gpu_gib}, {"shape": shape, "max_length_tokens": 1024}, **settings)

    return make


def choices(plan: TrainPlan) -> tuple[Any, ...]:
    return plan.engine, plan.offload, plan.micro_batch_size, plan.gradient_checkpointing, plan.loss


def test_what_fits_is_left_fast(plan_for: PlanFor) -> None:
    for hardware in ({}, {"gpus": 1}, {"gpus": 2}):
        plan = plan_for(hardware)
        assert choices(plan) == ("ddp", False, 8 // plan.processes, 0, "chunked")
        assert plan.memory.fits
        room = "of 57.1 GiB for each process" if plan.device == "cpu" else "of 75.2 GiB on each GPU"
        for name in ("engine", "offload", "gradient_checkpointing"):
            assert plan.sources[name].startswith("auto: ")
            assert plan.sources[name].endswith(room)
        assert plan.sources["loss"] == "auto: the logits of 1,024 supervised tokens at a time"
        assert plan.warnings == []


def test_a_gpu_of_80_gib_trains_8b(plan_8b: PlanFor) -> None:
    plan = plan_8b(1, 80)
    assert choices(plan) == ("ddp", False, 4, 0, "chunked")
    assert plan_8b(1, 80, TRAIN__LOSS="full").loss == "full"


def test_no_more_layers_are_checkpointed_than_the_memory_asks_for(plan_8b: PlanFor) -> None:
    shares = []
    settings: dict[str, object] = {"TRAIN__MICRO_BATCH_SIZE": 4, "PARALLEL__OFFLOAD": "false"}
    for gib in (*range(80, 20, -4), 21):
        plan = plan_8b(1, gib, **settings)
        assert plan.memory.fits
        shares.append(plan.gradient_checkpointing)
        if share := plan.gradient_checkpointing:
            assert plan.sources["gradient_checkpointing"].startswith("auto: none would need ")
            assert plan.sources["gradient_checkpointing"].endswith(" on each GPU")
            fewer = plan_8b(1, gib, **settings, TRAIN__GRADIENT_CHECKPOINTING=share - 1 / 8)
            assert not fewer.memory.fits
    assert shares == sorted(shares)
    assert len(set(shares)) > 4
    assert (shares[0], shares[-1]) == (0, 1)


@pytest.mark.parametrize(("setting", "share"), [("true", 1), ("false", 0), (0.5, 0.5), (1, 1), (0, 0)])
def test_a_share_of_the_layers_can_be_asked_for(setting: object, share: float, plan_8b: PlanFor) -> None:
    plan = plan_8b(1, 40, TRAIN__GRADIENT_CHECKPOINTING=setting)
    assert plan.gradient_checkpointing == share
    assert plan.sources["gradient_checkpointing"] == "SFT_TRAIN__GRADIENT_CHECKPOINTING"
    with pytest.raises(ConfigError, match=r"SFT_TRAIN__GRADIENT_CHECKPOINTING=1\.5"):
        plan_8b(1, 40, TRAIN__GRADIENT_CHECKPOINTING=1.5)


def test_a_smaller_micro_batch_is_preferred_to_computing_layers_twice(plan_for: PlanFor) -> None:
    shape = read_model_shape(LLAMA_8B, 2 * LLAMA_8B_PARAMETERS)
    data = {"shape": shape, "max_length_tokens": 1024, "train_rows": 100, "train_tokens": 90_000}
    plan = plan_for({"gpus": 1, "gpu_gib": 40}, data)
    assert (plan.micro_batch_size, plan.gradient_checkpointing) == (2, 0)
    assert plan.sources["micro_batch_size"].startswith("auto: 4 would need ")
    # Rows so short that reading the weights for each two of them would take longer than computing layers twice.
    short = plan_for({"gpus": 1, "gpu_gib": 40}, data | {"train_tokens": 10_000})
    assert short.micro_batch_size == 4
    assert 0 < short.gradient_checkpointing < 1


def test_an_engine_that_gathers_weights_gathers_the_head_once(plan_70b: PlanFor) -> None:
    plan = plan_70b(8, 80)
    assert (plan.engine, plan.loss) == ("zero3", "full")
    assert plan.sources["loss"] == "auto: zero3 would gather the head for each chunk"


def test_micro_batches_are_as_large_as_the_rows_allow(plan_for: PlanFor) -> None:
    lengths = np.full(100, 100)
    lengths[7] = 2000
    data = {"max_length_tokens": 2000, "row_tokens": lengths, "train_tokens": int(lengths.sum())}
    plan = plan_for({}, data)
    assert (plan.micro_batch_size, plan.micro_batch_tokens) == (8, 2700)
    assert plan.sources["micro_batch_tokens"] == "the largest micro batch of the run"
    padded = plan_for({}, data, TRAIN__PACKING="false")
    assert (padded.micro_batch_size, padded.micro_batch_tokens) == (2, 4000)
    assert padded.sources["micro_batch_tokens"] == "micro batch x max_length"
    assert plan.memory.total_bytes < padded.memory.total_bytes


def test_a_head_that_is_not_plain_is_never_chunked(plan_for: PlanFor) -> None:
    shape = read_model_shape(LLAMA_8B | {"model_type": "granite"}, 2 * LLAMA_8B_PARAMETERS)
    plan = plan_for({"gpus": 1, "gpu_gib": 24}, {"shape": shape, "max_length_tokens": 2048, "model_type": "granite"})
    assert plan.loss == "full"
    assert plan.sources["loss"] == "auto: the head of granite is not known to be all that makes its logits"
    assert plan.micro_batch_size == 1


def test_a_smaller_micro_batch_where_checkpointing_is_not_enough(plan_8b: PlanFor) -> None:
    plan = plan_8b(1, 24, 2048, TRAIN__LOSS="full")
    assert (plan.micro_batch_size, plan.gradient_accumulation_steps, plan.global_batch_size) == (1, 8, 8)
    assert plan.sources["micro_batch_size"].startswith("auto: 2 would need ")
    given = plan_8b(1, 24, 2048, TRAIN__LOSS="full", TRAIN__MICRO_BATCH_SIZE=2, PARALLEL__OFFLOAD="false")
    assert given.micro_batch_size == 2
    assert "training may run out of memory" in given.warnings[-1]


def test_weights_that_do_not_fit_are_split(plan_70b: PlanFor) -> None:
    plan = plan_70b(8, 80)
    assert (plan.engine, plan.offload) == ("zero3", False)
    assert plan.sources["engine"].startswith("auto: ddp would need ")
    assert plan.memory.fits
    assert plan_70b(8, 80, PARALLEL__ENGINE="fsdp2").engine == "fsdp2"


def test_4_bit_weights_are_split_by_fsdp(plan_70b: PlanFor) -> None:
    assert plan_70b(8, 24, QUANTIZATION="nf4").engine == "fsdp2"
    assert plan_70b(1, 80, QUANTIZATION="nf4").engine == "ddp"


def test_8_bit_weights_are_split_by_nothing(plan_70b: PlanFor) -> None:
    plan = plan_70b(8, 24, QUANTIZATION="int8")
    assert plan.engine in ("ddp", "zero2")
    assert "training may run out of memory, by the estimate: weights 6" in plan.warnings[-1]


def test_a_model_too_large_for_one_gpu_is_offloaded_with_a_warning(plan_70b: PlanFor) -> None:
    plan = plan_70b(1, 80)
    assert (plan.engine, plan.offload) == ("zero3", True)
    assert plan.sources["offload"].startswith("auto: false would need ")
    assert plan.warnings[-1].startswith("the base model's weights are kept in host memory")
    kept = plan_70b(1, 80, PARALLEL__OFFLOAD="false")
    assert (kept.engine, kept.offload) == ("ddp", False)
    assert "SFT_QUANTIZATION=nf4 (with ddp: " in kept.warnings[-1]


def test_offload_that_is_asked_for(plan_8b: PlanFor) -> None:
    plan = plan_8b(1, 80, PARALLEL__OFFLOAD="true")
    assert (plan.engine, plan.offload) == ("zero3", True)
    assert plan.sources["offload"] == "SFT_PARALLEL__OFFLOAD"


def test_embeddings_with_new_rows_are_split_by_nothing(plan_for: PlanFor) -> None:
    shape = read_model_shape(LLAMA_8B, 2 * LLAMA_8B_PARAMETERS)
    data = {"shape": shape, "new_tokens": ["<|im_start|>"], "max_length_tokens": 2048}
    many = {"gpus": 8, "gpu_gib": 16}
    assert plan_for(many, data | {"new_tokens": []}).engine == "zero3"
    assert plan_for(many, data).engine in ("ddp", "zero2")
    for setting in ({"PARALLEL__ENGINE": "zero3"}, {"PARALLEL__ENGINE": "fsdp2"}, {"PARALLEL__OFFLOAD": "true"}):
        with pytest.raises(ConfigError, match="the rows of new tokens can't be trained in embeddings that are split"):
            plan_for(many, data, **setting)
        plan_for(many, data, **setting, LORA__MODULES_TO_SAVE="embed_tokens,lm_head")


@pytest.mark.parametrize("stored", ["nf4", "int8"])
def test_weights_that_are_stored_quantised_are_not_split(plan_for: PlanFor, stored: str) -> None:
    data = {"stored_quantization": stored}
    with pytest.raises(ConfigError, match="SFT_PARALLEL__ENGINE=zero3: ZeRO-3 splits weights while they are loaded"):
        plan_for({"gpus": 2}, data, PARALLEL__ENGINE="zero3")
    with pytest.raises(ConfigError, match="SFT_PARALLEL__OFFLOAD=true: ZeRO-3 splits"):
        plan_for({"gpus": 2}, data, PARALLEL__OFFLOAD="true")


def test_a_cpu_in_bfloat16_is_not_left_to_deepspeed(plan_for: PlanFor) -> None:
    short = {"host_gib": 8, "bf16": "AMX"}
    shape = read_model_shape(LLAMA_8B, 2 * LLAMA_8B_PARAMETERS)
    assert plan_for(short, {"shape": shape}, PARALLEL__PROCESSES=2).engine == "ddp"
    split = plan_for(short, {"shape": shape}, PARALLEL__PROCESSES=2, MODEL__DTYPE="float32")
    assert split.engine == "zero3"


def test_without_deepspeed_nothing_is_split(plan_70b: PlanFor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "_is_installed", lambda package: False)
    plan = plan_70b(8, 80)
    assert (plan.engine, plan.offload) == ("fsdp2", False)
    assert plan_70b(1, 80).engine == "ddp"


def test_states_of_modules_trained_whole_are_split_by_zero2(plan_8b: PlanFor) -> None:
    plan = plan_8b(8, 40, LORA__MODULES_TO_SAVE="embed_tokens,lm_head", TRAIN__LOSS="chunked")
    assert plan.engine == "zero2"


def test_of_an_unknown_architecture_a_gpu_checkpoints(plan_for: PlanFor) -> None:
    data = {"model_type": "mamba", "shape": read_model_shape({"model_type": "mamba"}, 10**9)}
    plan = plan_for({"gpus": 1}, data)
    assert plan.gradient_checkpointing
    assert plan.sources["gradient_checkpointing"] == "auto: what mamba needs is not known"
    assert plan.memory.is_partial
    assert not plan_for({}, data).gradient_checkpointing


def test_a_host_is_shared_by_its_processes(machine: Callable[..., Hardware]) -> None:
    whole = fit.available_bytes(machine(host_gib=64), 1)
    assert 50 * GIB < whole < 60 * GIB
    assert fit.available_bytes(machine(host_gib=64), 4) == whole // 4
    assert fit.available_bytes(machine(host_gib=0.2), 1) == 0
    assert fit.available_bytes(machine(gpus=4, gpu_gib=80), 4) == int(80 * GIB * 0.94)


@pytest.mark.parametrize(
    ("installed", "hardware", "dtype", "attention", "reason"),
    [
        (True, {"gpus": 1}, "auto", "flash_attention_2", "it is installed"),
        (True, {"gpus": 1}, "float16", "flash_attention_2", "it is installed"),
        (True, {"gpus": 1}, "float32", "varlen", "it has no float32"),
        (True, {"gpus": 1, "capability": (7, 5)}, "auto", "varlen", "PyTorch's own"),
        (False, {"gpus": 1}, "auto", "varlen", "the package flash-attn is not installed"),
        (True, {}, "auto", "varlen", "PyTorch's own"),
    ],
)
def test_attention(
    installed: bool,
    hardware: dict[str, Any],
    dtype: str,
    attention: str,
    reason: str,
    plan_for: PlanFor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(support, "_is_installed", lambda package: installed)
    plan = plan_for(hardware, MODEL__DTYPE=dtype)
    assert plan.attn_implementation == attention
    assert reason in plan.sources["attn_implementation"]
    assert plan_for(hardware, MODEL__ATTN_IMPLEMENTATION="eager").attn_implementation == "eager"


@pytest.mark.parametrize(
    ("data", "settings", "lacking"),
    [
        ({}, {"TRAIN__PACKING": "false"}, "it is for joined rows"),
        ({"model_type": "gemma2"}, {"TRAIN__PACKING": "true"}, "gemma2 is not known to have it"),
    ],
)
def test_attention_by_document_is_for_joined_rows_of_models_that_have_it(
    data: dict[str, Any], settings: dict[str, str], lacking: str, plan_for: PlanFor
) -> None:
    assert plan_for({}, data, **settings).attn_implementation == "sdpa"
    with pytest.raises(ConfigError, match=f"SFT_MODEL__ATTN_IMPLEMENTATION=varlen: {lacking}"):
        plan_for({}, data, MODEL__ATTN_IMPLEMENTATION="varlen", **settings)


def test_a_kernel_that_a_model_may_lack_is_not_chosen(plan_for: PlanFor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "_is_installed", lambda package: True)
    data = {"model_type": "mpt", "shape": read_model_shape({"model_type": "mpt"}, 10**9)}
    plan = plan_for({"gpus": 1}, data)
    assert (plan.attn_implementation, plan_for({"gpus": 1}).attn_implementation) == ("sdpa", "flash_attention_2")
    assert plan.sources["attn_implementation"].endswith("mpt is not known to have it")


def test_nothing_of_it_changes_the_batch(plan_for: PlanFor) -> None:
    shape = read_model_shape(LLAMA_8B, 2 * LLAMA_8B_PARAMETERS)
    for gib in (8, 16, 24, 40, 80):
        plan = plan_for({"gpus": 2, "gpu_gib": gib}, {"shape": shape}, TRAIN__GLOBAL_BATCH_SIZE=24)
        assert isinstance(plan.memory, MemoryEstimate)
        assert plan.global_batch_size == 24 == plan.micro_batch_size * plan.gradient_accumulation_steps * 2
        assert plan.memory.available_bytes == int(gib * GIB * 0.94)
