"""Tokens that the base model has never seen: where their rows start, that they alone are trained, and that they come
back with the adapter."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from small_training import VOCABULARY, held_out_loss, load_trained, make_small_plan, save_gpt2, save_llama, train_here
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from job.errors import ConfigError
from job.handover import NewTokenInput
from job.plan import TrainPlan
from job.train.adapter import add_adapter
from job.train.vocabulary import add_new_tokens

PlanFor = Callable[..., TrainPlan]
ADDED = [NewTokenInput(id=100, piece_ids=[11, 12, 13]), NewTokenInput(id=101, piece_ids=[20])]
SPARE = [NewTokenInput(id=90, piece_ids=[11, 12, 13]), NewTokenInput(id=97, piece_ids=[20])]

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),  # peft's word on a GPT-2, which it then mends
]


@pytest.fixture
def plan(plan_for: PlanFor) -> PlanFor:
    return partial(make_small_plan, plan_for)


@pytest.fixture(params=["tied", "untied", "gpt2"])
def base_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "gpt2":
        return save_gpt2(tmp_path / "base")
    return save_llama(tmp_path / "base", tied=request.param == "tied")


def load_base(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


def matrices(base: PreTrainedModel) -> list[torch.Tensor]:
    return [base.get_input_embeddings().weight, base.get_output_embeddings().weight]


def test_a_new_token_starts_as_the_mean_of_its_pieces(base_folder: Path) -> None:
    before = [weight.detach().clone() for weight in matrices(load_base(base_folder))]
    base = load_base(base_folder)
    unknown = 102
    assert add_new_tokens(base, 103, [*ADDED, *SPARE]) == [90, 97, 100, 101, unknown]
    for old, new in zip(before, matrices(base), strict=True):
        assert new.shape == (103, 32)
        for token in [*ADDED, *SPARE]:
            assert torch.allclose(new[token.id], old[token.piece_ids].mean(dim=0), atol=1e-7)
        assert torch.allclose(new[unknown], old.mean(dim=0), atol=1e-7)
        others = [row for row in range(VOCABULARY) if row not in (90, 97)]
        assert torch.equal(new[others], old[others])


def test_pieces_are_averaged_in_float32(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(save_llama(tmp_path, tied=True), dtype="bfloat16")
    weight = base.get_input_embeddings().weight
    with torch.no_grad():
        weight[:64] = 1.0
        weight[64] = 2.0
    add_new_tokens(base, 100, [NewTokenInput(id=90, piece_ids=[*range(50), *[64] * 50])])
    assert torch.all(weight[90] == 1.5)  # a sum in bfloat16 gets stuck at 256


def test_a_vocabulary_that_fits_changes_nothing(base_folder: Path) -> None:
    base, untouched = load_base(base_folder), load_base(base_folder)
    assert add_new_tokens(base, 90, []) == []
    for name, weight in untouched.state_dict().items():
        assert torch.equal(base.state_dict()[name], weight)


@pytest.mark.parametrize("tokens", [ADDED, SPARE], ids=["added", "spare"])
def test_the_rows_of_new_tokens_are_trained_saved_and_come_back(
    plan: PlanFor, base_folder: Path, tmp_path: Path, tokens: list[NewTokenInput]
) -> None:
    the_plan, vocabulary, root = plan(), 102 if tokens is ADDED else 100, tmp_path / "run"
    result = train_here(the_plan, base_folder, root, new_tokens=tokens, vocabulary=vocabulary)
    assert result["eval_loss"] < result["eval_loss_base"]
    trained = load_trained(base_folder, root / "adapter", vocabulary=vocabulary)
    assert held_out_loss(trained, the_plan, root) == pytest.approx(result["eval_loss"], rel=1e-6)

    start = load_base(base_folder)
    ids = add_new_tokens(start, vocabulary, tokens)
    others = [row for row in range(VOCABULARY) if row not in ids]
    for before, after in zip(matrices(start), matrices(trained.merge_and_unload()), strict=True):
        assert torch.equal(before[others], after[others])
        assert bool((before[ids] != after[ids]).any(dim=1).all())
    size_bytes = (root / "adapter" / "adapter_model.safetensors").stat().st_size
    assert size_bytes < 150_000  # rows, not matrices


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "settings",
    [{"TRAIN__GRADIENT_CHECKPOINTING": "true"}, {"MODEL__DTYPE": "bfloat16"}, {"TRAIN__PACKING": "true"}],
    ids=["checkpointing", "bfloat16", "packing"],
)
def test_new_tokens_with_other_ways_to_train(
    plan: PlanFor, tmp_path: Path, tied: bool, settings: dict[str, str]
) -> None:
    the_plan = plan(**settings)
    base_folder = save_llama(tmp_path / "base", tied=tied)
    result = train_here(the_plan, base_folder, tmp_path / "run", new_tokens=ADDED, vocabulary=102)
    trained = load_trained(base_folder, tmp_path / "run" / "adapter", vocabulary=102, dtype=the_plan.dtype)
    loss = held_out_loss(trained, the_plan, tmp_path / "run")
    assert loss == pytest.approx(result["eval_loss"], rel=1e-6)
    assert loss < result["eval_loss_base"]


def test_auto_peft_model_loads_the_adapter_without_more_ado(plan: PlanFor, tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>", "<|other|>"]})
    tokens = [
        NewTokenInput(id=len(tokenizer) - 2, piece_ids=[5, 6]),
        NewTokenInput(id=len(tokenizer) - 1, piece_ids=[]),
    ]
    the_plan, root = plan(), tmp_path / "run"
    result = train_here(the_plan, tiny_model, root, new_tokens=tokens, vocabulary=len(tokenizer))
    tokenizer.save_pretrained(root / "adapter")
    trained = AutoPeftModelForCausalLM.from_pretrained(root / "adapter").eval()
    assert held_out_loss(trained, the_plan, root) == pytest.approx(result["eval_loss"], rel=1e-6)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_lora_on_a_matrix_whose_rows_are_trained_is_refused(plan: PlanFor, tmp_path: Path, target: str) -> None:
    base_folder = save_llama(tmp_path / "base", tied=True)
    the_plan = plan(LORA__TARGET_MODULES=f"q_proj,{target}")
    with pytest.raises(ConfigError, match=rf"SFT_LORA__TARGET_MODULES: .*{target} can't have LoRA"):
        train_here(the_plan, base_folder, tmp_path / "run", new_tokens=SPARE)


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_their_rows_cannot_be_trained_in_embeddings_that_are_split(plan: PlanFor, tmp_path: Path, engine: str) -> None:
    base = load_base(save_llama(tmp_path / "base", tied=True))
    split = plan().model_copy(update={"engine": engine})
    with pytest.raises(ConfigError, match=f"SFT_PARALLEL__ENGINE={engine}: the rows of new tokens") as raised:
        add_adapter(base, split, [5])
    assert "SFT_LORA__MODULES_TO_SAVE=embed_tokens" in raised.value.hint
    whole = plan(LORA__MODULES_TO_SAVE="embed_tokens").model_copy(update={"engine": engine})
    add_adapter(base, whole, [5])
