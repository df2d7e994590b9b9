"""What a class of modules computes, proved on a stand-in for one of them: some architectures give a well-known name to
something of their own."""

import inspect
from types import SimpleNamespace
from typing import Any

import torch


def compute_by(kind: Any, hidden: torch.Tensor, **parts: Any) -> torch.Tensor | None:
    """Return what modules of a class make of hidden (..., D) if they have these parts and no others; None where they
    take more than that."""
    if len(inspect.signature(kind.forward).parameters) != len(("self", "hidden")):
        return None  # a gate that may be given, for one, would make it another
    try:
        found = kind.forward(SimpleNamespace(**parts), hidden)
    except (AttributeError, TypeError):  # it has other parts
        return None
    return found if isinstance(found, torch.Tensor) else None
