"""How long is trained and how fast, as pure functions of a few numbers: steps, passes, warmup, and the rules for small
data sets, where a schedule made for large ones learns nothing and says nothing."""

import math
from typing import Literal

from job.errors import ConfigError

Scheduler = Literal["linear", "cosine", "constant"]

_PASSES = 3
_FEW_ROWS_STEPS = 50  # what the rule aims for: enough for a warmup, a plateau and a decay
_FEW_ROWS_MAX_PASSES = 10  # beyond it, a model learns its rows by heart
_LOG_LINES_PER_RUN = 100
_WARMUP_SHARE = 10  # a warmup is at most one part in ten of the steps
_FEW_STEPS = 20
# Adam moves a weight by about its learning rate a step at most (Kingma & Ba, 2015, section 2.1), so the sum of the
# learning rates bounds how far LoRA's B gets from the zeros it starts at. Measured on SmolLM2-135M-Instruct with r 16,
# alpha 32, 8 rows and 20 steps: a sum of 1e-4 took the loss on those rows from 3.01 to 2.97, 5e-4 to 2.80, 2e-3 to 2.24
# (B's largest entry was 1.0e-4, 5.1e-4 and 2.1e-3).
_MIN_LEARNING_RATES_SUM = 5e-4


def count_steps(epochs: float, rows: int, global_batch_size: int) -> int:
    """Return the optimizer steps that cover `epochs` passes over the rows.

    The last step is filled up from the next pass, so that every step has as many sequences and no row is left out.
    """
    return max(1, math.ceil(epochs * rows / global_batch_size - 1e-9))


def choose_epochs(rows: int, global_batch_size: int) -> tuple[int, str]:
    """Return the passes over the rows and the reason: 3, or as many as make about 50 steps, but at most 10."""
    wanted = math.ceil(_FEW_ROWS_STEPS * global_batch_size / rows)
    if wanted <= _PASSES:
        return _PASSES, f"auto: {_PASSES} passes"
    passes = min(wanted, _FEW_ROWS_MAX_PASSES)
    steps = count_steps(passes, rows, global_batch_size)
    return passes, f"rule few-rows: {passes} passes, for {_count(steps, 'step')} from {_count(rows, 'row')}"


def count_warmup_steps(warmup: float, steps: int) -> int:
    """Return the steps of warmup for a ratio (below 1) or a number of steps.

    Raises ConfigError for a warmup that leaves no step at the full learning rate.
    """
    if warmup < 1:
        # Rounded down, for transformers' schedule starts at 0: a warmup of a single step is a step without learning.
        return min(steps - 1, math.floor(warmup * steps + 1e-9))
    if warmup >= steps:
        raise ConfigError(
            f"SFT_TRAIN__WARMUP={warmup:g}: the run has {_count(steps, 'step')}, so the learning rate "
            f"would reach only {100 * (steps - 1) / warmup:.0f} % of SFT_TRAIN__LEARNING_RATE, at the last one",
            hint=f"use SFT_TRAIN__WARMUP={_longest_warmup(steps)}, or a ratio such as 0.1",
        )
    return int(warmup)


def limit_warmup_steps(warmup: float, steps: int) -> tuple[int, str]:
    """Return the steps of a warmup that nobody asked for, at most a tenth of all, and the rule that cut it, or ""."""
    asked = math.floor(warmup * steps + 1e-9) if warmup < 1 else int(warmup)
    if asked <= steps // _WARMUP_SHARE:
        return asked, ""
    return steps // _WARMUP_SHARE, "rule short-warmup: a tenth of the steps"


