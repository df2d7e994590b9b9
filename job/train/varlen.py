"""Attention within each document of a joined sequence, without a mask: the work grows with the documents' lengths
squared, not with the sequence's. transformers knows it as an attention of the name `varlen`.

On a GPU it is PyTorch's own kernel for sequences of different lengths, elsewhere one call of scaled dot product
attention for each document. A batch that isn't joined by `JoinRows` gets transformers' `sdpa` with its mask.
"""

from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from job.memory.estimate import SHORT_TOKENS
from job.train.dataset import Row, join_rows

_LEAST_CAPABILITY = (8, 0)  # of PyTorch's FlashAttention, and the rest is what it takes
_MOST_HEAD_SIZE = 256
_HEAD_SIZE_UNIT = 8
_KERNEL_DTYPES = (torch.bfloat16, torch.float16)
_UNKNOWN = ("softcap", "s_aux", "position_bias")  # what an architecture may ask of its attention


class JoinRows:
    """Joins rows into one sequence, as `join_rows` does, and says where each begins to the attention that asks."""

    def __init__(self, attention: str) -> None:
        self._attention = attention

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        """Return input_ids, labels and position_ids, each (1, T) int64, and what the attention takes."""
        batch: dict[str, Any] = join_rows(rows)
        if self._attention not in ("varlen", "flash_attention_2"):
            return batch
        lengths = [len(row["input_ids"]) for row in rows]
        borders = nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()  # (N + 1,)
        # Under transformers' names: its flash_attention_2 would find them in each layer, and wait for the GPU there.
        batch |= {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
        batch |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
        if self._attention == "varlen":
            batch["document_lengths"] = lengths
            # transformers takes a mask of four dimensions for a finished one: it builds none, and doesn't look for
            # borders in the positions, which would wait for the GPU. Nothing can take this one for a real mask.
            batch["attention_mask"] = torch.empty(1, 1, 1, 0, dtype=torch.bool)
        return batch


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    document_lengths: list[int] | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Return what each token of T sees, (1, T, H, D), given its query (1, H, T, D), and keys and values (1, K, T, D).

    Raises ValueError where the architecture asks for what isn't here: the plan doesn't choose it there.
    """
    if document_lengths is None:
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return found
    if asked := [name for name in _UNKNOWN if others.get(name) is not None]:
        raise ValueError(f"attention by document has no {asked[0]}")
    if dropout == 0 and _has_kernel(query):
        return _attend_by_kernel(query, key, value, scaling, sliding_window, others), None
    queries, keys, values = (torch.split(part, document_lengths, dim=2) for part in (query, key, value))
    attended = [
        _attend_document(*document, dropout, scaling, sliding_window)
        for document in zip(queries, keys, values, strict=True)
    ]
    return torch.cat(attended, dim=1), None


def _attend_document(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    length = query.shape[2]
    is_cut = sliding_window is not None and length > sliding_window
    # For so short documents in 16 bits, plain products are faster than PyTorch's fused attention for CPUs.
    is_short = length <= SHORT_TOKENS and query.device.type == "cpu" and query.dtype in _KERNEL_DTYPES
    with sdpa_kernel(SDPBackend.MATH) if is_short else nullcontext():
        attended = nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=_band(length, sliding_window, query.device) if is_cut and sliding_window is not None else None,
            dropout_p=dropout,
            is_causal=not is_cut,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return attended.transpose(1, 2)  # (1, t, H, D)


def _band(length: int, window: int, device: torch.device) -> torch.Tensor:
    """Return the mask (t, t) of tokens that see themselves and those before them, `window` in all."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)


def _attend_by_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    sliding_window: int | None,
    batch: dict[str, Any],
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    dtype = _kernel_dtype(query)
    # An index would have a backward pass of its own, which writes zeros and then a copy; this has none.
    query, key, value = (part.squeeze(0).transpose(0, 1).to(dtype) for part in (query, key, value))  # (T, H, D)
    borders, longest = batch["cu_seq_lens_q"], batch["max_length_q"]
    attended: Any = varlen_attn(  # a tensor, unless more is asked for
        query,
        key,
        value,
        borders,
        borders,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    found: torch.Tensor = attended[None]
    return found


def _has_kernel(query: torch.Tensor) -> bool:
    size = query.shape[-1]
    return (
        query.is_cuda
        and _kernel_dtype(query) in _KERNEL_DTYPES
        and size <= _MOST_HEAD_SIZE
        and size % _HEAD_SIZE_UNIT == 0
        and _capability(query.device) >= _LEAST_CAPABILITY
    )


def _kernel_dtype(query: torch.Tensor) -> torch.dtype:
    # autocast knows PyTorch's other attention, not this one
    is_cast = torch.is_autocast_enabled(query.device.type)
    return torch.get_autocast_dtype(query.device.type) if is_cast else query.dtype


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


AttentionInterface.register("varlen", attend)
AttentionMaskInterface.register("varlen", sdpa_mask)
