"""Tokens that the base model has never seen: rows for them in its embeddings and its head, and who trains those.

Whoever loads the adapter must give the base model as many rows as the tokenizer has tokens, before the adapter goes on
it: `AutoPeftModelForCausalLM.from_pretrained(folder)` does, by the tokenizer beside the adapter, and so does
`base.resize_token_embeddings(len(tokenizer))` before `PeftModel.from_pretrained(base, folder)`. What these put into the
rows doesn't matter, for the adapter replaces every row that was added. A tokenizer that fits needs nothing of this.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from job.handover import NewTokenInput
from job.train.gather import held_whole


@torch.no_grad()
def add_new_tokens(base: PreTrainedModel, vocabulary_size: int, new_tokens: Sequence[NewTokenInput]) -> list[int]:
    """Make room for a vocabulary, start every new row, and return the token ids whose rows must be trained.

    A new token starts as the mean of its pieces, in the embeddings and in the head: as close to what its text meant
    before as one row can be. A row that is added for an id of which nothing is known starts as the mean of all rows.
    """
    embeddings = base.get_input_embeddings().get_parameter("weight")
    with held_whole([embeddings]):
        known_rows = embeddings.shape[0]
    if vocabulary_size > known_rows:
        base.resize_token_embeddings(vocabulary_size, mean_resizing=False)  # the rows are filled below
    pieces: dict[int, Sequence[int]] = {row: [] for row in range(known_rows, vocabulary_size)}
    pieces |= {token.id: token.piece_ids for token in new_tokens}
    matrices = {module.get_parameter("weight") for module in find_embeddings(base).values()}  # one, if tied
    for matrix in matrices if pieces else ():
        with held_whole([matrix], to_write=True):
            _start_rows(matrix, pieces, known_rows)
    return sorted(pieces)


def _start_rows(matrix: torch.Tensor, pieces: Mapping[int, Sequence[int]], known_rows: int) -> None:
    known = matrix[:known_rows]  # (V, D)
    starts = [known[list(piece_ids) or slice(None)].mean(dim=0, dtype=torch.float32) for piece_ids in pieces.values()]
    for row, start in zip(pieces, starts, strict=True):  # written when all are read: a spare row is known, too
        matrix[row] = start


def find_embeddings(base: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the model's embeddings and its head by their full names, or the embeddings alone if there is no head."""
    wanted = [base.get_input_embeddings(), base.get_output_embeddings()]
    return {name: module for name, module in base.named_modules() if any(module is one for one in wanted)}


def is_tied(base: PreTrainedModel) -> bool:
    """Say whether the head and the embeddings are one matrix."""
    head = base.get_output_embeddings()
    return head is not None and head.get_parameter("weight") is base.get_input_embeddings().get_parameter("weight")
