"""Did it learn? One sentence, by the held-out rows' losses before and after, and how sure their difference is."""

from dataclasses import dataclass
from typing import Literal

from job.evaluation import LossChange
from job.record import RunRecord
from job.report.numbers import as_number

_FEW_ROWS = 10  # a bootstrap over fewer hardly knows how rows differ


@dataclass(frozen=True)
class Verdict:
    """What is to be thought of a run, in a sentence, and what speaks against relying on it.

    `kind`: "learned" and "worse" only where the 95 % interval of the change leaves no change out; "unclear" where it
    doesn't, or where there is none; "unknown" without any held-out loss.
    """

    kind: Literal["learned", "unclear", "worse", "unknown"]
    sentence: str
    caveats: list[str]


def judge_learning(record: RunRecord) -> Verdict:
    """Say whether a run learned what it was shown, as far as its held-out rows can tell."""
    before, after = (as_number(record.metrics.get(name)) for name in ("eval_loss_base", "eval_loss"))
    if before is None or after is None:
        return Verdict("unknown", f"{_why_unknown(record)} {_describe_training(record)}".strip(), _caveats(record))
    course = f"{'fell' if after < before else 'rose'} from {before:.3f} to {after:.3f}"
    change = find_change(record)
    if change is None:
        return Verdict("unclear", f"The held-out loss {course}; how sure that is was not measured.", _caveats(record))
    low, high = change.change_low, change.change_high
    if change.rows < 2:
        sentence = f"Too little to tell: the loss of the one held-out row {course}."
        return Verdict("unclear", sentence, _caveats(record))
    if low <= 0 <= high:
        interval = f"the 95 % interval of the change, {low:+.3f} to {high:+.3f}, includes none"
        return Verdict("unclear", f"Too close to call: the held-out loss {course}, but {interval}.", _caveats(record))
    least, most = sorted((abs(low), abs(high)))
    by = f"by {abs(after - before):.3f} (95 % interval {least:.3f} to {most:.3f})"
    if high < 0:
        return Verdict("learned", f"It learned: the held-out loss {course}, {by}.", _caveats(record))
    return Verdict("worse", f"It got worse: the held-out loss {course}, {by}.", _caveats(record))


def find_change(record: RunRecord) -> LossChange | None:
    """Return the change of the held-out loss with its interval; None where it wasn't measured, or is no number."""
    change = None if record.evaluation is None else record.evaluation.loss
    if change is None or None in (as_number(change.change_low), as_number(change.change_high)):
        return None
    return change


def _why_unknown(record: RunRecord) -> str:
    if record.plan.eval_rows == 0:
        return "There is nothing to compare with: no rows were held out."
    problems = [] if record.evaluation is None else record.evaluation.problems
    return f"The held-out rows could not be evaluated{f': {problems[0]}' if problems else ''}."


def _describe_training(record: RunRecord) -> str:
    losses = [loss for step in record.steps if (loss := as_number(step.get("loss"))) is not None]
    if len(losses) < 2:
        return ""
    course = "fell" if losses[-1] < losses[0] else "rose"
    return f"The training loss {course} from {losses[0]:.3f} to {losses[-1]:.3f}."


def _caveats(record: RunRecord) -> list[str]:
    caveats = []
    change = find_change(record)
    if change is not None and 1 < change.rows < _FEW_ROWS:
        caveats.append(f"The interval rests on {change.rows} held-out rows only.")
    known = record.xray.get("held_out_in_train", 0)
    if known:
        caveats.append(
            f"{known:,} of {record.plan.eval_rows:,} held-out rows are trained on as well, so their loss flatters."
        )
    if "stopped_by" in record.metrics:
        caveats.append(
            f"It was stopped after step {record.metrics['steps']:,} of {record.plan.steps:,}, "
            f"by {record.metrics['stopped_by']}."
        )
    return caveats
