"""The loss per supervised token, and how it is computed."""

import torch
from torch import nn

from job.plan import TrainPlan
from job.train.dataset import IGNORED


def sum_losses(model: nn.Module, batch: dict[str, torch.Tensor], labels: torch.Tensor, plan: TrainPlan) -> torch.Tensor:
    """Return the sum of the loss over the supervised tokens of a batch, in nats; labels (B, T) int64."""
    shifted = labels[:, 1:]  # (B, T - 1)
    with torch.autocast(labels.device.type, dtype=getattr(torch, plan.dtype), enabled=plan.dtype != "float32"):
        if plan.loss == "chunked":
            chunked: torch.Tensor = model(**batch, labels=labels, num_items_in_batch=1).loss
            return chunked
        logits = model(**batch).logits[:, :-1]  # (B, T - 1, V)
    return torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(), shifted.reshape(-1), ignore_index=IGNORED, reduction="sum"
    )
