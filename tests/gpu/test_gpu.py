"""The job on real GPUs, through its command line; `make test-gpu` runs these where there is one."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from bare_model import save_bare_model
from gpu_training import read_slot, train, try_to_train


def test_every_gpu_is_used_in_the_best_precision_it_has(small_model: Path, tmp_path: Path) -> None:
    manifest = train(tmp_path / "run", small_model, PARALLEL__PROCESSES="auto")
    plan = manifest["plan"]
    assert plan["device"] == "cuda"
    assert plan["processes"] == torch.cuda.device_count() == len(manifest["hardware"]["gpus"])
    assert plan["dtype"] == ("bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16")
    assert manifest["metrics"]["eval_loss"] < manifest["metrics"]["eval_loss_base"]


def test_a_gpu_learns_what_a_cpu_learns(small_model: Path, tmp_path: Path) -> None:
    on_gpu = train(tmp_path / "gpu", small_model, MODEL__DTYPE="float32")
    on_cpu = train(tmp_path / "cpu", small_model, on_gpu=False, MODEL__DTYPE="float32")
    assert on_cpu["plan"]["device"] == "cpu"
    assert on_gpu["losses"] == pytest.approx(on_cpu["losses"], rel=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_joined_rows_learn_what_padded_rows_learn(small_model: Path, tmp_path: Path, dtype: str) -> None:
    joined = train(tmp_path / "joined", small_model, MODEL__DTYPE=dtype, TRAIN__PACKING="true")
    padded = train(tmp_path / "padded", small_model, MODEL__DTYPE=dtype, TRAIN__PACKING="false")
    assert joined["losses"] == pytest.approx(padded["losses"], rel=1e-2)


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_learn_on_a_gpu_what_they_learn_on_a_cpu(tmp_path: Path, tied: bool) -> None:
    model = save_bare_model(tmp_path / "model", tied=tied)
    settings = {"MODEL__CHAT_TEMPLATE": "chatml", "MODEL__DTYPE": "float32"}
    on_gpu = train(tmp_path / "gpu", model, **settings)
    on_cpu = train(tmp_path / "cpu", model, on_gpu=False, **settings)
    assert on_gpu["plan"]["new_tokens"] == ["<|im_start|>", "<|im_end|>"]
    assert on_gpu["losses"] == pytest.approx(on_cpu["losses"], rel=1e-3)


def test_the_paged_optimizer_learns_what_the_plain_one_learns(
    small_model: Path, slot_of_plain_run: Path, tmp_path: Path
) -> None:
    paged = train(tmp_path / "paged", small_model, TRAIN__OPTIMIZER="paged_adamw_8bit")
    assert paged["plan"]["optimizer"] == "paged_adamw_8bit"
    assert paged["losses"] == pytest.approx(read_slot(slot_of_plain_run)["losses"], rel=3e-2)


def test_more_processes_than_gpus_are_refused(small_model: Path, tmp_path: Path) -> None:
    processes = torch.cuda.device_count() + 1
    ended = try_to_train(tmp_path / "run", small_model, PARALLEL__PROCESSES=processes)
    assert ended.code == 78, ended.output
    assert f"SFT_PARALLEL__PROCESSES={processes}: only" in ended.output


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_learns_nearly_what_the_plain_one_learns(
    small_model: Path, slot_of_plain_run: Path, tmp_path: Path, quantization: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    quantised = train(tmp_path / quantization, small_model, QUANTIZATION=quantization)
    assert quantised["plan"]["quantization"] == quantization
    assert quantised["losses"] == pytest.approx(read_slot(slot_of_plain_run)["losses"], rel=5e-2)
    assert quantised["metrics"]["eval_loss"] < quantised["metrics"]["eval_loss_base"]
    base = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.bfloat16)
    PeftModel.from_pretrained(base, tmp_path / quantization / "slot")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("zero2", {"PARALLEL__ENGINE": "zero2"}),
        ("zero3", {"PARALLEL__ENGINE": "zero3"}),
        ("zero3 with offload", {"PARALLEL__ENGINE": "zero3", "PARALLEL__OFFLOAD": "true"}),
        ("fsdp2", {"PARALLEL__ENGINE": "fsdp2"}),
        ("checkpointing on", {"TRAIN__GRADIENT_CHECKPOINTING": "true"}),
        ("checkpointing of half the layers", {"TRAIN__GRADIENT_CHECKPOINTING": 0.5}),
        ("all logits at once", {"TRAIN__LOSS": "full"}),
        ("smaller micro batches", {"TRAIN__MICRO_BATCH_SIZE": 2}),
    ],
)
def test_one_loss_trajectory_by_every_engine(
    small_model: Path, slot_of_plain_run: Path, tmp_path: Path, name: str, settings: dict[str, object]
) -> None:
    plain = read_slot(slot_of_plain_run)
    other = train(tmp_path / "run", small_model, **settings)
    assert other["plan"]["engine"] == settings.get("PARALLEL__ENGINE", "ddp")
    assert other["losses"] == pytest.approx(plain["losses"], rel=2e-2), name  # bfloat16
    assert other["metrics"]["eval_loss"] == pytest.approx(plain["metrics"]["eval_loss"], rel=2e-2)


def test_fsdp2_holds_a_4_bit_base(small_model: Path, slot_of_plain_run: Path, tmp_path: Path) -> None:
    sharded = train(tmp_path / "run", small_model, PARALLEL__ENGINE="fsdp2", QUANTIZATION="nf4")
    assert sharded["losses"] == pytest.approx(read_slot(slot_of_plain_run)["losses"], rel=5e-2)


@pytest.mark.parametrize("attention", ["flash_attention_2", "varlen", "sdpa", "flex_attention", "eager"])
def test_every_attention_kernel_keeps_joined_rows_apart(
    small_model: Path, slot_of_plain_run: Path, tmp_path: Path, attention: str
) -> None:
    if attention == "flash_attention_2" and find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed: flash attention was NOT tried")
    other = train(tmp_path / "run", small_model, MODEL__ATTN_IMPLEMENTATION=attention, TRAIN__PACKING="true")
    assert other["plan"]["attn_implementation"] == attention
    assert other["losses"] == pytest.approx(read_slot(slot_of_plain_run)["losses"], rel=2e-2)


def test_ligers_loss_is_the_plain_loss(small_model: Path, slot_of_plain_run: Path, tmp_path: Path) -> None:
    if find_spec("liger_kernel") is None:
        pytest.skip("liger-kernel is not installed: Liger's loss was NOT tried")
    other = train(tmp_path / "run", small_model, TRAIN__LOSS="liger")
    assert other["losses"] == pytest.approx(read_slot(slot_of_plain_run)["losses"], rel=2e-2)


def test_a_merged_model_is_published(small_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    manifest = train(tmp_path / "run", small_model, OUTPUT__MERGE="true", QUANTIZATION="nf4")
    assert any(file["path"].startswith("merged/") for file in manifest["files"])
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "slot" / "merged")
