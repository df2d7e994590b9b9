"""The merged model: it is the adapter on the base model in one piece, whatever the adapter consists of, or it isn't
published."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from small_training import held_out_loss, load_trained, make_small_plan, save_gpt2, save_llama, train_here
from transformers import AutoModelForCausalLM

from job.errors import InternalError, ResourcesError
from job.handover import NewTokenInput, RunFolder, WorkerInputs
from job.merge import check_room
from job.plan import TrainPlan
from job.train.merge_model import merge_model

PlanFor = Callable[..., TrainPlan]
ADDED = [NewTokenInput(id=100, piece_ids=[11, 12, 13]), NewTokenInput(id=101, piece_ids=[20])]

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),  # peft's word on a GPT-2, which it then mends
]


@pytest.fixture
def plan(plan_for: PlanFor) -> PlanFor:
    return partial(make_small_plan, plan_for)


def merge_here(plan: TrainPlan, base: Path, root: Path, *, new_tokens: list[NewTokenInput]) -> Path:
    """Merge what `train_here` trained, and return the folder."""
    inputs = WorkerInputs(
        model_folder=base,
        train_tokens=root / "tokens.arrow",
        train_names=["rows.jsonl"],
        eval_tokens=None,
        eval_names=["rows.jsonl"],
        pad_token_id=0,
        vocabulary_size=100 + len(new_tokens),
        new_tokens=new_tokens,
        log_format="text",
        log_level="info",
    )
    merge_model(plan, inputs, RunFolder(root))
    return RunFolder(root).merged


def read_dtypes(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - not a dict


@pytest.mark.parametrize(
    ("settings", "tied", "new_tokens"),
    [
        ({"LORA__RSLORA": "true"}, True, []),
        ({"LORA__DORA": "true"}, False, ADDED),
        ({"LORA__MODULES_TO_SAVE": "embed_tokens,lm_head"}, True, ADDED),
        ({"LORA__MODULES_TO_SAVE": "lm_head"}, False, []),
        ({"QUANTIZATION": "nf4", "LORA__DORA": "true", "LORA__RSLORA": "true"}, True, ADDED),
        ({"QUANTIZATION": "int8", "TRAIN__PACKING": "true"}, False, ADDED),
    ],
    ids=str,
)
def test_it_is_what_the_adapter_is(
    plan: PlanFor, tmp_path: Path, settings: dict[str, str], tied: bool, new_tokens: list[NewTokenInput]
) -> None:
    the_plan, root, base = plan(**settings), tmp_path / "run", save_llama(tmp_path / "base", tied=tied)
    vocabulary = 100 + len(new_tokens)
    result = train_here(the_plan, base, root, new_tokens=new_tokens, vocabulary=vocabulary)
    merged_folder = merge_here(the_plan, base, root, new_tokens=new_tokens)
    merged = AutoModelForCausalLM.from_pretrained(merged_folder)
    adapted = load_trained(base, root / "adapter", vocabulary=vocabulary)
    ids = torch.arange(vocabulary)[None]
    assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-4)
    embeddings, head = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
    assert (embeddings is head) == merged.config.tie_word_embeddings == tied
    assert embeddings.shape == (vocabulary, 32)
    configuration = json.loads((merged_folder / "config.json").read_text())
    assert configuration["vocab_size"] == vocabulary
    assert configuration["use_cache"]
    assert not configuration.keys() & {"quantization_config", "peft_type", "_name_or_path"}
    assert {path.name for path in merged_folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    measured = RunFolder(root).read_result()
    merged.config.use_cache = False
    assert measured["eval_loss_merged"] == pytest.approx(held_out_loss(merged, the_plan, root), rel=1e-5)
    assert measured["eval_loss_merged"] < result["eval_loss_base"]
    assert measured["merged_logits_difference"] < 1e-5 < measured["base_logits_difference"]
    assert measured.items() >= result.items()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_keeps_the_precision_of_the_base_model(plan: PlanFor, tmp_path: Path, dtype: torch.dtype) -> None:
    the_plan, root = plan(LORA__MODULES_TO_SAVE="embed_tokens"), tmp_path / "run"
    base = save_llama(tmp_path / "base", tied=False, dtype=dtype)
    train_here(the_plan, base, root)
    merged = merge_here(the_plan, base, root, new_tokens=[])
    assert read_dtypes(merged) == read_dtypes(base) == {"BF16" if dtype == torch.bfloat16 else "F16"}
    assert json.loads((merged / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_generation_settings_stay_as_they_are(plan: PlanFor, tmp_path: Path) -> None:
    the_plan, root, base = plan(), tmp_path / "run", save_gpt2(tmp_path / "base")
    contradictory = '{"do_sample": false, "temperature": 0.7, "eos_token_id": 3}'  # refused by save_pretrained
    (base / "generation_config.json").write_text(contradictory)
    train_here(the_plan, base, root)
    assert (merge_here(the_plan, base, root, new_tokens=[]) / "generation_config.json").read_text() == contradictory


def test_a_merged_model_that_is_not_the_adapter_is_refused(
    plan: PlanFor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import Linear

    the_plan, root, base = plan(), tmp_path / "run", save_llama(tmp_path / "base", tied=True)
    train_here(the_plan, base, root)
    whole = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, adapter: 0.5 * whole(self, adapter))
    with pytest.raises(InternalError, match=r"the merged model's logits differ from the adapter's by \d"):
        merge_here(the_plan, base, root, new_tokens=[])
    assert "eval_loss_merged" not in RunFolder(root).read_result()


def test_an_adapter_too_weak_to_be_seen_is_warned_of(
    plan: PlanFor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    the_plan, root = plan(TRAIN__LEARNING_RATE=1e-6), tmp_path / "run"
    base = save_llama(tmp_path / "base", tied=True)
    train_here(the_plan, base, root)
    merge_here(the_plan, base, root, new_tokens=[])
    assert "is not proved" in caplog.text


def test_a_disk_that_is_too_small_is_found_before(tmp_path: Path) -> None:
    check_room(tmp_path, 1000)
    with pytest.raises(ResourcesError, match=r"needs .* TiB of disk, and .* are free") as raised:
        check_room(tmp_path, 10**18)
    assert "SFT_RUNTIME__WORK_DIR" in raised.value.hint
