"""The adapter: which weights it consists of, as the plan says, and how it is written down."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel

from job.errors import ConfigError, DivergedError, InternalError
from job.plan import TrainPlan
from job.support import why_not_new_rows
from job.train.gather import gather_frozen
from job.train.quantize import check_can_be_saved_whole
from job.train.vocabulary import find_embeddings, is_tied

_NAME = "default"  # PEFT's, for the only adapter


def add_adapter(base: PreTrainedModel, plan: TrainPlan, token_ids: Sequence[int]) -> PeftModel:
    """Put a fresh LoRA adapter on a base model, which is frozen but for the plan's modules to save and, in embeddings
    and head, the rows of `token_ids`. All that is trained is float32, whatever the base's precision.

    Raises ConfigError for modules that the model doesn't have, or that can't be trained in this way.
    """
    names = [] if plan.target_modules == "all-linear" else plan.target_modules
    targeted = _find_modules(base, names, "SFT_LORA__TARGET_MODULES", kind=nn.Linear)
    whole = _find_modules(base, plan.modules_to_save, "SFT_LORA__MODULES_TO_SAVE", kind=nn.Module)
    _check_none_is_in_both(targeted, whole)
    if plan.quantization != "none":
        for name in whole:
            check_can_be_saved_whole(name, base.get_submodule(name), plan)
    by_row = _layers_to_train_by_row(base, whole) if token_ids else []
    _check_rows_are_whole(by_row, plan)
    _check_rows_can_be_trained(base, by_row, targeted)
    tied = is_tied(base)
    tied_and_whole = tied and not find_embeddings(base).keys().isdisjoint(whole)
    config = LoraConfig(
        r=plan.lora_r,
        lora_alpha=plan.lora_alpha,
        lora_dropout=plan.lora_dropout,
        use_rslora=plan.lora_rslora,
        use_dora=plan.lora_dora,
        target_modules=plan.target_modules,
        modules_to_save=whole or None,
        trainable_token_indices={name: list(token_ids) for name in by_row} or None,
        ensure_weight_tying=tied_and_whole,
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        model = get_peft_model(base, config)
    except ValueError as error:  # a module that is there, and isn't a linear layer
        raise ConfigError(f"SFT_LORA__TARGET_MODULES: {error}", hint="name linear layers, or use all-linear") from error
    if tied_and_whole:
        _check_still_tied(base, hint="leave embeddings and head out of SFT_LORA__MODULES_TO_SAVE")
    elif tied and by_row:
        _check_still_tied(base, hint="use a chat template whose tokens the model knows")
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()  # PEFT leaves modules to save in the base's precision
    return model


def _find_modules(base: nn.Module, names: Sequence[str], setting: str, *, kind: type[nn.Module]) -> list[str]:
    """Return the full names of the modules that are meant, each by its full name or the end of it."""
    weighty = {name: module for name, module in base.named_modules() if name and any(True for _ in module.parameters())}
    found = []
    for asked in names:
        matches = [name for name in weighty if name == asked or name.endswith(f".{asked}")]
        if not matches:
            leaves = {name.rsplit(".", 1)[-1] for name, module in weighty.items() if isinstance(module, kind)}
            has = ", ".join(sorted(leaf for leaf in leaves if not leaf.isdigit()))
            raise ConfigError(f"{setting}={asked}: the model has no such module", hint=f"it has {has}")
        found += matches
    return found


def _check_none_is_in_both(targeted: Sequence[str], whole: Sequence[str]) -> None:
    if both := sorted(set(targeted) & set(whole)):  # PEFT would leave the adapter out, without a word
        raise ConfigError(
            f"SFT_LORA__MODULES_TO_SAVE: {both[0]} is in SFT_LORA__TARGET_MODULES, too",
            hint="name it in one of them: a module that is trained whole needs no LoRA",
        )


def _layers_to_train_by_row(base: PreTrainedModel, whole: Sequence[str]) -> list[str]:
    layers = find_embeddings(base)
    if not is_tied(base):
        return [name for name in layers if name not in whole]
    if not layers.keys().isdisjoint(whole):
        return []
    return [name for name, module in layers.items() if module is base.get_input_embeddings()]  # PEFT ties the head


def _check_rows_are_whole(by_row: Sequence[str], plan: TrainPlan) -> None:
    if by_row and (lacking := why_not_new_rows(plan.engine)):
        names = ",".join(name.rsplit(".", 1)[-1] for name in by_row)
        raise ConfigError(
            f"SFT_PARALLEL__ENGINE={plan.engine}: {lacking}",
            hint=f"train these whole (SFT_LORA__MODULES_TO_SAVE={names}), or use ddp or zero2",
        )


def _check_rows_can_be_trained(base: PreTrainedModel, by_row: Sequence[str], targeted: Sequence[str]) -> None:
    for name, module in find_embeddings(base).items():
        if by_row and name in targeted:
            raise ConfigError(
                f"SFT_LORA__TARGET_MODULES: {name} can't have LoRA, for the rows of new tokens are trained in it",
                hint="leave it out, or train it whole by SFT_LORA__MODULES_TO_SAVE",
            )
        # PEFT's TrainableTokensLayer computes the head as F.linear(x, W), without the bias.
        if name in by_row and isinstance(module, nn.Linear) and module.bias is not None:
            raise ConfigError(
                f"the rows of new tokens can't be trained in {name}, because it has a bias",
                hint=f"train it whole: SFT_LORA__MODULES_TO_SAVE={name.rsplit('.', 1)[-1]}",
            )


def _check_still_tied(base: PreTrainedModel, *, hint: str) -> None:
    """Raise ConfigError when head and embeddings, one matrix in the base model, would be trained apart.

    PEFT takes what is tied from configuration and names, and a mistake there shows only in an adapter that has two
    matrices for a model that has one.
    """
    layers = (base.get_input_embeddings(), base.get_output_embeddings())
    inputs, outputs = ({id(weight) for weight in layer.parameters() if weight.requires_grad} for layer in layers)
    if inputs != outputs:
        raise ConfigError("embeddings and head are one matrix in this model, and PEFT can't train it as one", hint=hint)


def save_adapter(model: PeftModel, weights: dict[str, torch.Tensor], folder: Path, *, rank: int) -> None:
    """Write the adapter, on rank 0: trained weights as `gather_trained` returns them, and its configuration. Every
    process must call it.

    Raises DivergedError when a weight isn't finite, InternalError when a part of it learned nothing.
    """
    broken = [name for name, weight in weights.items() if not torch.isfinite(weight).all()]
    if broken:
        raise DivergedError(f"{len(broken)} of {len(weights)} adapter weights are NaN or infinite, {broken[0]} first")
    # B starts at zero: if it still is, no gradient ever reached the adapter
    if not any(weight.any() for name, weight in weights.items() if "lora_B" in name or "lora_embedding_B" in name):
        raise InternalError("the adapter is unchanged after training")
    # A weight that is tied has several names in a model, and one in `weights`.
    trained = {id(weight): weights[name] for name, weight in model.named_parameters() if weight.requires_grad}
    for name, before, after in _pairs(model):
        if torch.equal(gather_frozen(before), trained[id(after)]):
            raise InternalError(f"{name} is unchanged after training")
    if rank == 0:
        state = model.state_dict(keep_vars=True)
        state = {name: trained[id(weight)] for name, weight in state.items() if id(weight) in trained}
        # Rows that were added are all in the adapter; by default PEFT writes the whole matrix of a grown model.
        model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)


def _pairs(model: PeftModel) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield name, base weight and parameter of what is trained beside LoRA."""
    for name, module in model.named_modules():
        if isinstance(module, TrainableTokensWrapper):
            tokens = module.token_adapter
            yield name, tokens.trainable_tokens_original[_NAME], tokens.trainable_tokens_delta[_NAME]
        elif isinstance(module, ModulesToSaveWrapper):
            trained = dict(module.modules_to_save[_NAME].named_parameters())
            for part, before in module.original_module.named_parameters():
                yield f"{name}.{part}", before, trained[part]
