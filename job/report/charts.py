"""The report's charts: what is drawn of a run, and with which colours."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from job.record import RunRecord
from job.report.facts import estimated_peak_bytes
from job.report.numbers import as_number
from job.report.series import Point, derive_speed, read_series, smooth, thin
from job.report.svg import FIRST, MUTED, SECOND, draw_svg, label_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DOTS_TO = 40  # points up to which each is marked
_SMOOTH_FROM = 60
_SMOOTH_POINTS = 120
_SPIKE = 20  # times the median, from which on an axis is logarithmic
_MOST_ROWS = 200
_GIB = 2**30


@dataclass(frozen=True)
class Chart:
    """A drawing with its title and what its colours mean: (name of the page's variable, text)."""

    title: str
    svg: str
    keys: list[tuple[str, str]]


def draw_learning(record: RunRecord) -> list[Chart]:
    """Return the curves of loss, learning rate and gradient norm, those of them that metrics.jsonl has."""
    losses, held_out = read_series(record.steps, "loss"), _find_held_out(record)
    rates, norms = read_series(record.steps, "learning_rate"), read_series(record.steps, "grad_norm")
    charts = [_draw_loss(losses, held_out)] if losses or held_out else []
    charts += [_draw_rates(rates)] if rates else []
    charts += [_draw_norms(norms, record.plan.max_grad_norm)] if norms else []
    return charts


def draw_rows(record: RunRecord) -> Chart | None:
    """Return each held-out row's loss before and after, None where they are not known."""
    rows = [] if record.evaluation is None else record.evaluation.rows
    pairs = [(as_number(row.loss_base), as_number(row.loss)) for row in rows[:: max(1, len(rows) // _MOST_ROWS)]]
    known = [(before, after) for before, after in pairs if before is not None and after is not None]
    if not known:
        return None
    most = max(max(pair) for pair in known) * 1.05 or 1.0

    def paint(axes: "Axes") -> None:
        axes.plot([0, most], [0, most], color=MUTED, linewidth=1, dashes=(4, 3))
        axes.plot(*zip(*known, strict=True), "o", color=FIRST, markersize=5, alpha=0.6, markeredgewidth=0)
        axes.set(xlim=(0, most), ylim=(0, most), xlabel="loss before", ylabel="loss after")

    keys = [("first", "a row"), ("muted", "no change; below is better")]
    return Chart("Loss of each held-out row", draw_svg("Loss of each held-out row", paint), keys)


def draw_speed(record: RunRecord) -> list[Chart]:
    """Return speed, time and memory over the steps, those of them that metrics.jsonl has."""
    charts = []
    speeds = read_series(record.steps, "tokens_per_second") or derive_speed(record.steps)
    if speeds:
        charts.append(_draw_from_zero("Tokens a second", speeds))
    times, waits = read_series(record.steps, "step_s"), read_series(record.steps, "data_wait_s")
    if times:
        charts.append(_draw_times(times, waits))
    memory = read_series(record.steps, "gpu_memory_bytes") or read_series(record.steps, "memory_bytes")
    if memory:
        used = [(step, size / _GIB) for step, size in memory]
        limit = (estimated_peak_bytes(record) / _GIB, "estimated peak")
        charts.append(_draw_from_zero("Memory of a process, GiB", used, limit))
    return charts


def draw_lengths(histogram: Sequence[tuple[int, int]]) -> Chart:
    """Return the rows by their length: (tokens up to and including, rows), ascending."""
    labels = [f"to {edge:,}" for edge, _ in histogram]
    rows = [count for _, count in histogram]

    def paint(axes: "Axes") -> None:
        bars = axes.barh(labels, rows, color=FIRST, height=0.7)
        axes.bar_label(bars, [f"{count:,}" for count in rows], padding=4, color=MUTED)
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
        axes.margins(x=0.12)

    return Chart(
        "Rows by length in tokens", draw_svg("Rows by length in tokens", paint, height=22 * len(rows) + 24), []
    )


def _find_held_out(record: RunRecord) -> list[Point]:
    """Return the held-out loss of the base model (step 0), of evaluations on the way, and of what is published."""
    metrics = record.metrics
    base = {"step": 0, "eval_loss": metrics.get("eval_loss_base")}
    published = {"step": metrics.get("best_step", metrics.get("steps")), "eval_loss": metrics.get("eval_loss")}
    return sorted(dict(read_series([*record.steps, base, published], "eval_loss")).items())


def _draw_loss(losses: Sequence[Point], held_out: Sequence[Point]) -> Chart:
    def paint(axes: "Axes") -> None:
        if losses:
            _plot(axes, losses, is_noisy=True)
        if held_out:
            style = "o-" if len(held_out) > 2 else "o:"  # how it went between before and after isn't known
            axes.plot(*zip(*thin(held_out), strict=True), style, color=SECOND, markersize=5)
        label_steps(axes)

    keys = [("first", "training")] if losses else []
    keys += [("second", "held-out rows")] if held_out else []
    return Chart("Loss", draw_svg("Loss", paint), keys)


def _draw_norms(norms: Sequence[Point], clipped_from: float) -> Chart:
    values = [norm for _, norm in norms]
    is_clipped = max(values) > clipped_from / 2  # else the line would squeeze the curve

    def paint(axes: "Axes") -> None:
        _plot(axes, norms, is_noisy=True)
        if is_clipped:
            axes.axhline(clipped_from, color=MUTED, linewidth=1, dashes=(4, 3))
        if min(values) > 0 and max(values) > _SPIKE * median(values):
            axes.set_yscale("log")
        label_steps(axes)

    keys = [("muted", f"clipped from {clipped_from:g} on")] if is_clipped else []
    return Chart("Gradient norm", draw_svg("Gradient norm", paint), keys)


def _draw_from_zero(title: str, points: Sequence[Point], limit: tuple[float, str] | None = None) -> Chart:
    def paint(axes: "Axes") -> None:
        _plot(axes, points, is_noisy=True)
        if limit is not None:
            axes.axhline(limit[0], color=MUTED, linewidth=1, dashes=(4, 3))
        axes.set_ylim(bottom=0)
        label_steps(axes)

    return Chart(title, draw_svg(title, paint), [] if limit is None else [("muted", limit[1])])


def _draw_times(times: Sequence[Point], waits: Sequence[Point]) -> Chart:
    def paint(axes: "Axes") -> None:
        _plot(axes, times, is_noisy=True)
        if waits:
            axes.plot(*zip(*thin(waits), strict=True), color=SECOND)
        axes.set_ylim(bottom=0)
        label_steps(axes)

    keys = [("first", "in all")] + ([("second", "waiting for rows")] if waits else [])
    return Chart("Seconds a step", draw_svg("Seconds a step", paint), keys)


def _draw_rates(rates: Sequence[Point]) -> Chart:
    def paint(axes: "Axes") -> None:
        _plot(axes, rates, is_noisy=False)
        label_steps(axes)

    return Chart("Learning rate", draw_svg("Learning rate", paint), [])


def _plot(axes: "Axes", points: Sequence[Point], *, is_noisy: bool) -> None:
    """Draw a curve over steps: as it is, or, where it is long and noisy, faint and with its running mean."""
    if not is_noisy or len(points) < _SMOOTH_FROM:
        marker = "o" if len(points) <= _DOTS_TO else None
        axes.plot(*zip(*thin(points), strict=True), color=FIRST, marker=marker, markersize=3)
        return
    axes.plot(*zip(*thin(points), strict=True), color=FIRST, linewidth=1, alpha=0.35)
    axes.plot(*zip(*thin(smooth(points), _SMOOTH_POINTS), strict=True), color=FIRST)
