"""The result as text fits its terminal and answers what the page answers."""

from collections.abc import Callable

import pytest

from job.evaluation import Evaluation, Sample
from job.log import Terminal
from job.record import RunRecord
from job.report.columns import count_columns
from job.report.text import draw_curve, format_result

RecordFor = Callable[..., RunRecord]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_every_line_fits(record_for: RecordFor, width: int) -> None:
    long = Sample(messages=None, prompt="問" * 300, reference=None, before="word " * 100, after="\x1b[2J答\n" * 100)
    changes = {"evaluation": Evaluation(samples=[long]), "serve_command": "vllm serve m", "output": "/out"}
    record = record_for(changes=changes)
    text = format_result(record, Terminal(width, has_colour=False))
    assert max(count_columns(line) for line in text.split("\n")) <= width
    assert "\x1b" not in text


def test_it_answers_what_the_page_answers(record_for: RecordFor) -> None:
    text = format_result(record_for(), Terminal(120, has_colour=False))
    assert text.startswith(
        "It learned. The held-out loss fell from 3.034 to 1.338, by 1.697 (95 % interval 1.520 to 1.860)."
    )
    for part in (
        "Loss        2.727 █",
        " 1.000\n",
        "3.0344 -> 1.3376, perplexity 20.79 -> 3.81, 12 rows",
        "Training time: 3 min 2 s, 0.404 core hours",
        "Asked       請問多久會收到商品",
        "  before    I am not sure.",
        "  after     您好 這裡是山茶小舖",
        "Serve       taken by vLLM",
        "            not by TGI: no DoRA",
        "            vllm serve org/model --enable-lora",
        "Report      s3://bucket/adapters/0123456789abcdef/report.html",
    ):
        assert part in text


def test_the_verdict_has_its_colour_on_a_terminal(record_for: RecordFor) -> None:
    assert format_result(record_for(), Terminal(200, has_colour=True)).startswith("\x1b[1;32mIt learned.")


def test_what_is_missing_is_said(record_for: RecordFor) -> None:
    nothing = {"evaluation": None, "acceptance": None, "engines": [], "serve_command": None, "metrics": {}, "steps": []}
    text = format_result(record_for(data={"eval_rows": 0}, changes=nothing), Terminal(120, has_colour=False))
    assert "No rows were held out." in text
    assert "Which engines take it was not looked at." in text


@pytest.mark.parametrize(
    ("values", "width", "curve"),
    [
        ([1.0, 2.0, 3.0], 10, "▁▅█"),
        ([2.0, 2.0], 10, "▁▁"),
        ([5.0], 10, "▁"),
        ([8.0, 8.0, 1.0, 1.0], 2, "█▁"),
    ],
)
def test_a_curve_is_bars_between_lowest_and_highest(values: list[float], width: int, curve: str) -> None:
    assert draw_curve(values, width) == curve