def choose_logging_steps(steps: int) -> tuple[int, str]:
    """Return the interval of the logged metrics, in steps, and the reason."""
    interval = max(1, steps // _LOG_LINES_PER_RUN)
    return interval, "every step of so short a run" if interval == 1 else f"about {_LOG_LINES_PER_RUN} a run"


def count_steps_per_pass(rows: int, global_batch_size: int) -> int:
    """Return the whole number of steps that is nearest to one pass over the rows, at least 1."""
    return max(1, round(rows / global_batch_size))


def sum_learning_rates(steps: int, warmup_steps: int, scheduler: Scheduler, peak: float) -> float:
    """Return the sum of the scheduled learning rate over all steps, as transformers' schedules with warmup have it.

    The warmup rises from 0 by peak / warmup a step; `linear` and `cosine` fall from the peak to 0 over the rest, and
    sum to the same, for cosine is odd about its middle.
    """
    rising = (warmup_steps - 1) / 2 if warmup_steps else 0.0
    rest = steps - warmup_steps
    return peak * (rising + (rest if scheduler == "constant" else (rest + 1) / 2))


def warn_of_long_warmup(warmup: float, warmup_steps: int, steps: int) -> list[str]:
    """Return a warning where the warmup that was asked for takes more than a tenth of the steps."""
    if warmup_steps <= steps / _WARMUP_SHARE:
        return []
    return [
        f"SFT_TRAIN__WARMUP={warmup:g}: {warmup_steps} of the {steps} steps only warm up; "
        f"SFT_TRAIN__WARMUP={_longest_warmup(steps)} is at most a tenth"
    ]


def warn_of_few_steps(steps: int, rows: int, global_batch_size: int, *, by_max_steps: bool) -> list[str]:
    """Return a warning where the optimizer takes too few steps to learn much."""
    if steps >= _FEW_STEPS:
        return []
    if by_max_steps:
        remedy = f"raise SFT_TRAIN__MAX_STEPS to {_FEW_STEPS} or more"
    else:
        remedy = f"SFT_TRAIN__EPOCHS={math.ceil(_FEW_STEPS * global_batch_size / rows)} gives {_FEW_STEPS} or more"
        remedy += ", so does a smaller SFT_TRAIN__GLOBAL_BATCH_SIZE" if global_batch_size > 1 else ""
    return [f"only {_count(steps, 'step')} of {_count(global_batch_size, 'sequence')} each: {remedy}"]


def warn_of_lost_checkpoints(output_uri: str, checkpoint_uri: str | None) -> list[str]:
    """Return a warning where the checkpoints are on this machine alone."""
    if not output_uri.startswith("hf://") or checkpoint_uri is not None:
        return []
    return [
        "the Hub has no place for checkpoints, so they stay in SFT_RUNTIME__WORK_DIR: on another machine this run "
        "would begin anew, and another job of it not be noticed; set SFT_CHECKPOINT__URI=s3://bucket/prefix"
    ]


def warn_of_little_learning(
    steps: int, warmup_steps: int, scheduler: Scheduler, peak: float, *, by_max_steps: bool
) -> list[str]:
    """Return a warning where the learning rates of all steps together can't move the adapter far enough."""
    total = sum_learning_rates(steps, warmup_steps, scheduler, peak)
    if total >= _MIN_LEARNING_RATES_SUM:
        return []
    factor = math.ceil(_MIN_LEARNING_RATES_SUM / total)
    return [
        f"too little to learn: {_count(steps, 'step')} at up to {peak:g} sum to {total:.1e}, as far as a weight of the "
        f"adapter can get, and less than {_MIN_LEARNING_RATES_SUM:g}: raise SFT_TRAIN__LEARNING_RATE or "
        f"SFT_TRAIN__{'MAX_STEPS' if by_max_steps else 'EPOCHS'} {factor}-fold"
    ]


def warn_of_repeated_rows(rows: int, global_batch_size: int, *, multiple: int) -> list[str]:
    """Return a warning where one step holds a row more than once; `multiple`: what a global batch must divide by."""
    if global_batch_size <= rows:
        return []
    largest = rows // multiple * multiple
    remedy = f"SFT_TRAIN__GLOBAL_BATCH_SIZE={largest}" if largest else "fewer processes, or smaller micro batches,"
    return [
        f"a global batch of {global_batch_size} sequences holds some of the {_count(rows, 'training row')} more than "
        f"once; {remedy} would not"
    ]


def warn_of_idle_patience(patience: int, steps: int, eval_interval_steps: int) -> list[str]:
    """Return a warning where the run is over before its patience can be."""
    evaluations = steps // eval_interval_steps
    if evaluations > patience:
        return []
    return [
        f"SFT_TRAIN__EARLY_STOPPING_PATIENCE={patience}: the run has only {_count(evaluations, 'evaluation')}, one a "
        f"pass, so it never ends early"
    ]


def _longest_warmup(steps: int) -> int:
    return steps // _WARMUP_SHARE


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
