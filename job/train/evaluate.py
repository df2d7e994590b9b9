"""The held-out loss, shared among all processes."""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from job.plan import TrainPlan
from job.train.dataset import IGNORED, Collate, TokenRows
from job.train.loss import sum_losses


@torch.no_grad()
def evaluate_loss(
    model: nn.Module,
    rows: TokenRows,
    plan: TrainPlan,
    collate: Collate,
    *,
    rank: int,
    beat: Callable[[], None] = lambda: None,
) -> float:
    """Return the mean loss per supervised token over the rows, in nats, shared among the processes.

    Each process must call it; all get the same number. `beat` is called after each micro batch.
    """
    device = torch.device(plan.device)
    sums = torch.zeros(2, dtype=torch.float64)  # loss, supervised tokens
    was_training = model.training
    model.eval()
    stride = plan.micro_batch_size * plan.world_size
    mine = range(rank, len(rows), plan.world_size)
    for turn in range(math.ceil(len(rows) / stride)):  # as often on every process: an engine may gather weights in it
        indices = mine[turn * plan.micro_batch_size : (turn + 1) * plan.micro_batch_size]
        batch = collate([rows[index] for index in indices or [0]])
        batch = {name: values.to(device) for name, values in batch.items()}
        labels = batch.pop("labels")  # (B, T)
        loss = sum_losses(model, batch, labels, plan)
        if indices:
            sums += torch.tensor([loss.item(), (labels[:, 1:] != IGNORED).sum().item()], dtype=torch.float64)
        beat()
    model.train(was_training)
    if plan.world_size > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)
    return (sums[0] / sums[1]).item()
