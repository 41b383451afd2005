"""What every figure is drawn on: colours, style, and SVG text that is the same bytes for the same numbers.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; kinds are also told apart by hatching or marks.
INK, GRID and PAPER are written literally, so that a page can put its own (dark) colours in their place.
"""

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK = "#20242a"
GRID = "#d3d7dc"
PAPER = "#fefefe"
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9"
CYCLE = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY)
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial"],
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.edgecolor": INK,
    "axes.facecolor": PAPER,
    "figure.facecolor": PAPER,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "hatch.linewidth": 0.6,
    "lines.linewidth": 1.6,
}


def new_figure(*, width: float, height: float) -> Figure:
    """Return an empty figure of that many inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def as_svg(figure: Figure, name: str) -> str:
    """Return a figure as one svg element; `name` is its title."""
    # The salt fixes the ids that matplotlib would draw at random, and keeps those of two figures on one page apart.
    with mpl.rc_context({"svg.hashsalt": f"refit-{name}"}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Title": name})
    svg = buffer.getvalue()
    # Groups carry ids that repeat from figure to figure (axes_1); nothing refers to them.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    return "\n".join(line.rstrip() for line in svg[svg.index("<svg") :].splitlines()) + "\n"


def legend_below(figure: Figure, *, handles: Sequence[object]) -> None:
    """Put a legend under the axes."""
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, max(1, len(handles))), fontsize=9)
