"""The report's charts, drawn by matplotlib as SVG that stands in the page itself: its text follows the page's font, its
colours are the page's variables, so that they turn with it from light to dark."""

import io
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from job.record import RunRecord
from job.report.facts import estimated_peak_bytes
from job.report.numbers import as_number
from job.report.series import Point, derive_speed, read_series, smooth, thin

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours that matplotlib is given, and the page's variables that they become.
_TEXT, _LINE, _FIRST, _SECOND = "#000001", "#000002", "#000003", "#000004"
_VARIABLES = {_TEXT: "var(--muted)", _LINE: "var(--line)", _FIRST: "var(--first)", _SECOND: "var(--second)"}
_STYLE = {
    "svg.fonttype": "none",  # text stays text
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.xmargin": 0.02,
    "grid.color": _LINE,
    "grid.linewidth": 0.7,
    "font.family": ["sans-serif"],
    "font.size": 11.5,
    "text.color": _TEXT,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
}
_WIDTH, _HEIGHT = 432, 210  # in the units of the SVG, which the page stretches to its column
_POINTS_AN_INCH = 72
_DOTS_TO = 40  # points up to which each is marked
_SMOOTH_FROM = 60
_MOST_ROWS = 800
_GIB = 2**30


@dataclass(frozen=True)
class Chart:
    """A drawing with its title and what its colours mean: (name of the page's variable, text)."""

    title: str
    svg: str
    keys: list[tuple[str, str]]


def draw_learning(record: RunRecord) -> list[Chart]:
    """Return the curves of loss, learning rate and gradient norm, those of them that metrics.jsonl has."""
    losses = read_series(record.steps, "loss")
    rates, norms = read_series(record.steps, "learning_rate"), read_series(record.steps, "grad_norm")
    clipped = f"clipped from {record.plan.max_grad_norm:g} on"
    charts = [_draw_loss(losses, _find_held_out(record))]
    charts += [_draw_curve("Learning rate", rates)] if rates else []
    charts += (
        [_draw_curve("Gradient norm", norms, limit=record.plan.max_grad_norm, limit_name=clipped)] if norms else []
    )
    return [chart for chart in charts if chart.svg]


