"""The held-out loss of each row, shared among all processes."""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from job.plan import TrainPlan
from job.train.dataset import IGNORED, Collate, TokenRows, move_batch
from job.train.loss import find_losses


def evaluate_rows(
    model: nn.Module,
    rows: TokenRows,
    plan: TrainPlan,
    collate: Collate,
    *,
    rank: int,
    one_by_one: bool = False,
    beat: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Return the loss of each of N rows, summed over its supervised tokens, in nats, and how many these are: float64
    (N, 2), shared among the processes.

    Each process must call it; all get the same numbers. It takes as many rows at a time as make a micro batch, unless
    `one_by_one`, and calls `beat` after each. `model` computes its loss as the plan says (see `find_losses`).
    """
    device = torch.device(plan.device)
    sums = torch.zeros((len(rows), 2), dtype=torch.float64)
    was_training = model.training
    model.eval()
    # No more tokens than the estimate of the memory knows.
    batches = _group(rows.lengths(), 1 if one_by_one else plan.micro_batch_tokens, is_joined=plan.packing)
    mine = batches[rank :: plan.world_size]
    for turn in range(math.ceil(len(batches) / plan.world_size)):  # an engine may gather weights in it: as often on
        indices = mine[turn] if turn < len(mine) else []  # every process
        taken = [rows[index] for index in indices or [0]]
        batch = move_batch(collate(taken), device)
        labels = batch.pop("labels")  # (B, T)
        losses = find_losses(model, batch, labels, plan)
        if indices:
            lengths = [len(row["input_ids"]) for row in taken]
            both = (_sum_by_row(losses.double(), lengths), _sum_by_row((labels != IGNORED).double(), lengths))
            sums[indices] = torch.stack(both, dim=1).cpu()  # (B, 2)
        beat()
    model.train(was_training)
    if plan.world_size > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)
    found: np.ndarray = sums.cpu().numpy()
    return found


def _group(lengths: np.ndarray, tokens: int, *, is_joined: bool) -> list[list[int]]:
    """Return the indices of rows that are computed together, longest first: so many that they have at most `tokens`,
    with the padding of those that aren't joined, or one."""
    groups: list[list[int]] = []
    free = taken = 0
    for index in np.argsort(-lengths, kind="stable").tolist():
        taken = int(lengths[index]) if is_joined else taken
        if not groups or taken > free:
            groups.append([])
            free, taken = tokens, int(lengths[index])
        groups[-1].append(index)
        free -= taken
    return groups


def _sum_by_row(values: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Return the sum (N,) over each row's tokens, of values (N, T) of padded rows or (1, T) of joined ones."""
    if len(values) == len(lengths):
        return values.sum(dim=1)
    return torch.stack([part.sum() for part in torch.split(values[0], lengths)])


def mean_loss(rows: np.ndarray) -> float:
    """Return the mean loss per supervised token, in nats, of what `evaluate_rows` found."""
    return float(rows[:, 0].sum() / rows[:, 1].sum())


def evaluate_loss(
    model: nn.Module,
    rows: TokenRows,
    plan: TrainPlan,
    collate: Collate,
    *,
    rank: int,
    beat: Callable[[], None] = lambda: None,
) -> float:
    """Return the mean loss per supervised token over the rows, in nats; for the rest see `evaluate_rows`."""
    return mean_loss(evaluate_rows(model, rows, plan, collate, rank=rank, beat=beat))
