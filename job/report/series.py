"""Curves out of metrics.jsonl: points by step, of what is there and a number, few enough to draw."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

from job.report.numbers import as_number

MOST_POINTS = 500

Point = tuple[float, float]  # (step, value)


def read_series(steps: Sequence[dict[str, Any]], name: str) -> list[Point]:
    """Return the points of one of the metrics by ascending step; what is missing or no number is left out."""
    found = ((as_number(line.get("step")), as_number(line.get(name))) for line in steps)
    return sorted((step, value) for step, value in found if step is not None and value is not None)


def derive_speed(steps: Sequence[dict[str, Any]]) -> list[Point]:
    """Return the tokens a second between one logged step and the next."""
    points = []
    totals = [
        (as_number(line.get("step")), as_number(line.get("tokens")), as_number(line.get("elapsed_s"))) for line in steps
    ]
    known = [
        (step, tokens, at_s)
        for step, tokens, at_s in totals
        if step is not None and tokens is not None and at_s is not None
    ]
    before = (0.0, 0.0)
    for step, tokens, at_s in sorted(known):
        if at_s > before[1]:
            points.append((step, max(0.0, tokens - before[0]) / (at_s - before[1])))
        before = (tokens, at_s)
    return points


def smooth(points: Sequence[Point]) -> list[Point]:
    """Return the mean of each point's neighbourhood, which is some 25th of the curve."""
    reach = max(1, len(points) // 50)
    sums = list(accumulate((value for _, value in points), initial=0.0))
    smoothed = []
    for index, (step, _) in enumerate(points):
        start, stop = max(0, index - reach), min(len(points), index + reach + 1)
        smoothed.append((step, (sums[stop] - sums[start]) / (stop - start)))
    return smoothed


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Return so many points at most: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    stretches = most // 2
    borders = [len(points) * index // stretches for index in range(stretches + 1)]
    kept: list[Point] = []
    for start, stop in pairwise(borders):
        stretch = points[start:stop]
        kept += sorted({min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])})
    return kept
