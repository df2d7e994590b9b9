"""The trained model's loss on a few rows, for a fresh process to find again in what was published."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import nn

from job.accept import ROWS, AcceptanceRow
from job.errors import DivergedError
from job.handover import RunFolder, WorkerInputs, write_whole
from job.plan import TrainPlan
from job.train.dataset import IGNORED, Collate, TokenRows
from job.train.evaluate import evaluate_rows
from job.train.fp8 import without_rounding

_ROWS = 8
_TOKENS = 512  # of each: logits of more may not fit where the loss was computed in chunks


def measure_rows(
    model: nn.Module,
    plan: TrainPlan,
    inputs: WorkerInputs,
    folder: RunFolder,
    collate: Collate,
    *,
    rank: int,
    beat: Callable[[], None],
) -> None:
    """Write the loss of some held-out rows, or else of training rows, into the folder, on rank 0. Every process must
    call it, with the weights in the model that are published.

    Raises DivergedError, on all processes alike, for an adapter whose loss is no number: it is worth nothing.
    """
    rows = choose_rows(inputs, folder)
    with without_rounding(model):  # one by one: LLM.int8 rounds a row by what is beside it
        losses = evaluate_rows(model, rows, plan, collate, rank=rank, one_by_one=True, beat=beat)  # (N, 2)
    if not np.isfinite(losses).all():
        raise DivergedError(
            "the loss of the trained adapter is no number",
            hint=f"its numbers are beyond SFT_MODEL__DTYPE={plan.dtype}: lower SFT_TRAIN__LEARNING_RATE",
        )
    if rank == 0:
        measured = [
            AcceptanceRow(
                input_ids=row["input_ids"].tolist(),
                labels=row["labels"].tolist(),
                loss_sum=loss_sum,
                supervised_tokens=int(supervised),
            )
            for row, (loss_sum, supervised) in zip((rows[i] for i in range(len(rows))), losses.tolist(), strict=True)
            if supervised
        ]
        write_whole(folder.acceptance_rows, ROWS.dump_json(measured).decode())


def choose_rows(inputs: WorkerInputs, folder: RunFolder) -> TokenRows:
    """Return the first rows that are held out, or else trained on; of long ones, tokens around the first that is
    supervised."""
    held_out = np.load(folder.eval_rows)
    segments, tokens = (np.load(folder.train_rows), inputs.train_tokens)
    if len(held_out):
        segments, tokens = held_out, inputs.eval_tokens or inputs.train_tokens
    return TokenRows(tokens, _cut(segments[:_ROWS], tokens))


def _cut(segments: np.ndarray, tokens: Path) -> np.ndarray:
    """Return segments (N, 3) of at most so many tokens."""
    rows = TokenRows(tokens, segments)
    cut = segments.copy()
    for index, (_, start, stop) in enumerate(segments.tolist()):
        supervised = rows[index]["labels"] != IGNORED  # (T,)
        first = start + max(0, int(supervised.int().argmax()) - _TOKENS // 2)
        cut[index, 1:] = first, min(stop, first + _TOKENS)
    return cut
