"""What all processes tell each other outside of the steps themselves; alone, a process tells itself.

Nothing is pickled. Everything here is collective: all processes must call it, in the same order.
"""

import torch
import torch.distributed as dist

from job.plan import TrainPlan


def broadcast_text(text: str, plan: TrainPlan, *, source: int = 0) -> str:
    """Return the text that the process of rank `source` gives; what others give doesn't matter."""
    if plan.world_size == 1:
        return text
    content = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8).to(plan.device)
    size = torch.tensor(len(text.encode()), device=plan.device)
    dist.broadcast(size, source)
    if dist.get_rank() != source:
        content = torch.empty(max(1, int(size)), dtype=torch.uint8, device=plan.device)
    dist.broadcast(content, source)
    return bytes(content.cpu().numpy().tobytes()[: int(size)]).decode()


def broadcast_tensor(
    tensor: torch.Tensor | None, shape: list[int], dtype: torch.dtype, plan: TrainPlan
) -> torch.Tensor:
    """Return rank 0's tensor, of that shape and type, on the plan's device; others give None."""
    if plan.world_size == 1 and tensor is not None:
        return tensor.to(plan.device)
    received = torch.empty(shape, dtype=dtype, device=plan.device) if tensor is None else tensor.to(plan.device)
    dist.broadcast(received, 0)
    return received


def gather_bytes(content: torch.Tensor, plan: TrainPlan) -> list[torch.Tensor]:
    """Return the content, uint8 (N,) with the same N everywhere, of each process by rank, in host memory."""
    if plan.world_size == 1:
        return [content.cpu()]
    mine = content.to(plan.device)
    gathered = [torch.empty_like(mine) for _ in range(plan.world_size)]
    dist.all_gather(gathered, mine)
    return [one.cpu() for one in gathered]


def find_maximum(values: list[int], plan: TrainPlan) -> list[int]:
    """Return the largest of what the processes give, for each place."""
    if plan.world_size == 1:
        return values
    most = torch.tensor(values, device=plan.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    largest: list[int] = most.tolist()
    return largest