def draw_rows(record: RunRecord) -> Chart | None:
    """Return each held-out row's loss before and after, None where they are not known."""
    rows = [] if record.evaluation is None else record.evaluation.rows
    pairs = [(as_number(row.loss_base), as_number(row.loss)) for row in rows[:: max(1, len(rows) // _MOST_ROWS)]]
    known = [(before, after) for before, after in pairs if before is not None and after is not None]
    if not known:
        return None
    most = max(max(pair) for pair in known) * 1.05 or 1.0

    def paint(axes: "Axes") -> None:
        axes.plot([0, most], [0, most], color=_TEXT, linewidth=1, dashes=(4, 3))
        axes.plot(*zip(*known, strict=True), "o", color=_FIRST, markersize=5, alpha=0.6, markeredgewidth=0)
        axes.set(xlim=(0, most), ylim=(0, most), xlabel="loss before", ylabel="loss after")

    keys = [("first", "a held-out row"), ("muted", "as before; below it is better")]
    return Chart("Loss of each held-out row", _draw("rows", paint), keys)


def draw_speed(record: RunRecord) -> list[Chart]:
    """Return throughput and memory over the steps, those of them that metrics.jsonl has."""
    charts = []
    speeds = read_series(record.steps, "tokens_per_second") or derive_speed(record.steps)
    if speeds:
        charts.append(_draw_curve("Tokens a second", speeds, from_zero=True))
    memory = read_series(record.steps, "gpu_memory_bytes") or read_series(record.steps, "memory_bytes")
    if memory:
        used = [(step, size / _GIB) for step, size in memory]
        limit = estimated_peak_bytes(record) / _GIB
        charts.append(
            _draw_curve("Memory of a process, GiB", used, limit=limit, limit_name="estimated peak", from_zero=True)
        )
    return charts


def draw_lengths(histogram: Sequence[tuple[int, int]]) -> Chart:
    """Return the rows by their length: (tokens up to and including, rows), ascending."""
    labels = [f"to {edge:,}" for edge, _ in histogram]
    rows = [count for _, count in histogram]

    def paint(axes: "Axes") -> None:
        bars = axes.barh(labels, rows, color=_FIRST, height=0.7)
        axes.bar_label(bars, [f"{count:,}" for count in rows], padding=4, color=_TEXT)
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
        axes.margins(x=0.12)

    return Chart("Rows by length in tokens", _draw("lengths", paint, height=22 * len(rows) + 24), [])


def _find_held_out(record: RunRecord) -> list[Point]:
    """Return the held-out loss of the base model (step 0), of evaluations on the way, and of what is published."""
    metrics = record.metrics
    base = {"step": 0, "eval_loss": metrics.get("eval_loss_base")}
    published = {"step": metrics.get("best_step", metrics.get("steps")), "eval_loss": metrics.get("eval_loss")}
    return sorted(dict(read_series([*record.steps, base, published], "eval_loss")).items())


def _draw_loss(losses: Sequence[Point], held_out: Sequence[Point]) -> Chart:
    def paint(axes: "Axes") -> None:
        _plot(axes, losses)
        if held_out:
            axes.plot(*zip(*thin(held_out), strict=True), "o-", color=_SECOND, markersize=5)
        _label_steps(axes)

    keys = [("first", "training")] if losses else []
    keys += [("second", "held-out rows")] if held_out else []
    return Chart("Loss", _draw("loss", paint) if keys else "", keys)


def _draw_curve(
    title: str,
    points: Sequence[Point],
    *,
    limit: float | None = None,
    limit_name: str = "",
    from_zero: bool = False,
) -> Chart:
    highest, lowest = (best(value for _, value in points) for best in (max, min))
    is_limit_near = limit is not None and limit <= 2 * highest  # else it would squeeze the curve

    def paint(axes: "Axes") -> None:
        _plot(axes, points)
        if is_limit_near and limit is not None:
            axes.axhline(limit, color=_TEXT, linewidth=1, dashes=(4, 3))
        if from_zero:
            axes.set_ylim(bottom=0)
        elif lowest > 0 and highest > 50 * lowest and limit is not None:
            axes.set_yscale("log")
        _label_steps(axes)

    keys = [("muted", limit_name)] if is_limit_near else []
    return Chart(title, _draw(title, paint), keys)


def _plot(axes: "Axes", points: Sequence[Point]) -> None:
    """Draw a curve of training: as it is, or, where it is long, faint and with its running mean."""
    if not points:
        return
    is_long = len(points) > _SMOOTH_FROM
    marker = "o" if len(points) <= _DOTS_TO else None
    xs, ys = zip(*thin(points), strict=True)
    axes.plot(
        xs, ys, color=_FIRST, marker=marker, markersize=3, alpha=0.35 if is_long else 1, linewidth=1 if is_long else 1.6
    )
    if is_long:
        axes.plot(*zip(*thin(smooth(points)), strict=True), color=_FIRST)


def _label_steps(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(_write_tick))
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(FuncFormatter(_write_tick))


def _write_tick(value: float, _: object) -> str:
    return f"{value:,.6g}"


def _draw(name: str, paint: Callable[["Axes"], None], *, height: int = _HEIGHT) -> str:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # that it builds its list of fonts is nothing to warn of
    with mpl.rc_context():
        mpl.rcdefaults()  # whatever this user's own matplotlibrc says
        mpl.rcParams.update(_STYLE | {"svg.hashsalt": name})
        figure = Figure(figsize=(_WIDTH / _POINTS_AN_INCH, height / _POINTS_AN_INCH), layout="constrained")
        paint(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return _adopt(buffer.getvalue(), name)


def _adopt(svg: str, name: str) -> str:
    """Make an element of a page out of an SVG file: without ids that another chart has, too, in the page's font and
    colours, its coordinates no finer than they are seen."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(
        r'<svg .*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{name}">', svg, count=1
    )
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r' (d|x|y|transform)="[^"]*"', _round_numbers, svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg


def _round_numbers(attribute: re.Match[str]) -> str:
    return re.sub(r"-?\d+\.\d{2,}", lambda number: f"{float(number[0]):.1f}", attribute[0]).replace(" \n", " ")
