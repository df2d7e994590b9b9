"""The loss over chunks of the supervised tokens, so that the logits of all tokens never exist at once.

Logits are a model's largest activations: 4,096 tokens with a vocabulary of 128k are 2 GiB in float32, and transformers'
own loss holds them several times over. Here the head runs on supervised positions only, a chunk at a time, and each
chunk's gradients are taken while its logits are there; they are kept instead, and no head runs twice. (Liger's fused
kernel has the same idea: https://arxiv.org/abs/2410.10989, section 3.2.)
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from job.errors import ConfigError
from job.memory.estimate import LOSS_CHUNK_TOKENS
from job.plan import TrainPlan
from job.train.dataset import IGNORED, Collate, Row

_PROOF_TOKENS = 128
_PROOF_LOGITS = 100.0  # mean size that logits are brought to, beyond any cap
_LOGITS_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 6e-2}  # relative, by rounding alone
_LOSS_TOLERANCE = 1e-5  # relative, of the same logits in float32
_SLICE_BYTES = 6 * 2**20  # of logits in float32: they stay in a CPU's cache from one pass over them to the next


def chunk_loss(model: PeftModel, *, same_on_all_processes: bool = False) -> None:
    """Have the base model compute the loss in chunks whenever it is given labels; its output then has no logits.

    Its forward takes `num_items_in_batch`, the supervised tokens that the sum of the losses is divided by, as
    transformers' own models do; without it the loss is the mean. With `by_token`, which takes no gradient, the loss is
    (B, T): that of each label, 0 where there is none. Batches of `MarkSupervised` need not wait for a GPU to count.
    Do it before the Trainer looks at the model. `same_on_all_processes`: as many chunks on each, for an engine that
    gathers the head's weights for each.
    """
    base: PreTrainedModel = model.get_base_model()
    full_forward = base.forward

    def forward(
        *,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        supervised: torch.Tensor | None = None,
        by_token: bool = False,
        is_proof: bool = False,
        **batch: Any,
    ) -> Any:
        if is_proof:
            _prove(base, full_forward, **batch)
        if labels is None:
            return full_forward(**batch)
        # The head is called here, inside of the model's forward, because sharding engines gather its weights there.
        hidden = base.base_model(**batch).last_hidden_state  # (B, T, D)
        places = find_supervised(labels) if supervised is None else supervised  # (N,)
        chosen, aims = hidden.flatten(0, 1)[places], labels.flatten()[places + 1]  # (N, D), (N,)
        chunks = _count_chunks(aims, same_on_all_processes=same_on_all_processes)
        if by_token:
            losses = torch.zeros(labels.shape, device=labels.device)
            losses.view(-1)[places + 1] = _find_losses(base, chosen, aims, chunks)
            return CausalLMOutputWithPast(loss=losses)
        total = _sum_losses(base, chosen, aims, chunks)
        return CausalLMOutputWithPast(loss=total / (len(aims) if num_items_in_batch is None else num_items_in_batch))

    base.forward = forward


def find_supervised(labels: torch.Tensor) -> torch.Tensor:
    """Return the places (N,) of the tokens whose next one is supervised, given labels (B, T), among all B x T."""
    return (nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED) != IGNORED).flatten().nonzero()[:, 0]


class MarkSupervised:
    """Joins rows as another collation does, and marks what is supervised before the batch is on a GPU: there, nobody
    would know how much that is without waiting."""

    def __init__(self, collate: Collate) -> None:
        self._collate = collate

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        """Return the batch with its places `supervised`, (N,) int64."""
        batch = self._collate(rows)
        return batch | {"supervised": find_supervised(batch["labels"])}


def _count_chunks(targets: torch.Tensor, *, same_on_all_processes: bool) -> int:
    # Without any supervised token, the head runs on nothing: every weight must get a gradient on every process.
    chunks = max(1, math.ceil(len(targets) / LOSS_CHUNK_TOKENS))
    if same_on_all_processes:
        most = torch.tensor(chunks, device=targets.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        chunks = int(most)
    return chunks


def _sum_losses(base: PreTrainedModel, chosen: torch.Tensor, targets: torch.Tensor, chunks: int) -> torch.Tensor:
    """Return the sum of the losses of chosen hidden states (N, D), given their targets (N,): a float32 scalar."""
    if not torch.is_grad_enabled():
        return _find_losses(base, chosen, targets, chunks).sum()
    weights = [weight for weight in base.parameters() if weight.requires_grad]
    total: torch.Tensor = _ChunkedLoss.apply(base.get_output_embeddings(), chunks, chosen, targets, *weights)  # type: ignore[no-untyped-call]
    return total


@torch.no_grad()
def _find_losses(base: PreTrainedModel, chosen: torch.Tensor, targets: torch.Tensor, chunks: int) -> torch.Tensor:
    """Return the loss (N,) of each of the chosen hidden states (N, D)."""
    head = base.get_output_embeddings()
    pieces = zip(chosen.tensor_split(chunks), targets.tensor_split(chunks), strict=True)
    return torch.cat([_lose(head(piece), aims) for piece, aims in pieces])


def _lose(logits: torch.Tensor, targets: torch.Tensor, *, differentiate: bool = False) -> torch.Tensor:
    """Return the losses (n,) of logits (n, V), float32; if told so, in the logits' place is then the gradient of their
    sum.

    Autograd would take several times as many passes over memory for the same numbers.
    """
    losses = []
    for piece, aims in _cut(logits, targets):
        logarithms = torch.log_softmax(piece, dim=-1, dtype=torch.float32)  # of the probabilities
        losses.append(-logarithms.gather(1, aims))
        if differentiate:
            aimed_at = torch.full_like(aims, -1, dtype=torch.float32)
            piece.copy_(logarithms.exp_().scatter_add_(1, aims, aimed_at))
    return torch.cat(losses)[:, 0]


def _cut(logits: torch.Tensor, targets: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield a few rows of logits (n, V) at a time with their targets (n, 1), on a GPU all of them."""
    few = _SLICE_BYTES // (logits.shape[1] * torch.float32.itemsize) if logits.device.type == "cpu" else len(logits)
    rows = max(1, few)
    return zip(torch.split(logits, rows), torch.split(targets[:, None], rows), strict=True)


