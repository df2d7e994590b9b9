"""The verdict on a run says no more than its held-out rows can tell."""

from collections.abc import Callable
from typing import Any

import pytest

from job.evaluation import Evaluation, LossChange
from job.record import RunRecord
from job.report.verdict import judge_learning

RecordFor = Callable[..., RunRecord]


def change(before: float, after: float, low: float, high: float, rows: int = 12) -> LossChange:
    return LossChange(
        rows=rows,
        supervised_tokens=100,
        loss_base=before,
        loss=after,
        change=after - before,
        change_low=low,
        change_high=high,
    )


@pytest.mark.parametrize(
    ("found", "kind", "sentence"),
    [
        (
            change(3.0, 1.5, -1.8, -1.2),
            "learned",
            "It learned. The held-out loss fell from 3.000 to 1.500, by 1.500 (95 % interval 1.200 to 1.800).",
        ),
        (
            change(3.0, 3.5, 0.2, 0.8),
            "worse",
            "It got worse. The held-out loss rose from 3.000 to 3.500, by 0.500 (95 % interval 0.200 to 0.800).",
        ),
        (
            change(3.0, 2.9, -0.3, 0.1),
            "unclear",
            "Too close to call. The held-out loss fell from 3.000 to 2.900, but the 95 % interval of the change, "
            "-0.300 to +0.100, includes none.",
        ),
        (change(3.0, 3.0, 0.0, 0.0), "unclear", "Too close to call."),
        (
            change(3.0, 1.0, -2.0, -2.0, rows=1),
            "unclear",
            "Too little to tell. The loss of the one held-out row fell from 3.000 to 1.000.",
        ),
        (None, "unclear", "Not sure. The held-out loss fell from 3.000 to 2.000; how sure that is was not measured."),
        (change(3.0, 1.0, float("nan"), float("nan")), "unclear", "Not sure."),
    ],
)
def test_the_interval_decides(record_for: RecordFor, found: LossChange | None, kind: str, sentence: str) -> None:
    after = 2.0 if found is None else found.loss
    changes = {
        "evaluation": None if found is None else Evaluation(loss=found),
        "metrics": {"steps": 20, "eval_loss_base": 3.0, "eval_loss": after},
    }
    verdict = judge_learning(record_for(changes=changes))
    assert verdict.kind == kind
    assert verdict.sentence.startswith(sentence)


@pytest.mark.parametrize(
    ("held_out", "evaluation", "metrics", "sentence"),
    [
        (0, None, {}, "Nothing to compare with. No rows were held out. The training loss fell from 2.727 to 1.000."),
        (
            12,
            Evaluation(problems=["out of memory with one row at a time"]),
            {"eval_loss_base": 3.0},
            "Not evaluated. The held-out rows could not be evaluated: out of memory with one row at a time. The",
        ),
        (12, None, {"eval_loss_base": 3.0, "eval_loss": "nan"}, "Not evaluated. The held-out rows could not be"),
    ],
)
def test_without_a_held_out_loss_nothing_is_claimed(
    record_for: RecordFor, held_out: int, evaluation: Evaluation | None, metrics: dict[str, Any], sentence: str
) -> None:
    record = record_for(data={"eval_rows": held_out}, changes={"evaluation": evaluation, "metrics": metrics})
    verdict = judge_learning(record)
    assert verdict.kind == "unknown"
    assert verdict.sentence.startswith(sentence)


def test_what_speaks_against_it_is_said(record_for: RecordFor) -> None:
    assert judge_learning(record_for()).caveats == []
    record = record_for()
    changes = {
        "evaluation": Evaluation(loss=change(3.0, 1.0, -2.1, -1.9, rows=3)),
        "xray": record.xray | {"held_out_in_train": 2},
        "metrics": record.metrics | {"steps": 7, "stopped_by": "SFT_RUNTIME__MAX_HOURS=1"},
    }
    assert judge_learning(record_for(changes=changes)).caveats == [
        "The interval rests on 3 held-out rows only.",
        "2 of 12 held-out rows are trained on as well, so their loss flatters.",
        "It was stopped after step 7 of 50, by SFT_RUNTIME__MAX_HOURS=1.",
    ]
