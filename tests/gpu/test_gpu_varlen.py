"""Attention by document on a GPU: PyTorch's kernel gives what each row gets alone, and nothing waits for the GPU."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from job.train.chunked_loss import MarkSupervised, chunk_loss
from job.train.dataset import Row, move_batch
from job.train.lora import lighten_lora
from job.train.model import measure_difference
from job.train.norms import fuse_norms
from job.train.varlen import JoinRows

LENGTHS = (40, 300, 1, 129)
SIZES: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ROUNDING = 3e-2  # relative, of logits in bfloat16


def make_models(attention: str) -> list[PreTrainedModel]:
    torch.manual_seed(0)
    models = [
        LlamaForCausalLM(LlamaConfig(**SIZES)),
        MistralForCausalLM(MistralConfig(**SIZES, sliding_window=64)),
    ]
    for model in models:
        model.to("cuda", torch.bfloat16)
        model.set_attn_implementation(attention)
        model.config.use_cache = False
    return models


def make_rows() -> list[Row]:
    torch.manual_seed(1)
    rows = [torch.randint(0, 1000, (length,)) for length in LENGTHS]
    return [{"input_ids": row, "labels": row} for row in rows]


@pytest.fixture
def errors_at_synchronisation() -> Iterator[Any]:
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def test_each_row_gets_what_it_gets_alone() -> None:
    batch = move_batch(JoinRows("varlen")(make_rows()), "cuda")
    del batch["labels"]
    for model, usual in zip(make_models("varlen"), make_models("sdpa"), strict=True):
        with torch.no_grad():
            joined = model(**batch).logits[0].float()
            alone = [usual(input_ids=row["input_ids"][None].cuda()).logits[0].float() for row in make_rows()]
        assert measure_difference(joined, torch.cat(alone)) < ROUNDING


@pytest.mark.parametrize("loss", ["full", "chunked"])
def test_a_micro_batch_never_waits_for_the_gpu(loss: str, errors_at_synchronisation: Any) -> None:
    collate = JoinRows("varlen")
    batch = move_batch((MarkSupervised(collate) if loss == "chunked" else collate)(make_rows()), "cuda")
    tokens = torch.tensor(sum(LENGTHS), device="cuda")
    base = make_models("varlen")[0]
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    lighten_lora(model)
    fuse_norms(model)
    if loss == "chunked":
        chunk_loss(model)

    def learn() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            found = model(**batch, num_items_in_batch=tokens).loss
        found.backward()

    learn()  # what is set up once may wait
    torch.cuda.synchronize()
    errors_at_synchronisation()
    learn()
