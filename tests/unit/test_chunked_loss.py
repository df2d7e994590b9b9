"""The loss in chunks is the full loss, with the same gradients, for every head that PEFT makes; and what is no plain
head is refused."""

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import job.train.chunked_loss
from job.errors import ConfigError
from job.plan import TrainPlan
from job.train.adapter import add_adapter
from job.train.chunked_loss import MarkSupervised, check_loss_can_be_chunked, chunk_loss
from job.train.dataset import IGNORED, Collate, PadRows, Row, join_rows
from job.train.liger import check_liger_serves
from job.train.loss import find_losses

PlanFor = Callable[..., TrainPlan]
VOCABULARY = 60
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),  # peft's word on a GPT-2, which it then mends
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job.train.chunked_loss, "LOSS_CHUNK_TOKENS", 4)


def llama(*, tied: bool) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=tied, **SIZES))


def gpt2() -> PreTrainedModel:
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    config.bos_token_id = config.eos_token_id = 0
    return GPT2LMHeadModel(config)


def phi() -> PreTrainedModel:
    """A model whose head has a bias."""
    base = PhiForCausalLM(PhiConfig(**SIZES))
    torch.nn.init.normal_(base.lm_head.bias)
    return base


HEADS: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, str], list[int]]] = {
    "frozen": (lambda: llama(tied=False), {}, []),
    "frozen, tied": (lambda: llama(tied=True), {}, []),
    "gpt2": (gpt2, {"LORA__TARGET_MODULES": "c_attn"}, []),
    "bias": (phi, {}, []),
    "bias, trained whole": (phi, {"LORA__MODULES_TO_SAVE": "lm_head"}, []),
    "lora": (lambda: llama(tied=False), {"LORA__TARGET_MODULES": "q_proj,lm_head"}, []),
    "nothing else": (lambda: llama(tied=False), {"LORA__TARGET_MODULES": "lm_head"}, []),
    "trained whole": (lambda: llama(tied=False), {"LORA__MODULES_TO_SAVE": "lm_head"}, []),
    "trained whole, tied": (lambda: llama(tied=True), {"LORA__MODULES_TO_SAVE": "embed_tokens,lm_head"}, []),
    "rows": (lambda: llama(tied=False), {}, [7, 50]),
    "rows, tied": (lambda: llama(tied=True), {}, [7, 50]),
}


def make_model(plan_for: PlanFor, head: str = "frozen", **settings: object) -> tuple[PeftModel, TrainPlan]:
    """Return an adapter whose B is not zero, without dropout, on a small base; the same one every time."""
    make, lora, token_ids = HEADS[head]
    torch.manual_seed(0)
    plan = plan_for(**({"MODEL__DTYPE": "float32", "LORA__DROPOUT": 0} | lora | settings))
    model = add_adapter(make(), plan, token_ids)
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.2)
    return model.train(), plan


def make_rows() -> list[Row]:
    """Three rows: one with a few supervised tokens, one with none, and one with all."""
    torch.manual_seed(1)
    rows = [
        {"input_ids": torch.randint(3, VOCABULARY, (size,)), "labels": torch.full((size,), -100)} for size in (9, 5, 13)
    ]
    rows[2]["input_ids"][3:5] = torch.tensor([7, 50])  # those that are trained by row
    rows[0]["labels"][4:] = rows[0]["input_ids"][4:]
    rows[2]["labels"][:] = rows[2]["input_ids"]
    return rows  # type: ignore[return-value]


