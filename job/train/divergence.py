"""Losses that say that training goes wrong: no numbers, a spike, a run that ends far above where it began."""

import math
from collections.abc import Sequence
from statistics import median

SPIKE_WINDOW_STEPS = 50
_SPIKE_LEAST_STEPS = 20
_SPIKE_LEAST_RISE = 1.0  # nats per token
_SPIKE_DEVIATIONS = 10.0
_DEVIATION_BY_MAD = 1.4826  # of normal noise: its standard deviation, by the median absolute deviation


def has_diverged(loss: float, grad_norm: float, dtype: str) -> bool:
    """Say whether a step's numbers are none. In float16 the loss scale overflows now and then: the gradient is
    infinite, that step is skipped, and training goes on."""
    # DeepSpeed gives -1 for a norm that is no number.
    return not math.isfinite(loss) or ((not math.isfinite(grad_norm) or grad_norm < 0) and dtype != "float16")


def is_spike(loss: float, before: Sequence[float]) -> bool:
    """Say whether a step's loss lies far above those of the steps before it, at most `SPIKE_WINDOW_STEPS` of them.

    Far is more than 1 nat, 10 robust standard deviations, and twice as far above the median as any of them. Chosen on
    made-up losses: never for normal noise, and for about one of 1,000 steps where single rows make heavy tails
    (log-normal of 0.6, exponential, Student's t of 3 degrees). Fewer than 20 losses are too few to tell.
    """
    if len(before) < _SPIKE_LEAST_STEPS:
        return False
    middle = median(before)
    deviation = _DEVIATION_BY_MAD * median(abs(one - middle) for one in before)
    rise = max(_SPIKE_LEAST_RISE, _SPIKE_DEVIATIONS * deviation, 2 * (max(before) - middle))
    return loss > middle + rise


def has_exploded(losses: Sequence[float]) -> bool:
    """Say whether a run's logged losses ended far above where they began: the mean of the last quarter lies more than
    1 nat per token above that of the first. Fewer than 20 losses are too few to tell it from noise."""
    quarter = len(losses) // 4
    if len(losses) < 20:
        return False
    return sum(losses[-quarter:]) / quarter > sum(losses[:quarter]) / quarter + 1.0
