"""The result as text, for the end of the log: what report.html answers on its first screen, and a sample or two."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from job.evaluation import Sample
from job.log import Terminal
from job.record import RunRecord
from job.report.columns import count_columns, make_visible, take, wrap
from job.report.facts import describe_acceptance, describe_serving, list_costs
from job.report.numbers import as_number, format_perplexity
from job.report.series import read_series
from job.report.verdict import judge_learning
from job.serving import format_verdicts

_LABEL_WIDTH = 12
_BARS = "▁▂▃▄▅▆▇█"
_CURVE_WIDTH = 60  # columns, at most
_SAMPLES = 2
_SAMPLE_LINES = 3  # of each text
_COLOURS = {"learned": "\x1b[1;32m", "worse": "\x1b[1;31m", "unclear": "\x1b[1;33m", "unknown": "\x1b[1m"}
_PLAIN = "\x1b[0m"


def format_metrics(metrics: Mapping[str, Any]) -> str:
    """Return the run's result in one line."""
    parts = [f"train loss {metrics['train_loss']:.4f} over {metrics['steps']} steps"]
    if "eval_loss" in metrics:
        parts.append(f"held-out loss {metrics['eval_loss_base']:.4f} -> {metrics['eval_loss']:.4f}")
    parts.append(f"{metrics['tokens_per_second']:.0f} tokens/s")
    return ", ".join(parts)


def format_result(record: RunRecord, terminal: Terminal) -> str:
    """Return verdict, cost, samples, and how to serve and reproduce it, in lines of at most the terminal's width.

    Names of places and the command to serve it stay whole.
    """
    width = terminal.width
    verdict = judge_learning(record)
    mark, plain = (_COLOURS[verdict.kind], _PLAIN) if terminal.has_colour else ("", "")
    lines = [f"{mark}{line}{plain}" for line in wrap(verdict.sentence, width)]
    lines += [line for caveat in verdict.caveats for line in wrap(caveat, width)]
    for label, texts in _sections(record, width - _LABEL_WIDTH):
        lines += [f"{label if index == 0 else '':<{_LABEL_WIDTH}}{text}" for index, text in enumerate(texts)]
    return "\n".join(lines)


def draw_curve(values: Sequence[float], width: int) -> str:
    """Draw numbers as bars of eight heights, at most `width` of them, each the mean of its share."""
    count = min(len(values), width)
    borders = [len(values) * index // count for index in range(count + 1)]
    means = [sum(values[start:stop]) / (stop - start) for start, stop in pairwise(borders)]
    lowest, highest = min(means), max(means)
    scale = (len(_BARS) - 1) / (highest - lowest) if highest > lowest else 0
    return "".join(_BARS[round((mean - lowest) * scale)] for mean in means)


def _sections(record: RunRecord, width: int) -> Iterator[tuple[str, list[str]]]:
    losses = [loss for _, loss in read_series(record.steps, "loss")]
    if losses:
        curve = draw_curve(losses, min(_CURVE_WIDTH, width - 20))
        yield "Loss", [f"{losses[0]:.3f} {curve} {losses[-1]:.3f}"]
    before, after = (as_number(record.metrics.get(name)) for name in ("eval_loss_base", "eval_loss"))
    if before is not None and after is not None:
        perplexity = f"perplexity {format_perplexity(before)} -> {format_perplexity(after)}"
        text = f"{before:.4f} -> {after:.4f}, {perplexity}, {record.plan.eval_rows:,} rows"
        yield "Held out", list(wrap(text, width))
    yield "Cost", [line for cost in list_costs(record) for line in wrap(f"{cost.name}: {cost.value}", width)]
    yield from _samples(record, width)
    texts = format_verdicts(record.engines).splitlines() if record.engines else [describe_serving(record)]
    yield "Serve", [line for text in [*texts, describe_acceptance(record)] for line in wrap(text, width)]
    if record.serve_command is not None:
        yield "", record.serve_command.splitlines()
    yield "Report", [f"{record.output.rstrip('/')}/report.html"]


def _samples(record: RunRecord, width: int) -> Iterator[tuple[str, list[str]]]:
    for sample in [] if record.evaluation is None else record.evaluation.samples[:_SAMPLES]:
        for label, text in (("Asked", question_of(sample)), ("  before", sample.before), ("  after", sample.after)):
            if text is not None:
                yield label, shorten(text, width)


def question_of(sample: Sample) -> str:
    """Return what was asked last: the instructions before it are the same for every prompt."""
    asked = [message.get("content") for message in sample.messages or [] if message.get("role") == "user"]
    return asked[-1] if asked and isinstance(asked[-1], str) else sample.prompt


def shorten(text: str, width: int) -> list[str]:
    """Return as much of a text as three lines hold, broken between words where there are blanks."""
    lines = list(_break(" ".join(make_visible(text).split()), width)) or ["(nothing)"]
    if len(lines) > _SAMPLE_LINES:
        lines = lines[:_SAMPLE_LINES]
        lines[-1] = f"{take(lines[-1], width - 3)}..."
    return lines


def _break(text: str, width: int) -> Iterator[str]:
    """Break a text into lines: at the last blank that fits, or anywhere, for CJK text has no blanks."""
    while count_columns(text) > width:
        line = take(text, width + 1)  # a blank behind the line counts, too
        stop = line.rfind(" ")
        line = line[:stop] if stop > 0 else take(text, width)
        yield line
        text = text[len(line) :].lstrip()
    if text:
        yield text