def run(model: PeftModel, batch: dict[str, torch.Tensor], tokens: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return loss and gradients."""
    model.zero_grad()
    loss = model(**batch, num_items_in_batch=torch.tensor(tokens)).loss
    loss.backward()
    trained = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    assert all(gradient is not None for gradient in trained.values())
    return loss.detach(), trained  # type: ignore[return-value]


@pytest.mark.parametrize("joined", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("head", HEADS)
def test_loss_and_gradients_are_those_of_the_full_way(plan_for: PlanFor, head: str, joined: bool) -> None:
    batch = (join_rows if joined else PadRows(0))(make_rows())
    losses, gradients = [], []
    for is_chunked in (False, True):
        model, _ = make_model(plan_for, head)
        model.config.use_cache = False
        if is_chunked:
            chunk_loss(model)
        loss, trained = run(model, batch, 40)
        losses.append(loss)
        gradients.append(trained)
    assert torch.allclose(*losses, rtol=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for name, full in gradients[0].items():
        assert full.abs().max() > 0, name
        assert torch.allclose(gradients[1][name], full, rtol=1e-4, atol=1e-5 * full.abs().max().item()), name


@pytest.mark.parametrize("collate", [join_rows, PadRows(0)], ids=["packed", "padded"])
def test_marked_batches_come_to_the_same_without_being_counted(
    plan_for: PlanFor, collate: Collate, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plan = make_model(plan_for, TRAIN__LOSS="chunked")
    chunk_loss(model)
    plain, marked = collate(make_rows()), MarkSupervised(collate)(make_rows())
    labels = plain["labels"]
    assert [labels.flatten()[place + 1].item() for place in marked["supervised"]] == labels[labels != IGNORED].tolist()
    expected = run(model, plain, 40), find_losses(model, {"input_ids": plain["input_ids"]}, labels, plan)
    monkeypatch.setattr(job.train.chunked_loss, "find_supervised", None)
    given = {name: marked[name] for name in ("input_ids", "supervised")}
    (loss, trained), by_token = run(model, marked, 40), find_losses(model, given, labels, plan)
    assert torch.equal(loss, expected[0][0])
    assert all(torch.equal(gradient, expected[0][1][name]) for name, gradient in trained.items())
    assert torch.equal(by_token, expected[1])


@pytest.mark.parametrize("head", ["frozen", "lora", "trained whole, tied", "rows, tied"])
def test_a_micro_batch_without_supervised_tokens_gives_every_weight_a_gradient_of_zero(
    plan_for: PlanFor, head: str
) -> None:
    model, _ = make_model(plan_for, head)
    chunk_loss(model)
    loss, trained = run(model, PadRows(0)([make_rows()[1]]), 40)
    assert loss == 0
    assert all((gradient == 0).all() for gradient in trained.values())


def test_no_more_logits_than_a_chunk_has_exist_at_a_time(plan_for: PlanFor) -> None:
    model, _ = make_model(plan_for)
    chunk_loss(model)
    seen: list[tuple[int, ...]] = []
    model.get_base_model().lm_head.register_forward_hook(lambda head, inputs, logits: seen.append(tuple(logits.shape)))
    run(model, PadRows(0)(make_rows()), 40)
    assert sum(tokens for tokens, _ in seen) == 5 + 12  # supervised tokens; the first of a row is never predicted
    assert all(1 <= tokens <= 4 and size == VOCABULARY for tokens, size in seen)


def test_with_gradient_checkpointing_and_autocast(plan_for: PlanFor) -> None:
    batch = PadRows(0)(make_rows())
    found = []
    for is_chunked in (False, True):
        model, _ = make_model(plan_for, "trained whole")
        model.get_base_model().to(torch.bfloat16)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if is_chunked:
            chunk_loss(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(run(model, batch, 17))
    (full_loss, full), (loss, trained) = found
    assert torch.allclose(loss, full_loss, rtol=1e-3)
    for name, gradient in trained.items():
        assert gradient.dtype == torch.float32
        assert (gradient - full[name]).norm() < 0.03 * full[name].norm(), name


def test_the_mean_where_nobody_counts_and_plain_logits_without_labels(plan_for: PlanFor) -> None:
    full, _ = make_model(plan_for)
    model, _ = make_model(plan_for)
    chunk_loss(model)
    batch = PadRows(0)(make_rows())
    assert torch.allclose(model(**batch).loss, full(**batch).loss, rtol=1e-5)
    labels = batch.pop("labels")
    assert torch.equal(model(**batch).logits, full(**batch).logits)
    assert labels.shape == batch["input_ids"].shape


def test_the_held_out_loss_is_the_same(plan_for: PlanFor) -> None:
    batch = PadRows(0)(make_rows())
    labels = batch.pop("labels")
    losses = []
    for way in ("full", "chunked"):
        model, plan = make_model(plan_for, TRAIN__LOSS=way)
        if way == "chunked":
            chunk_loss(model)
        losses.append(find_losses(model, batch, labels, plan))
    assert torch.allclose(*losses, rtol=1e-4, atol=1e-5)
    assert torch.equal(losses[1] != 0, labels != IGNORED)


def test_the_trainer_still_divides_by_the_tokens_of_the_whole_batch(plan_for: PlanFor, tmp_path: Any) -> None:
    model, _ = make_model(plan_for)
    chunk_loss(model)
    trainer = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, bf16=False, report_to="none"))
    assert trainer.model_accepts_loss_kwargs


def capped() -> PreTrainedModel:
    return Gemma2ForCausalLM(Gemma2Config(head_dim=8, **SIZES))


def scaled() -> PreTrainedModel:
    return GraniteForCausalLM(GraniteConfig(logits_scaling=8.0, **SIZES))


def multiplied() -> PreTrainedModel:
    return CohereForCausalLM(CohereConfig(logit_scale=0.0625, **SIZES))


def routed(*, with_loss: bool) -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(num_local_experts=4, output_router_logits=with_loss, **SIZES))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (capped, "its logits are more than its head's output"),
        (scaled, "its logits are more than its head's output"),
        (multiplied, "its logits are more than its head's output"),
        (lambda: routed(with_loss=True), "its loss is more than the cross entropy"),
    ],
    ids=["gemma2", "granite", "cohere", "mixtral"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_more_than_a_head_is_refused(
    plan_for: PlanFor, make: Callable[[], PreTrainedModel], reason: str, dtype: str
) -> None:
    plan = plan_for(LORA__TARGET_MODULES="q_proj", MODEL__DTYPE=dtype)
    model = add_adapter(make().to(getattr(torch, dtype)), plan, [])
    chunk_loss(model)
    with pytest.raises(ConfigError, match=f"SFT_TRAIN__LOSS=chunked.*{reason}") as refusal:
        check_loss_can_be_chunked(model, plan, make_rows()[2])
    assert refusal.value.hint == "set SFT_TRAIN__LOSS=full"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head", HEADS)
def test_a_plain_head_is_accepted(plan_for: PlanFor, head: str, dtype: str) -> None:
    make, lora, token_ids = HEADS[head]
    torch.manual_seed(0)
    plan = plan_for(MODEL__DTYPE=dtype, **lora)
    model = add_adapter(make().to(getattr(torch, dtype)), plan, token_ids)
    chunk_loss(model)
    check_loss_can_be_chunked(model, plan, make_rows()[2])
    assert model.training


def test_experts_without_a_loss_of_their_own_are_accepted(plan_for: PlanFor) -> None:
    plan = plan_for(LORA__TARGET_MODULES="q_proj", MODEL__DTYPE="float32")
    model = add_adapter(routed(with_loss=False), plan, [])
    chunk_loss(model)
    check_loss_can_be_chunked(model, plan, make_rows()[2])


def test_liger_is_refused_where_it_would_compute_another_loss(
    plan_for: PlanFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = SimpleNamespace(MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": None})  # the package needs a GPU to be imported
    for name in ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.monkey_patch"):
        monkeypatch.setitem(sys.modules, name, known)
    for head in ("frozen", "frozen, tied", "trained whole", "trained whole, tied"):
        check_liger_serves(make_model(plan_for, head)[0])
    for head in ("lora", "rows", "rows, tied"):
        with pytest.raises(ConfigError, match="SFT_TRAIN__LOSS=liger: Liger would leave out"):
            check_liger_serves(make_model(plan_for, head)[0])
    with pytest.raises(ConfigError, match="SFT_TRAIN__LOSS=liger: Liger has no loss for phi"):
        check_liger_serves(make_model(plan_for, "bias")[0])


def test_liger_needs_a_gpu_and_its_package(plan_for: PlanFor) -> None:
    with pytest.raises(ConfigError, match="SFT_TRAIN__LOSS=liger: it needs a GPU"):
        plan_for(TRAIN__LOSS="liger")
    with pytest.raises(ConfigError, match="SFT_TRAIN__LOSS=liger: the package liger-kernel is not installed"):
        plan_for({"gpus": 1}, TRAIN__LOSS="liger")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows_of_slice", [1, 3, 64])
def test_losses_and_gradients_are_autograds(
    dtype: torch.dtype, rows_of_slice: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses to the last bit, the gradients to the seventh place, however many rows are looked at together."""
    torch.manual_seed(0)
    logits = (20 * torch.randn(10, VOCABULARY)).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (10,))
    expected = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    expected.sum().backward()
    monkeypatch.setattr(job.train.chunked_loss, "_SLICE_BYTES", rows_of_slice * VOCABULARY * 4)
    found = logits.detach().clone()
    assert torch.equal(job.train.chunked_loss._lose(found, targets), expected)
    assert torch.equal(found, logits)
    assert torch.equal(job.train.chunked_loss._lose(found, targets, differentiate=True), expected)
    assert logits.grad is not None
    torch.testing.assert_close(found, logits.grad, rtol=0, atol=1e-7)
