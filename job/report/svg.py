"""Drawing by matplotlib as SVG that stands in the page itself: its text follows the page's font, its colours are the
page's variables, so that they turn with it from light to dark."""

import io
import logging
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours that matplotlib is given, and the page's variables that they become.
MUTED, LINE, FIRST, SECOND = "#000001", "#000002", "#000003", "#000004"
_VARIABLES = {MUTED: "var(--muted)", LINE: "var(--line)", FIRST: "var(--first)", SECOND: "var(--second)"}
_STYLE = {
    "svg.fonttype": "none",  # text stays text
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.xmargin": 0.02,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "font.family": ["sans-serif"],
    "font.size": 11,
    "text.color": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}
_WIDTH, _HEIGHT = 400, 196  # in units of the SVG, which the page stretches to its column
_UNITS_AN_INCH = 72


def draw_svg(name: str, paint: Callable[["Axes"], None], *, height: int = _HEIGHT) -> str:
    """Return an `svg` element with what `paint` draws; the same drawing is the same text. `name` tells those who can't
    see it what it is."""
    # That it makes a list of fonts first, perhaps in a temporary folder, is nothing to warn of.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    # It refuses to be imported under a backend that it doesn't know, as a notebook names one to all that it starts.
    os.environ["MPLBACKEND"] = "svg"
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context():
        mpl.rcdefaults()  # whatever this user's own matplotlibrc says
        mpl.rcParams.update(_STYLE | {"svg.hashsalt": name})
        figure = Figure(figsize=(_WIDTH / _UNITS_AN_INCH, height / _UNITS_AN_INCH), layout="constrained")
        paint(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return _adopt(buffer.getvalue(), name)


def label_steps(axes: "Axes") -> None:
    """Label the axes of a curve over steps."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(_write_tick))
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(_write_tick))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _write_tick(value: float, _: object) -> str:
    return f"{value:,.6g}"


def _adopt(svg: str, name: str) -> str:
    """Make an element of a page out of an SVG file: without ids that another chart has, too, in the page's font and
    colours, its coordinates no finer than they are seen."""
    view_box = re.findall(r'viewBox="([^"]*)"', svg)[0]
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r' (d|x|y|transform)="[^"]*"', _round_numbers, body)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, variable)
    return f'<svg viewBox="{view_box}" role="img" aria-label="{name}">{body}'


def _round_numbers(attribute: re.Match[str]) -> str:
    return re.sub(r"-?\d+\.\d{2,}", lambda number: f"{float(number[0]):.1f}", attribute[0]).replace(" \n", " ")
