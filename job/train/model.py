"""The base model with a fresh adapter on it, and proofs that it can be trained as planned."""

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

from job.errors import ConfigError, DivergedError, NotFoundError
from job.handover import NewTokenInput
from job.log import logger
from job.plan import TrainPlan
from job.train.adapter import add_adapter
from job.train.dataset import Collate, Row, join_rows, move_batch
from job.train.elementwise import compile_elementwise, is_worth_compiling
from job.train.lora import lighten_lora
from job.train.norms import fuse_norms
from job.train.quantize import comparably, is_stored_quantized, make_trainable, quantization_options
from job.train.varlen import JoinRows
from job.train.vocabulary import add_new_tokens

_UPLOAD_AGAIN = "its files are incomplete or damaged: fetch or upload them again"
_USE_ANOTHER = "use a causal language model, and an SFT_MODEL__ATTN_IMPLEMENTATION that it has"
_PROOF_TOKENS = 128  # of each row
# Relative difference of logits that rounding alone explains; a row that sees its neighbour differs by far more.
_ISOLATION_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 6e-2}


def load_model(
    plan: TrainPlan, folder: Path, *, vocabulary_size: int, new_tokens: Sequence[NewTokenInput]
) -> PeftModel:
    """Load the frozen base model from a folder, with rows for new tokens, and put a fresh adapter on it.

    Raises ConfigError for modules that the model doesn't have, or an architecture without a causal LM; NotFoundError
    for weights that are damaged or incomplete.
    """
    base = load_base(plan, folder, **quantization_options(plan, is_stored_so=is_stored_quantized(folder)))
    make_trainable(base, plan)
    base.config.use_cache = False  # with a cache, joined rows would see each other
    token_ids = add_new_tokens(base, vocabulary_size, new_tokens)
    # The adapter starts from random numbers, and how many were drawn before depends on the engine.
    set_seed(plan.seed)
    model = add_adapter(base, plan, token_ids)
    lighten_lora(model, gathers_by_module=plan.engine == "zero3")
    trainable, total = model.get_nb_trainable_parameters()
    if plan.device == "cuda":  # PyTorch has no such kernel for CPUs, and there compiling takes longer and gains less
        fuse_norms(model)
        if is_worth_compiling(plan, total):
            compile_elementwise(model, plan.device, getattr(torch, plan.dtype))
    logger.info(
        "adapter: %s of %s parameters are trained (%.2f %%)", f"{trainable:,}", f"{total:,}", 100 * trainable / total
    )
    return model


def load_base(plan: TrainPlan, folder: Path, **changes: object) -> PreTrainedModel:
    """Load a model from a folder, held as planned but for what `changes` say to `from_pretrained`.

    Raises ConfigError for an architecture without a causal LM, NotFoundError for weights that are damaged or missing.
    """
    options: dict[str, object] = {
        "dtype": getattr(torch, plan.dtype),
        "attn_implementation": plan.attn_implementation,
        "use_safetensors": True,  # never unpickle
    }
    try:
        base, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **(options | changes))
    except ValueError as error:
        raise ConfigError(f"SFT_MODEL__ID={plan.model_id}: {error}", hint=_USE_ANOTHER) from error
    except (OSError, SafetensorError) as error:
        raise NotFoundError(f"SFT_MODEL__ID={plan.model_id}: can't be loaded: {error}", hint=_UPLOAD_AGAIN) from error
    # transformers fills in random numbers for weights that aren't there, and says so in a warning only.
    if missing := sorted(report["missing_keys"]):
        raise NotFoundError(
            f"SFT_MODEL__ID={plan.model_id}: {len(missing)} of its weights are missing, {missing[0]} first",
            hint=_UPLOAD_AGAIN,
        )
    return base


@torch.no_grad()
def check_logits_are_finite(model: nn.Module, plan: TrainPlan, row: Row) -> None:
    """Raise DivergedError for a base model that is broken before anything is learned."""
    was_training = model.training
    model.eval()
    logits = read_logits(model, [row], torch.device(plan.device), JoinRows(plan.attn_implementation))  # (T, V)
    model.train(was_training)
    if not torch.isfinite(logits).all():
        raise DivergedError(
            f"SFT_MODEL__ID={plan.model_id}: its logits are NaN or infinite before the first step",
            hint=f"its weights are damaged, or their numbers are beyond SFT_MODEL__DTYPE={plan.dtype}",
        )


@torch.no_grad()
def check_rows_stay_apart(model: nn.Module, plan: TrainPlan, first: Row, second: Row) -> None:
    """Prove that a row gets the same logits behind another one in a joined sequence as it gets alone.

    Raises ConfigError where it doesn't: the architecture doesn't take document borders from position ids.
    """
    device, join = torch.device(plan.device), JoinRows(plan.attn_implementation)
    was_training = model.training
    model.eval()
    with comparably(model, plan):
        alone = read_logits(model, [second], device, join)  # (T2, V)
        joined = read_logits(model, [first, second], device, join)[-len(alone) :]
    model.train(was_training)
    difference = measure_difference(joined, alone)
    dtype = next(model.parameters()).dtype
    if not difference <= _ISOLATION_TOLERANCE[dtype]:
        raise ConfigError(
            f"SFT_TRAIN__PACKING=true: joined rows see each other in this model (logits differ by {difference:.1%})",
            hint="set SFT_TRAIN__PACKING=false",
        )


def measure_difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Return how far logits lie from the expected ones, relative to their size: 0.01 is 1 %."""
    return ((logits - expected).abs().mean() / expected.abs().mean()).item()


def read_logits(model: nn.Module, rows: list[Row], device: torch.device, join: Collate = join_rows) -> torch.Tensor:
    """Return the float32 logits (T, V) of the beginnings of some rows, joined into one sequence by `join`."""
    # A part of each row proves as much, and never needs more memory than training does.
    batch = join(
        [{"input_ids": row["input_ids"][:_PROOF_TOKENS], "labels": row["labels"][:_PROOF_TOKENS]} for row in rows]
    )
    inputs = {name: part for name, part in batch.items() if name != "labels"}
    dtype = next(model.parameters()).dtype
    # Modules that are trained whole are in float32, whatever the base's precision.
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        logits: torch.Tensor = model(**move_batch(inputs, device)).logits
    return logits[0].float()
