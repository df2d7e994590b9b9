"""What is refused and what is warned of, always with the number and the setting."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from job.data import Selection, XRay
from job.data.split import TooLong
from job.data.turn_end import TurnEnd
from job.data.xray import count_lengths
from job.errors import DataError
from job.limits import find_warnings, refuse_bad_rows, refuse_dropped_rows
from job.settings_groups import DataSettings


def settings(**values: object) -> DataSettings:
    return DataSettings.model_validate({"uri": "rows.jsonl", **values})


@dataclass
class Tokens:
    """What the limits read of tokenised data."""

    rows_read: int = 100
    bad_rows: int = 0
    bad_reasons: dict[str, int] = field(default_factory=dict)
    shown_bad_rows: tuple[str, ...] = ()
    bad_rows_path: Path = Path("bad_rows.jsonl")
    lengths_tokens: np.ndarray = field(default_factory=lambda: np.full(100, 30))


BAD = Tokens(bad_rows=11, bad_reasons={"column `a` is null": 11}, shown_bad_rows=("a.jsonl:3: column `a` is null",))


def keep(path: Path) -> str:
    return f"s3://out/{path.name}"


def refuse(data: Tokens, **values: object) -> str:
    with pytest.raises(DataError) as caught:
        refuse_bad_rows(data, settings(**values), "SFT_DATA__URI", keep)  # type: ignore[arg-type]
    return f"{caught.value.message}\n{caught.value.hint}"


def test_bad_rows_end_the_job_with_all_of_them_kept() -> None:
    message = refuse(BAD)
    assert "SFT_DATA__URI: 11 of 100 rows can't be trained on:\n  a.jsonl:3: column `a` is null\n" in message
    assert "and 10 more" in message
    assert "all of them are in s3://out/bad_rows.jsonl" in message
    assert "SFT_DATA__BAD_ROWS=skip" in message


def test_too_many_bad_rows_are_not_skipped() -> None:
    message = refuse(BAD, bad_rows="skip")
    assert "11 of 100 rows can't be trained on, 11.0%, and SFT_DATA__MAX_BAD_FRACTION=0.1 allows no more" in message


def test_without_a_good_row_nothing_is_skipped() -> None:
    data = Tokens(rows_read=11, bad_rows=11, shown_bad_rows=BAD.shown_bad_rows)
    for values in ({}, {"bad_rows": "skip", "max_bad_fraction": 1}):
        assert "none of the 11 rows can be trained on:\n  a.jsonl:3" in refuse(data, **values)


def test_few_bad_rows_are_skipped_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    refuse_bad_rows(BAD, settings(bad_rows="skip", max_bad_fraction=0.11), "SFT_DATA__URI", keep)  # type: ignore[arg-type]
    assert "11 of 100 rows" in caplog.text
    assert "quarantine.jsonl (11: column `a` is null)" in caplog.text
    caplog.clear()
    refuse_bad_rows(Tokens(), settings(), "SFT_DATA__URI", keep)  # type: ignore[arg-type]
    assert not caplog.text


@pytest.mark.parametrize(
    ("too_long", "segments", "values", "words"),
    [
        (TooLong(rows=11, left_out=11), 89, {}, ["11 of 100 rows, 11.0%, are longer than 16 tokens", "=split"]),
        (TooLong(rows=100, left_out=100), 0, {"max_dropped_fraction": 1}, ["none of the 100 rows", "shortest has 30"]),
        (
            TooLong(rows=40, left_out_unsupervised=40),
            60,
            {"truncation": "keep_start"},
            ["40 of 100 rows, 40.0%, have nothing of what is supervised within 16 tokens"],
        ),
    ],
)
def test_too_many_long_rows_are_refused(
    too_long: TooLong, segments: int, values: dict[str, object], words: list[str]
) -> None:
    selection = Selection(np.zeros((segments, 3), np.int64), np.ones(segments, np.int64), too_long)
    with pytest.raises(DataError) as caught:
        refuse_dropped_rows(selection, Tokens(), settings(**values), 16, "SFT_DATA__URI")  # type: ignore[arg-type]
    for word in [*words, "SFT_DATA__MAX_LENGTH"]:
        assert word in f"{caught.value.message} {caught.value.hint}"


def test_few_long_rows_are_allowed() -> None:
    selection = Selection(np.zeros((90, 3), np.int64), np.ones(90, np.int64), TooLong(rows=10, left_out=10))
    refuse_dropped_rows(selection, Tokens(), settings(), 16, "SFT_DATA__URI")  # type: ignore[arg-type]


GOOD = XRay(
    files=(),
    read=80,
    kept=80,
    skipped={},
    too_long=TooLong(),
    max_length_tokens=64,
    truncation="drop",
    train=72,
    held_out=8,
    held_out_in_train=0,
    tokens=1000,
    supervised_tokens=400,
    lengths=count_lengths(np.arange(1, 60)),
    turn_end=TurnEnd({"</s>": 80}, 80, ("</s>",), "</s>", None),
    duplicates=0,
    with_oddity={},
    samples=(),
)


def test_good_data_has_no_warning() -> None:
    assert find_warnings(GOOD) == []


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        (
            {"too_long": TooLong(5, left_out=5, lost_tokens=500, lost_supervised_tokens=90)},
            "5 of 80 rows are longer than 64 tokens: 5 left out; 500 tokens are lost, 90 of them supervised",
        ),
        (
            {"turn_end": TurnEnd({"<|e|>": 80}, 0, ("</s>",), None, "<|e|>")},
            "80 of 80 rows end in <|e|>, and generation with this model stops at </s>",
        ),
        ({"turn_end": TurnEnd({"</s>": 70}, 70, ("</s>",), None, None)}, "10 of 80 rows don't end in </s>"),
        ({"held_out": 0}, "no rows are held out"),
        ({"held_out_in_train": 3}, "3 of 8 held-out rows are trained on as well"),
        ({"duplicates": 4}, "4 of 80 rows repeat another row"),
        ({"supervised_tokens": 10}, "only 1.0% of the tokens are supervised (10 of 1,000)"),
        ({"with_oddity": {"control characters": 2}}, "2 of 80 rows hold control characters"),
    ],
)
def test_each_warning_has_its_number(changes: dict[str, object], warning: str) -> None:
    (found,) = find_warnings(replace(GOOD, **changes))  # type: ignore[arg-type]
    assert found.startswith(warning)