class _ChunkedLoss(torch.autograd.Function):
    """Sums the losses of chosen hidden states (N, D) under a head, given their targets (N,).

    `weights` are all that may be trained in the head: PEFT hides some of them outside of it (rows of tied embeddings).
    """

    @staticmethod
    def forward(
        ctx: Any, head: nn.Module, chunks: int, chosen: torch.Tensor, targets: torch.Tensor, *weights: torch.Tensor
    ) -> torch.Tensor:
        total = torch.zeros((), device=chosen.device)
        by_hidden: list[torch.Tensor] = []
        by_weight: list[torch.Tensor | None] = [None] * len(weights)
        for piece, aims in zip(chosen.tensor_split(chunks), targets.tensor_split(chunks), strict=True):
            with torch.enable_grad():
                leaf = piece.detach().requires_grad_()
                logits = head(leaf)  # (n, V)
            gradient = logits.detach()
            total += _lose(gradient, aims, differentiate=True).sum()
            with torch.autocast(chosen.device.type, enabled=False):  # what ran under it goes back in the same precision
                first, *others = torch.autograd.grad(logits, [leaf, *weights], gradient, allow_unused=True)
            by_hidden.append(first)
            by_weight = _add(by_weight, others)
        ctx.save_for_backward(torch.cat(by_hidden), *by_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # In place: a head that is trained whole is large. PyTorch refuses to go back a second time then.
        scaled = [None if gradient is None else gradient.mul_(scale) for gradient in ctx.saved_tensors]
        return (None, None, scaled[0], None, *scaled[1:])


def _add(sums: Sequence[torch.Tensor | None], terms: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    return [
        term if one is None else one if term is None else one.add_(term) for one, term in zip(sums, terms, strict=True)
    ]


@torch.no_grad()
def check_loss_can_be_chunked(model: nn.Module, plan: TrainPlan, row: Row) -> None:
    """Prove that the base model's logits are its head's output and nothing more, and its loss their cross entropy.

    `model` is what `chunk_loss` was called on, or an engine's wrapper around it. Raises ConfigError where they aren't:
    some architectures scale or cap logits, or add a loss of their own.
    """
    ids = row["input_ids"][None, :_PROOF_TOKENS].to(plan.device)  # (1, T)
    was_training = model.training
    model.eval()
    with torch.autocast(plan.device, dtype=getattr(torch, plan.dtype), enabled=plan.dtype != "float32"):
        model(input_ids=ids, is_proof=True)
    model.train(was_training)


def _prove(base: PreTrainedModel, full_forward: Callable[..., Any], *, input_ids: torch.Tensor, **batch: Any) -> None:
    head = base.get_output_embeddings()
    whole = full_forward(input_ids=input_ids, labels=input_ids, **batch)
    plain = nn.functional.cross_entropy(whole.logits[0, :-1].float(), input_ids[0, 1:])
    if not (whole.loss - plain).abs() <= _LOSS_TOLERANCE * plain:
        _refuse("its loss is more than the cross entropy")
    # Logits of a model that knows little are so small that a cap hardly shows.
    size = _PROOF_LOGITS / whole.logits.float().abs().mean().item()
    hook = head.register_forward_hook(lambda _head, _inputs, logits: logits * size)
    actual = full_forward(input_ids=input_ids, **batch).logits.float()  # (1, T, V)
    expected = head(base.base_model(input_ids=input_ids, **batch).last_hidden_state)
    hook.remove()
    difference = (actual - expected.float()).abs().mean() / expected.float().abs().mean()
    if not difference <= _LOGITS_TOLERANCE[base.dtype]:
        _refuse("its logits are more than its head's output")


def _refuse(reason: str) -> NoReturn:
    raise ConfigError(
        f"SFT_TRAIN__LOSS=chunked: this model's loss can't be computed in chunks, for {reason}",
        hint="set SFT_TRAIN__LOSS=full",
    )
