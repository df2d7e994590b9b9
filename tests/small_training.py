"""Small models with a vocabulary of 100, and training of them in this process, to look at every weight afterwards."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pyarrow as pa
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from job.handover import NewTokenInput, RunFolder, SampleInputs, StopRequest, WorkerInputs
from job.plan import TrainPlan
from job.train.dataset import PadRows, TokenRows, join_rows
from job.train.evaluate import evaluate_loss
from job.train.heartbeat import Pulse
from job.train.run import train

VOCABULARY = 100
ROWS = 24  # 16 to train on, 8 held out


def save_llama(folder: Path, *, tied: bool, dtype: torch.dtype = torch.float32, layers: int = 2) -> Path:
    """Save a random llama with its head tied to its embeddings, or not."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, tie_word_embeddings=tied, **sizes)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


def save_gpt2(folder: Path) -> Path:
    """Save a random GPT-2, whose embeddings are called wte and are tied to lm_head."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0)
    config.eos_token_id = 0
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def make_small_plan(plan_for: Callable[..., TrainPlan], **settings: object) -> TrainPlan:
    """Return a plan for `ROWS` rows on one core, in float32 and padded but for what `settings` say."""
    defaults = {
        "MODEL__DTYPE": "float32",
        "TRAIN__PACKING": "false",
        "TRAIN__GLOBAL_BATCH_SIZE": 4,
        "TRAIN__MAX_STEPS": 6,
        "TRAIN__LEARNING_RATE": 1e-2,
    }
    return plan_for(hardware={"cores": 1}, data={"train_rows": 16, "eval_rows": 8}, **(defaults | settings))


def train_here(
    plan: TrainPlan,
    model: Path,
    root: Path,
    *,
    new_tokens: Sequence[NewTokenInput] = (),
    vocabulary: int = VOCABULARY,
    resume: Path | None = None,
    stop: StopRequest | None = None,
    samples: SampleInputs | None = None,
) -> dict[str, Any]:
    """Train on random rows in which new tokens occur, and return the result; the adapter is in root/adapter.

    `resume` is a checkpoint to go on from, `stop` what is asked for from the beginning. With `samples`, answers are in
    the evaluation, as ids separated by blanks.
    """
    folder = RunFolder(root)
    folder.adapter.mkdir(parents=True)
    if resume is not None:
        shutil.copytree(resume, folder.resume)
    if stop is not None:
        folder.stop_request.write_text(stop.model_dump_json())
    if samples is not None:
        folder.samples.write_text(samples.model_dump_json())
        save_tokenizer(folder.tokenizer, vocabulary)
    write_rows(root / "tokens.arrow", [token.id for token in new_tokens])
    segments = np.column_stack([np.arange(ROWS), np.zeros(ROWS), np.full(ROWS, 12)]).astype(np.int64)
    np.save(folder.train_rows, segments[: plan.train_rows])
    np.save(folder.eval_rows, segments[plan.train_rows :])
    inputs = WorkerInputs(
        model_folder=model,
        train_tokens=root / "tokens.arrow",
        train_names=["rows.jsonl"],
        eval_tokens=None,
        eval_names=["rows.jsonl"],
        pad_token_id=0,
        vocabulary_size=vocabulary,
        new_tokens=list(new_tokens),
        log_format="text",
        log_level="info",
    )
    # What accelerate set up for the training before, its precision above all, would stay as it is.
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    train(plan, inputs, folder, rank=0, remember_step=lambda _: None, pulse=Pulse(folder, rank=0))
    return folder.read_result()


def save_tokenizer(path: Path, vocabulary: int) -> None:
    """Save a tokenizer whose tokens are the numbers of their ids."""
    words = Tokenizer(models.WordLevel({str(index): index for index in range(vocabulary)}, unk_token="0"))
    words.save(str(path))


def write_rows(path: Path, new_ids: Sequence[int]) -> None:
    """Write rows of 12 random tokens, all supervised; each begins and ends with the new ones."""
    generator = np.random.default_rng(0)
    tokens = pa.list_(pa.int32())
    rows = []
    for _ in range(ROWS):
        ids = generator.integers(10, 30, 12)
        if new_ids:
            ids[: len(new_ids)] = ids[-len(new_ids) :] = new_ids
        rows.append(ids.tolist())
    places = {"file": pa.array([0] * ROWS, pa.int32()), "line": pa.array(range(1, ROWS + 1), pa.int64())}
    table = pa.table({"input_ids": pa.array(rows, tokens), "labels": pa.array(rows, tokens)} | places)
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)


def load_trained(base_folder: Path, adapter: Path, *, vocabulary: int, dtype: str = "float32") -> PeftModel:
    """Load an adapter on a fresh base model as its users would."""
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=dtype)
    base.config.use_cache = False  # with a cache, joined rows would see each other
    if vocabulary > VOCABULARY:
        base.resize_token_embeddings(vocabulary)
    return PeftModel.from_pretrained(base, adapter).eval()


def held_out_loss(model: Any, plan: TrainPlan, root: Path) -> float:
    """Return the loss of a model on the rows that `train_here` held out."""
    rows = TokenRows(root / "tokens.arrow", np.load(root / "eval_rows.npy"))
    plan = plan.model_copy(update={"loss": "full"})  # as a plain model computes it
    return evaluate_loss(model, rows, plan, join_rows if plan.packing else PadRows(0), rank=0)


def read_metrics(root: Path) -> list[dict[str, float]]:
    """Return all that `train_here` logged."""
    return [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
