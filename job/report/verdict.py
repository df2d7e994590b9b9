"""Did it learn? One sentence, by the held-out rows' losses before and after, and how sure their difference is."""

from dataclasses import dataclass
from typing import Literal

from job.evaluation import FEW_ROWS, LossChange
from job.record import RunRecord
from job.report.numbers import as_number


@dataclass(frozen=True)
class Verdict:
    """What is to be thought of a run: in a few words, in numbers, and what speaks against relying on them.

    `kind`: "learned" and "worse" only where the 95 % interval of the change leaves no change out; "unclear" where it
    doesn't, or where there is none; "unknown" without any held-out loss.
    """

    kind: Literal["learned", "unclear", "worse", "unknown"]
    headline: str
    detail: str
    caveats: list[str]

    @property
    def sentence(self) -> str:
        """Headline and detail in one line."""
        return f"{self.headline} {self.detail}".strip()


def judge_learning(record: RunRecord) -> Verdict:
    """Say whether a run learned what it was shown, as far as its held-out rows can tell."""
    before, after = (as_number(record.metrics.get(name)) for name in ("eval_loss_base", "eval_loss"))
    if before is None or after is None:
        headline, why = _why_unknown(record)
        return Verdict("unknown", headline, f"{why} {_describe_training(record)}".strip(), _caveats(record))
    course = f"{'fell' if after < before else 'rose'} from {before:.3f} to {after:.3f}"
    change = find_change(record)
    if change is None:
        detail = f"The held-out loss {course}; how sure that is was not measured."
        return Verdict("unclear", "Not sure.", detail, _caveats(record))
    if change.rows < 2:
        return Verdict(
            "unclear", "Too little to tell.", f"The loss of the one held-out row {course}.", _caveats(record)
        )
    low, high = change.change_low, change.change_high
    if low <= 0 <= high:
        interval = f"the 95 % interval of the change, {low:+.3f} to {high:+.3f}, includes none"
        detail = f"The held-out loss {course}, but {interval}."
        return Verdict("unclear", "Too close to call.", detail, _caveats(record))
    least, most = sorted((abs(low), abs(high)))
    detail = f"The held-out loss {course}, by {abs(after - before):.3f} (95 % interval {least:.3f} to {most:.3f})."
    if high < 0:
        return Verdict("learned", "It learned.", detail, _caveats(record))
    return Verdict("worse", "It got worse.", detail, _caveats(record))


def find_change(record: RunRecord) -> LossChange | None:
    """Return the change of the held-out loss with its interval; None where it wasn't measured, or is no number."""
    change = None if record.evaluation is None else record.evaluation.loss
    if change is None or None in (as_number(change.change_low), as_number(change.change_high)):
        return None
    return change


def _why_unknown(record: RunRecord) -> tuple[str, str]:
    if record.plan.eval_rows == 0:
        return "Nothing to compare with.", "No rows were held out."
    problems = [] if record.evaluation is None else record.evaluation.problems
    return "Not evaluated.", f"The held-out rows could not be evaluated{f': {problems[0]}' if problems else ''}."


def _describe_training(record: RunRecord) -> str:
    losses = [loss for step in record.steps if (loss := as_number(step.get("loss"))) is not None]
    if len(losses) < 2:
        return ""
    course = "fell" if losses[-1] < losses[0] else "rose"
    return f"The training loss {course} from {losses[0]:.3f} to {losses[-1]:.3f}."


def _caveats(record: RunRecord) -> list[str]:
    caveats = []
    change = find_change(record)
    if change is not None and 1 < change.rows < FEW_ROWS:
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
