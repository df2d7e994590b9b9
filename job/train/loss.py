"""The loss of each supervised token, and how it is computed."""

from typing import Any

import torch
from torch import nn

from job.plan import TrainPlan
from job.train.dataset import IGNORED


def find_losses(model: nn.Module, batch: dict[str, Any], labels: torch.Tensor, plan: TrainPlan) -> torch.Tensor:
    """Return the loss of each label, in nats: (B, T) float32 for labels (B, T) int64, 0 where there is none.

    No gradient is taken. `model` computes its loss as the plan says: for the chunked one, `chunk_loss` has changed it.
    """
    with (
        torch.no_grad(),
        torch.autocast(labels.device.type, dtype=getattr(torch, plan.dtype), enabled=plan.dtype != "float32"),
    ):
        if plan.loss == "chunked":
            chunked: torch.Tensor = model(**batch, labels=labels, by_token=True).loss
            return chunked
        logits = model(**batch).logits[:, :-1]  # (B, T - 1, V)
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none"
    )
    return nn.functional.pad(losses.view(len(labels), -1), (1, 0))  # nothing predicts the first token
