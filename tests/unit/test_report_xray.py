"""The X-ray as text fits its terminal and shows what is learned."""

import re
from dataclasses import replace

import numpy as np
import pytest

from job.data import Piece, XRay
from job.data.split import TooLong
from job.data.turn_end import TurnEnd
from job.data.xray import FileRows, count_lengths
from job.log import Terminal
from job.report.xray import format_xray

XRAY = XRay(
    files=(
        FileRows("s3://bucket/a/long/folder/name/train.jsonl", "question/answer, from the columns `q` and `a`", 80, 2),
    ),
    read=82,
    kept=80,
    skipped={"column `a` is null": 2},
    too_long=TooLong(2, left_out=2, lost_tokens=900, lost_supervised_tokens=30),
    max_length_tokens=64,
    truncation="drop",
    train=144,
    held_out=8,
    held_out_in_train=1,
    tokens=1000,
    supervised_tokens=400,
    lengths=count_lengths(np.arange(1, 81)),
    turn_end=TurnEnd({"<|im_end|>": 79, "</s>": 1}, 79, ("<|im_end|>",), "<|im_end|>", None),
    duplicates=3,
    with_oddity={},
    samples=(
        (Piece("<|im_start|>user\n退貨" + "很長的問題" * 40 + "\n", False), Piece("可以的\n再見<|im_end|>", True)),
        (Piece("\x1b[2Jforged\r", False), Piece("word " * 100, True)),
    ),
)


def columns(line: str) -> int:
    return sum(2 if "\u2e80" <= character <= "\uffef" else 1 for character in re.sub(r"\x1b\[[0-9;]*m", "", line))


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("has_colour", [True, False])
def test_every_line_fits(width: int, has_colour: bool) -> None:
    lines = format_xray(XRAY, Terminal(width, has_colour)).split("\n")
    assert max(columns(line) for line in lines if "s3://" not in line) <= width


def test_the_numbers_are_there() -> None:
    text = format_xray(XRAY, Terminal(200, has_colour=False))
    for part in (
        "82 read, 80 can be used; 144 to train on, 8 held out",
        "2 skipped: column `a` is null",
        "80 rows, weight 2, question/answer, from the columns `q` and `a`",
        "1,000 to train on, 400 of them supervised (40%)",
        "p50 41, p90 73, p99 80, max 80 tokens a row; max_length 64",
        "2 rows are longer (drop): 900 tokens lost, 30 of them supervised",
        "79 of 80 rows teach <|im_end|>, which generation stops at",
        "1 rows end in </s>, which generation does not stop at",
        "<|im_end|> is the padding too",
        "3 rows repeat another; 1 of 8 held-out rows are trained on",
    ):
        assert part in text


def test_supervised_text_is_marked_on_each_of_its_lines() -> None:
    plain = format_xray(XRAY, Terminal(80, has_colour=False))
    assert "[[可以的]]\n   │ [[再見<|im_end|>]]" in plain
    assert "\x1b" not in plain
    coloured = format_xray(XRAY, Terminal(80, has_colour=True))
    assert "\x1b[1;32m可以的\x1b[0m\n   │ \x1b[1;32m再見<|im_end|>\x1b[0m" in coloured


def test_text_cannot_drive_the_terminal() -> None:
    assert "\\x1b[2Jforged\\x0d" in format_xray(XRAY, Terminal(80, has_colour=True))


def test_many_lines_and_files_are_cut_with_their_number() -> None:
    long = replace(XRAY, samples=((Piece("line\n" * 40, True),),), files=XRAY.files * 13)
    text = format_xray(long, Terminal(80, has_colour=False))
    assert "(28 more lines)" in text
    assert "and 3 more files" in text
