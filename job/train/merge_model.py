"""The plain base model with the adapter merged into it, proved to be the same.

The weights are merged in the precision that the base model is published in, not in the one it was trained in. Only one
copy of the model is in memory at a time.
"""

import gc
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel

from job.errors import DivergedError, InternalError
from job.handover import RunFolder, WorkerInputs, write_whole
from job.log import logger
from job.plan import TrainPlan
from job.train.dataset import PadRows, Row, TokenRows, join_rows
from job.train.evaluate import evaluate_loss
from job.train.model import load_base, measure_difference, read_logits
from job.train.out_of_memory import describe_shortage
from job.train.vocabulary import add_new_tokens, is_tied

_SHARD_SIZE = "5GB"
_PROOF_ROWS = 3
_GENERATION = "generation_config.json"
# Relative difference of logits that rounding the merged weights explains.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class _Expected:
    """The logits (T, V) of each row that the proof is made with: of the base model, and of the adapter on it."""

    base: list[torch.Tensor]
    adapter: list[torch.Tensor]


def merge_model(plan: TrainPlan, inputs: WorkerInputs, folder: RunFolder) -> None:
    """Write the merged model, load it anew, and add what was measured to the run's result.

    Raises InternalError when it isn't what the adapter is on the base model, DivergedError for weights that aren't
    finite.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(plan.threads_per_process * plan.processes)
    device = _choose_device(plan, inputs.model_folder)
    train_rows = TokenRows(inputs.train_tokens, np.load(folder.train_rows))
    eval_rows = TokenRows(inputs.eval_tokens or inputs.train_tokens, np.load(folder.eval_rows))
    proof = eval_rows if len(eval_rows) else train_rows
    rows = [proof[index] for index in range(min(_PROOF_ROWS, len(proof)))]

    expected = _write_merged(plan, inputs, folder, rows, device)
    gc.collect()  # before the model is loaded again
    merged = load_base(plan, folder.merged, dtype="auto", attn_implementation="sdpa").to(device).eval()
    measured = _check_same([_read(merged, row) for row in rows], expected, merged.dtype)
    if len(eval_rows) and device.type == plan.device:
        merged.config.use_cache = False  # with a cache, joined rows would see each other
        alone = plan.model_copy(update={"nodes": 1, "processes": 1, "loss": "full"})
        collate = join_rows if plan.packing else PadRows(inputs.pad_token_id)
        merged.to(getattr(torch, plan.dtype))
        try:
            measured["eval_loss_merged"] = evaluate_loss(merged, eval_rows, alone, collate, rank=0)
            logger.info("held-out loss of the merged model: %.4f", measured["eval_loss_merged"])
        except (RuntimeError, MemoryError, OSError) as error:  # a figure is no reason to lose the model
            if (shortage := describe_shortage(error)) is None:
                raise
            logger.warning("the held-out loss of the merged model is not known: %s", shortage)
    write_whole(folder.result, json.dumps(folder.read_result() | measured, allow_nan=False))


def _choose_device(plan: TrainPlan, model_folder: Path) -> torch.device:
    """Return the GPU where the whole model fits on it, else the CPU."""
    if plan.device == "cpu" or not torch.cuda.is_available():  # trained by an earlier start, on another machine
        return torch.device("cpu")
    size_bytes = sum(path.stat().st_size for path in model_folder.glob("*.safetensors"))
    free_bytes, _ = torch.cuda.mem_get_info()
    return torch.device("cuda" if free_bytes > 1.3 * size_bytes else "cpu")  # a proof needs little beside the weights


def _write_merged(
    plan: TrainPlan, inputs: WorkerInputs, folder: RunFolder, rows: list[Row], device: torch.device
) -> _Expected:
    base = load_base(plan, inputs.model_folder, dtype="auto", attn_implementation="sdpa").to(device).eval()
    add_new_tokens(base, inputs.vocabulary_size, inputs.new_tokens)
    dtypes = {name: weight.dtype for name, weight in base.named_parameters()}
    was_tied = is_tied(base)
    logger.info("merging the adapter into the base model in %s", str(base.dtype).removeprefix("torch."))
    of_base = [_read(base, row) for row in rows]
    model = PeftModel.from_pretrained(base, folder.adapter).eval()
    expected = _Expected(of_base, [_read(model, row) for row in rows])
    try:
        merged: PreTrainedModel = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise DivergedError(f"the adapter can't be merged: {error}") from error
    _restore(merged, dtypes, was_tied=was_tied)
    # Saving refuses generation settings that contradict each other, which many a base model has: they stay as they are.
    merged.generation_config = GenerationConfig.from_model_config(merged.config)
    merged.save_pretrained(folder.merged, max_shard_size=_SHARD_SIZE)
    if (inputs.model_folder / _GENERATION).exists():
        shutil.copyfile(inputs.model_folder / _GENERATION, folder.merged / _GENERATION)
    return expected


def _restore(merged: PreTrainedModel, dtypes: dict[str, torch.dtype], *, was_tied: bool) -> None:
    """Give every weight the precision it had in the base model: modules that were trained whole are in float32.

    Raises InternalError when the merged model has other weights than the base model, or ties them otherwise.
    """
    weights = dict(merged.named_parameters())
    if weights.keys() != dtypes.keys() or is_tied(merged) != was_tied:
        different = sorted(weights.keys() ^ dtypes.keys()) or ["head and embeddings, which are tied in one of them,"]
        raise InternalError(f"the merged model isn't built like the base model: {different[0]} differ")
    for name, weight in weights.items():
        weight.data = weight.data.to(dtypes[name])


@torch.no_grad()
def _read(model: torch.nn.Module, row: Row) -> torch.Tensor:
    return read_logits(model, [row], next(model.parameters()).device).cpu()


def _check_same(logits: list[torch.Tensor], expected: _Expected, dtype: torch.dtype) -> dict[str, float]:
    """Prove that logits (T, V) of each row are the adapter's, and return how far they and the base model's are off.

    Raises InternalError when they aren't.
    """
    adapter = torch.cat(expected.adapter)  # (all T, V)
    off, base_off = (
        measure_difference(torch.cat(logits), adapter),
        measure_difference(torch.cat(expected.base), adapter),
    )
    tolerance = TOLERANCE[dtype]
    if not off <= tolerance:
        raise InternalError(
            f"the merged model's logits differ from the adapter's by {off:.2%}, and rounding explains {tolerance:.2%}",
            hint="set SFT_OUTPUT__MERGE=false to publish the adapter alone, and please report it",
        )
    if base_off <= tolerance:
        logger.warning(
            "the adapter changes the logits by %.3f %%, no more than rounding may: that the merged model has it is "
            "not proved",
            100 * base_off,
        )
    else:
        logger.info("the merged model's logits differ from the adapter's by %.4f %%", 100 * off)
        logger.info("the base model's do by %.2f %%", 100 * base_off)
    return {"merged_logits_difference": off, "base_logits_difference": base_off}
