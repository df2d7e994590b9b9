"""Loading an adapter onto its base model by plain PEFT, as the model card says, and proof that it is what was trained.

Nothing here is of the training's own code, but for how a quantised base model is held.
"""

import json
from pathlib import Path

import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from job.accept import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Acceptance,
    AcceptanceRow,
    AcceptanceTask,
    find_tolerance,
    find_wrong_config,
)
from job.errors import DataError
from job.log import logger
from job.plan import TrainPlan
from job.train.fp8 import without_rounding
from job.train.out_of_memory import describe_shortage

_IGNORED = -100
_LEAST_LOSS = 0.05  # nats a token: the difference is a share of no less, for below it nearly all is rounding
_PROBE_TOKENS = 16  # of a row that nothing is known of


def load_base_as_users_do(task: AcceptanceTask) -> PreTrainedModel:
    """Load the base model in the planned precision, and quantised if it was trained so: else losses would differ."""
    plan = task.plan
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(plan.threads_per_process)
    # What is held in FP8 is loaded on the CPU first: it may be too large for the GPU before.
    on_gpu = plan.device == "cuda" and plan.quantization != "fp8"
    options: dict[str, object] = {"device_map": {"": 0}} if on_gpu else {}
    if plan.quantization != "none":
        from job.train.quantize import is_stored_quantized, make_trainable, quantization_options

        options |= quantization_options(plan, is_stored_so=is_stored_quantized(task.model_folder))
    base = AutoModelForCausalLM.from_pretrained(
        task.model_folder,
        dtype=getattr(torch, plan.dtype),
        # what trains joined rows is the job's own, and no user has it
        attn_implementation="sdpa" if plan.attn_implementation == "varlen" else plan.attn_implementation,
        use_safetensors=True,  # never unpickle
        **options,
    )
    if plan.quantization != "none":
        make_trainable(base, plan)  # in the precision of the training, not by kernels that are for inference alone
    base.config.use_cache = False
    return base.to(plan.device).eval() if plan.quantization == "fp8" else base.eval()


@torch.no_grad()
def accept_adapter(base: PreTrainedModel, folder: Path, task: AcceptanceTask) -> Acceptance:
    """Put the adapter in a folder onto the base model, and compare its loss with the trained model's on every row.

    Raises DataError when it is another adapter, or none that can be loaded.
    """
    plan = task.plan
    wrong = find_wrong_config(json.loads((folder / ADAPTER_CONFIG).read_bytes()), plan.model_dump())
    if wrong is not None:
        raise DataError(f"the adapter that was read back isn't what was trained: in {ADAPTER_CONFIG}, {wrong}")
    if plan.new_tokens:
        _make_room(base, folder, task)
    model = _load_adapter(base, folder)
    tolerance = find_tolerance(plan.dtype, plan.quantization)
    if not task.rows:
        _check_gives_numbers(model, plan)
        return Acceptance()
    with without_rounding(model):
        with model.disable_adapter():
            of_base = [_sum_loss(model, row, plan) for row in task.rows]
        losses = [_sum_loss(model, row, plan) for row in task.rows]
    trained = [row.loss_sum for row in task.rows]
    tokens = sum(row.supervised_tokens for row in task.rows)
    accepted = Acceptance(
        rows=len(losses), loss=sum(losses) / tokens, loss_trained=sum(trained) / tokens, tolerance=tolerance
    )
    off = _measure_difference(losses, trained, tokens)
    if not off <= tolerance:
        raise DataError(
            f"the adapter that was read back isn't what was trained: its loss on {len(losses)} rows is "
            f"{accepted.loss:.4f}, and the trained model's was {accepted.loss_trained:.4f}; the rows' losses differ by "
            f"{off:.2%}, and rounding explains {tolerance:.2%}"
        )
    if (seen := _measure_difference(of_base, trained, tokens)) <= tolerance:
        logger.warning(
            "the adapter changes the loss by %.3f %%, no more than rounding may: that it works when loaded is not "
            "proved",
            100 * seen,
        )
    return accepted


def _make_room(base: PreTrainedModel, folder: Path, task: AcceptanceTask) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = dict(zip(task.new_token_ids, tokenizer.convert_tokens_to_ids(list(task.new_token_ids)), strict=True))
    if ids != task.new_token_ids:
        raise DataError(
            f"the tokenizer that was read back isn't the one that was trained with: its new tokens are {ids}, and were "
            f"{task.new_token_ids}"
        )
    rows = max(len(tokenizer), base.get_input_embeddings().num_embeddings)
    base.resize_token_embeddings(rows, mean_resizing=False)  # whatever is in them: the adapter replaces them


def _load_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            found = set(file.keys())
        model = PeftModel.from_pretrained(base, folder)
    except (RuntimeError, ValueError, KeyError, OSError, SafetensorError) as error:
        if describe_shortage(error) is not None:
            raise
        reason = " ".join(str(error).split())[:500]
        raise DataError(f"the adapter that was read back can't be loaded onto its base model: {reason}") from error
    # PEFT leaves what it has no place for aside, and what it lacks at its initial values, with a warning at most.
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if odd := sorted(found ^ expected):
        raise DataError(
            f"the adapter that was read back isn't what was trained: {odd[0]} {'and others are' if odd[1:] else 'is'} "
            f"{'missing' if odd[0] in expected else 'of no use'}"
        )
    return model.eval()


def _sum_loss(model: nn.Module, row: AcceptanceRow, plan: TrainPlan) -> float:
    """Return a row's loss, summed over its supervised tokens, in nats."""
    ids = torch.tensor([row.input_ids], device=plan.device)  # (1, T)
    labels = torch.tensor(row.labels[1:], device=plan.device)  # (T - 1,)
    logits = _read_logits(model, ids, plan)[:-1]  # (T - 1, V)
    return nn.functional.cross_entropy(logits, labels, ignore_index=_IGNORED, reduction="sum").item()


def _read_logits(model: nn.Module, ids: torch.Tensor, plan: TrainPlan) -> torch.Tensor:
    # Modules that were trained whole are in float32, whatever the base's precision.
    dtype = getattr(torch, plan.dtype)
    with torch.autocast(plan.device, dtype=dtype, enabled=dtype != torch.float32):
        logits: torch.Tensor = model(input_ids=ids).logits
    return logits[0].float()  # (T, V)


def _check_gives_numbers(model: nn.Module, plan: TrainPlan) -> None:
    ids = torch.arange(_PROBE_TOKENS, device=plan.device)[None]
    if not torch.isfinite(_read_logits(model, ids, plan)).all():
        raise DataError("the adapter makes the base model's logits NaN or infinite")


def _measure_difference(losses: list[float], expected: list[float], tokens: int) -> float:
    """Return how far losses lie from the expected ones, row by row, as a share of these: what one row has too much
    doesn't make up for what another lacks."""
    apart = sum(abs(loss - other) for loss, other in zip(losses, expected, strict=True))
    return apart / max(sum(expected), _LEAST_LOSS * tokens)
