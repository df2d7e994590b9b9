"""report.html stands by itself, says what is missing, and takes whatever rows and numbers a run may have."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from job.evaluation import Evaluation, LossChange, RowLoss, Sample
from job.record import RunRecord
from job.report.html import format_report

RecordFor = Callable[..., RunRecord]

VOID = {"meta", "br", "link", "img", "input", "hr"}
LOADS = {"src", "srcset", "poster", "data", "action", "xlink:href"}


class Page(HTMLParser):
    """Checks that elements are closed in order, and collects what is there."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.references: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.references += [(name, value or "") for name, value in attrs if name in LOADS | {"href"}]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "svg"} & set(self.open):
            self.text += data


def assert_stands_alone(html: str) -> Page:
    page = Page(html)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "form", "base"}
    assert [value for _, value in page.references if not value.startswith("#")] == []
    assert len(page.ids) == len(set(page.ids))
    assert {value[1:] for _, value in page.references} <= set(page.ids)
    assert not re.search(r"@import|url\((?!#)|expression", html)
    return page


def test_the_first_screen_answers_four_questions(record_for: RecordFor) -> None:
    page = assert_stands_alone(format_report(record_for()))
    first_screen = " ".join(page.text.split("Learning")[0].split())
    for part in (
        "It learned.",
        "3.034 → 1.338",
        "-1.697, 95 % interval -1.860 to -1.520",
        "20.79 → 3.81",
        "3 min 2 s, 0.404 core hours",
        "Test CPU, 1 process of 8 threads",
        "19,160 tokens in 20 steps",
        "105 tokens/s",
        "2.0 GiB a process",
        "Yes, by vLLM; not by TGI.",
        "vllm serve org/model",
        "0123456789abcdef",
        "SFT_MODEL__ID=org/model",
        "3 rows repeat another",
    ):
        assert part in first_screen, part


def test_all_that_is_known_is_on_the_page(record_for: RecordFor) -> None:
    more = {"memory_bytes": 2**30, "step_s": 9.1, "data_wait_s": 0.01}
    record = record_for(changes={"steps": [step | more for step in record_for().steps]})
    html = format_report(record)
    text = assert_stands_alone(html).text
    charts = re.findall(r'<svg [^>]*aria-label="([^"]*)"', html)
    assert charts == [
        "Loss",
        "Learning rate",
        "Gradient norm",
        "Loss of each held-out row",
        "Tokens a second",
        "Seconds a step",
        "Memory of a process, GiB",
        "Rows by length in tokens",
    ]
    for name, source in record.plan.sources.items():
        assert name == "memory" or (name in text and source in text)
    for part in ("5a" * 32, "ab" * 32, "peft", "no DoRA", "Test CPU", "Reference", "Before", "After", "docker run"):
        assert part in text
    assert "<mark>Hi.&lt;|im_end|&gt;</mark>" in html
    assert "does not say by step" not in text


@pytest.mark.parametrize(
    ("data", "changes", "said"),
    [
        ({"eval_rows": 0}, {"evaluation": None, "metrics": {}}, "No rows were held out."),
        ({}, {"evaluation": Evaluation(problems=["no time was left"]), "metrics": {}}, "no time was left"),
        ({}, {"evaluation": Evaluation()}, "No answers were generated"),
        ({}, {"acceptance": None}, "The published files were not loaded back."),
        ({}, {"engines": [], "serve_command": None}, "Which engines take it was not looked at."),
        ({}, {"steps": []}, "metrics.jsonl does not say by step how fast it went and how much memory it took."),
        ({}, {"steps": [], "evaluation": None, "metrics": {}}, "metrics.jsonl holds no step with numbers to draw."),
    ],
)
def test_what_is_missing_is_said(
    record_for: RecordFor, data: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    page = assert_stands_alone(format_report(record_for(data=data, changes=changes)))
    assert said in " ".join(page.text.split())


def test_other_peoples_text_stays_text(record_for: RecordFor) -> None:
    hostile = "</style></pre><script>alert(1)</script><img src=x onerror=alert(1)>\"'{{ 7*7 }}\x1b[2J\x00\ud800\u202e"
    sample = Sample(
        messages=[{"role": hostile, "content": hostile}],
        prompt=hostile,
        reference=hostile,
        before=hostile,
        after=hostile,
    )
    record = record_for()
    xray = record.xray | {"samples": [[{"text": hostile, "supervised": True}]], "skipped": {hostile: 1}}
    changes = {
        "evaluation": Evaluation(samples=[sample], problems=[hostile]),
        "xray": xray,
        "warnings": [hostile],
        "serve_command": hostile,
        "output": hostile,
        "given": {"model": {"id": hostile}},
    }
    html = format_report(record_for(changes=changes))
    page = assert_stands_alone(html)
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7*7 }}" in page.text
    html.encode("utf-8")
    assert "\x1b" not in html
    assert "\\x1b[2J" in page.text


def test_ten_thousand_steps_make_no_large_page(record_for: RecordFor) -> None:
    [line] = record_for().steps[:1]
    steps = [
        line | {"step": step, "loss": 1 + step % 97 / 50, "grad_norm": step % 89 / 40, "elapsed_s": 1.1 * step}
        for step in range(1, 10_001)
    ]
    html = format_report(record_for(changes={"steps": steps}))
    assert_stands_alone(html)
    assert len(html) < 150_000


def test_the_same_record_is_the_same_page(record_for: RecordFor) -> None:
    record = record_for()
    assert format_report(record) == format_report(record)


ODD = st.one_of(
    st.sampled_from(["nan", "inf", "-inf", None, True, "", [], {}, 0, -1, 1e308, -1e308, 10**400, 5e-324]),
    st.floats(),
    st.integers(),
)
CURVES = ("loss", "grad_norm", "learning_rate", "eval_loss", "tokens_per_second", "memory_bytes", "step_s")
LINE = st.dictionaries(st.sampled_from(["step", "tokens", "elapsed_s", *CURVES]), ODD)
NUMBER = st.floats()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    steps=st.lists(LINE, max_size=6),
    metrics=st.dictionaries(
        st.sampled_from(
            [
                "eval_loss",
                "eval_loss_base",
                "train_seconds",
                "tokens",
                "tokens_per_second",
                "peak_memory_bytes",
                "steps",
            ]
        ),
        ODD,
    ),
    numbers=st.tuples(NUMBER, NUMBER, NUMBER, NUMBER, NUMBER),
)
def test_odd_numbers_are_no_trouble(
    record_for: RecordFor,
    steps: list[dict[str, Any]],
    metrics: dict[str, Any],
    numbers: tuple[float, float, float, float, float],
) -> None:
    before, after, change, low, high = numbers
    loss = LossChange(
        rows=2, supervised_tokens=9, loss_base=before, loss=after, change=change, change_low=low, change_high=high
    )
    row = RowLoss(line="a:1", supervised_tokens=9, loss_base=before, loss=after)
    changes = {"steps": steps, "metrics": metrics, "evaluation": Evaluation(loss=loss, rows=[row])}
    assert_stands_alone(format_report(record_for(changes=changes)))
