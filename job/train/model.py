"""The base model with a LoRA adapter on it, as the plan says, and what of it is written down."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from job.errors import ConfigError, DivergedError, InternalError, NotFoundError
from job.log import logger
from job.plan import TrainPlan
from job.train.dataset import Row, join_rows

_UPLOAD_AGAIN = "its files are incomplete or damaged: fetch or upload them again"
_PROOF_TOKENS = 128  # of each row
# Relative difference of logits that rounding alone explains; a row that sees its neighbour differs by far more.
_ISOLATION_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 6e-2}


def load_model(plan: TrainPlan, folder: Path) -> PeftModel:
    """Load the frozen base model from a folder and put a fresh adapter on it.

    Raises ConfigError for target modules that the model doesn't have, or an architecture without a causal LM;
    NotFoundError for weights that are damaged or incomplete.
    """
    base = _load_base(plan, folder)
    base.config.use_cache = False  # with a cache, joined rows would see each other
    _check_target_modules(base, plan)
    adapter = LoraConfig(
        r=plan.lora_r,
        lora_alpha=plan.lora_alpha,
        lora_dropout=plan.lora_dropout,
        target_modules=plan.target_modules,
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        model = get_peft_model(base, adapter)  # adapter weights in float32, whatever the base's precision
    except ValueError as error:  # a module that is there, and isn't a linear layer
        raise ConfigError(f"SFT_LORA__TARGET_MODULES: {error}", hint="name linear layers, or use all-linear") from error
    trainable, total = model.get_nb_trainable_parameters()
    logger.info(
        "adapter: %s of %s parameters are trained (%.2f %%)", f"{trainable:,}", f"{total:,}", 100 * trainable / total
    )
    return model


def _load_base(plan: TrainPlan, folder: Path) -> PreTrainedModel:
    try:
        base, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, plan.dtype),
            attn_implementation=plan.attn_implementation,
            use_safetensors=True,  # never unpickle
            output_loading_info=True,
        )
    except ValueError as error:
        raise ConfigError(f"SFT_MODEL__ID={plan.model_id}: {error}", hint="use a causal language model") from error
    except (OSError, SafetensorError) as error:
        raise NotFoundError(f"SFT_MODEL__ID={plan.model_id}: can't be loaded: {error}", hint=_UPLOAD_AGAIN) from error
    # transformers fills in random numbers for weights that aren't there, and says so in a warning only.
    if missing := sorted(report["missing_keys"]):
        raise NotFoundError(
            f"SFT_MODEL__ID={plan.model_id}: {len(missing)} of its weights are missing, {missing[0]} first",
            hint=_UPLOAD_AGAIN,
        )
    return base


def _check_target_modules(base: nn.Module, plan: TrainPlan) -> None:
    if plan.target_modules == "all-linear":
        return
    linear = sorted({name.rsplit(".", 1)[-1] for name, module in base.named_modules() if isinstance(module, nn.Linear)})
    names = [name for name, _ in base.named_modules()]
    for target in plan.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ConfigError(
                f"SFT_LORA__TARGET_MODULES={target}: the model has no such module",
                hint=f"it has {', '.join(linear)}",
            )


@torch.no_grad()
def check_logits_are_finite(model: nn.Module, plan: TrainPlan, row: Row) -> None:
    """Raise DivergedError for a base model that is broken before anything is learned."""
    was_training = model.training
    model.eval()
    logits = _logits(model, [row], next(model.parameters()).device)  # (T, V)
    model.train(was_training)
    if not torch.isfinite(logits).all():
        raise DivergedError(
            f"SFT_MODEL__ID={plan.model_id}: its logits are NaN or infinite before the first step",
            hint=f"its weights are damaged, or their numbers are beyond SFT_MODEL__DTYPE={plan.dtype}",
        )


@torch.no_grad()
def check_rows_stay_apart(model: nn.Module, first: Row, second: Row) -> None:
    """Prove that a row gets the same logits behind another one in a joined sequence as it gets alone.

    Raises ConfigError where it doesn't: the architecture doesn't take document borders from position ids.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    alone = _logits(model, [second], device)  # (T2, V)
    joined = _logits(model, [first, second], device)[-len(alone) :]
    model.train(was_training)
    difference = ((joined - alone).abs().mean() / alone.abs().mean()).item()
    dtype = next(model.parameters()).dtype
    if not difference <= _ISOLATION_TOLERANCE[dtype]:
        raise ConfigError(
            f"SFT_TRAIN__PACKING=true: joined rows see each other in this model (logits differ by {difference:.1%})",
            hint="set SFT_TRAIN__PACKING=false",
        )


def _logits(model: nn.Module, rows: list[Row], device: torch.device) -> torch.Tensor:
    # A part of each row proves as much, and never needs more memory than training does.
    batch = join_rows(
        [{"input_ids": row["input_ids"][:_PROOF_TOKENS], "labels": row["labels"][:_PROOF_TOKENS]} for row in rows]
    )
    logits: torch.Tensor = model(
        input_ids=batch["input_ids"].to(device), position_ids=batch["position_ids"].to(device)
    ).logits
    return logits[0].float()


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter and its configuration.

    Raises DivergedError when a weight isn't finite, InternalError when nothing was learned.
    """
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    broken = [name for name, weight in weights.items() if not torch.isfinite(weight).all()]
    if broken:
        raise DivergedError(f"{len(broken)} of {len(weights)} adapter weights are NaN or infinite, {broken[0]} first")
    # B starts at zero: if it still is, no gradient ever reached the adapter
    if not any(weight.any() for name, weight in weights.items() if "lora_B" in name or "lora_embedding_B" in name):
        raise InternalError("the adapter is unchanged after training")
    model.save_pretrained(folder)
