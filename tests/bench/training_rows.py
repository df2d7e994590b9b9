"""The rows that `make bench` trains on: short English conversations of the chatterbot corpus (BSD), one a line, in the
form that every trainer reads.

The corpus is a PyPI package, which the bench has beside TRL; what is drawn from it depends on the seed alone.
"""

import argparse
import json
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_SEED = 0


@dataclass(frozen=True)
class Rows:
    """Files of rows to train on and to measure the loss on, and the tokens of each row of the first."""

    train: Path
    held_out: Path
    lengths_tokens: list[int]

    @property
    def tokens(self) -> int:
        return sum(self.lengths_tokens)

    def describe(self) -> str:
        lengths = self.lengths_tokens
        mean, middle = statistics.mean(lengths), statistics.median(lengths)
        return (
            f"{len(lengths)} conversations of the chatterbot corpus, {self.tokens:,} tokens: "
            f"{mean:.0f} on average, {middle:.0f} in the middle, {max(lengths)} at most"
        )


def write_rows(corpus: Path, model: Path, folder: Path, *, train_rows: int, held_out_rows: int, limit: int) -> Rows:
    """Write the rows into a folder; `limit` is the length in tokens that none exceeds.

    Training rows have a folder of their own, for `trl sft` reads whole folders.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    conversations = sorted(set(_read_conversations(corpus)))
    random.Random(_SEED).shuffle(conversations)
    chosen: list[tuple[str, int]] = []
    for turns in conversations:
        row = {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]}
        length = len(tokenize(tokenizer, row))
        if length <= limit:
            chosen.append((json.dumps(row), length))
    if len(chosen) < train_rows + held_out_rows:
        raise SystemExit(f"the corpus has {len(chosen)} conversations: fewer than {train_rows} + {held_out_rows}")
    train, held_out = folder / "train" / "train.jsonl", folder / "held_out.jsonl"
    train.parent.mkdir()
    train.write_text("".join(f"{line}\n" for line, _ in chosen[:train_rows]))
    held_out.write_text("".join(f"{line}\n" for line, _ in chosen[train_rows : train_rows + held_out_rows]))
    return Rows(train, held_out, [length for _, length in chosen[:train_rows]])


def training_parser(description: str | None) -> argparse.ArgumentParser:
    """Return the options of a script that trains on the rows, as `competitors.py` passes them."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--batch", type=int, required=True, help="rows in a step")
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--seed", type=int, required=True)
    return parser


def read_tokens(tokenizer: Any, path: Path) -> list[list[int]]:
    """Return the token ids of each row of a file."""
    return [tokenize(tokenizer, json.loads(line)) for line in path.read_text().splitlines()]


def tokenize(tokenizer: Any, row: dict[str, Any]) -> list[int]:
    """Return the token ids of a conversation, as the model's chat template writes it."""
    text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _read_conversations(corpus: Path) -> Iterator[tuple[str, ...]]:
    for path in sorted((corpus / "english").glob("*.yml")):
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            whole = turns[: len(turns) // 2 * 2]  # a question without its answer teaches nothing
            if whole and all(isinstance(turn, str) and turn.strip() for turn in whole):
                yield tuple(whole)
