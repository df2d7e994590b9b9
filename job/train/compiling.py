"""Functions compiled by torch.compile, which are taken only where they have come to the same numbers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from job.log import logger

_TOLERANCE = {  # relative, by rounding alone
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 2e-3,
    torch.float8_e4m3fn: 1e-2,  # a last bit is an eighth of a number, but few are rounded the other way
}

Function = Callable[..., Any]


def compile_tried(
    plain: Function,
    learned: Sequence[torch.Tensor],
    others: Sequence[torch.Tensor],
    *,
    what: str,
    dynamic: bool = False,
) -> Function | None:
    """Return a function compiled, once it has come to the same results and gradients of what is `learned`; else None,
    with a warning that `what` stays as it is.

    All tensors have their tokens in the last dimension but one, whose size may be another each time; if `dynamic`, so
    may any other.
    """
    from torch._inductor import config

    config.compile_threads = 1  # the kernels are few and small, and this process ends without waiting for others
    try:
        expected = _differentiate(plain, learned, others)
    except (TypeError, ValueError, RuntimeError, IndexError):  # another kind of function, in spite of its name
        return None
    compiled: Function = torch.compile(plain, dynamic=dynamic or None)
    for tensor in [] if dynamic else [*learned, *others]:
        torch._dynamo.mark_dynamic(tensor, tensor.dim() - 2)
    try:
        actual = _differentiate(compiled, learned, others)
    except Exception as error:  # noqa: BLE001 - whatever it is that this machine lacks, the plain way is there
        why = next(iter(str(error).splitlines()), type(error).__name__)
        logger.warning("%s, for compiling fails here: %s", what, why)
        return None
    for one, other in zip(actual, expected, strict=True):
        difference = ((one.float() - other.float()).norm() / other.float().norm()).item()
        if one.dtype != other.dtype or not difference <= _TOLERANCE[other.dtype]:
            logger.warning("%s: what was compiled comes to other numbers (%.2g)", what, difference)
            return None
    return compiled


def _differentiate(
    function: Function, learned: Sequence[torch.Tensor], others: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Return the results of a function, and the gradients of what is learned for them squared."""
    for tensor in learned:
        tensor.requires_grad_()
    results = function(*learned, *others)
    results = list(results) if isinstance(results, tuple) else [results]
    if not learned:
        return results
    total = sum(result.float().square().sum() for result in results)
    return [*results, *torch.autograd.grad(total, list(learned))]
