"""Figures as SVG text: numbers in, one string out. Equal numbers give equal bytes.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; kinds are also told apart by hatching or marks.
INK, GRID and PAPER are written literally, so that a page can put its own (dark) colours in their place.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from pipeline.architecture import Architecture
from pipeline.evaluation.intervals import Estimate
from pipeline.report.pareto import CHILD, FINAL, PUZZLE, Panel, Point, frontier

INK = "#20242a"
GRID = "#d3d7dc"
PAPER = "#fefefe"
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9"
CYCLE = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY)
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")

_STYLE: dict[Any, Any] = {
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One line of a panel: `y` over `x`."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class CurvePanel:
    """One panel of curves that share their axes."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedBar:
    """One measured quantity relative to the parent (1.0), next to what the search predicted; either may be missing."""

    label: str
    predicted: float | None
    measured: Estimate | None


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityPoint:
    """One checkpoint's text quality."""

    name: str
    perplexity: Estimate
    kl_nats_per_token: Estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class TogglePoint:
    """One checkpoint's compliance in both modes."""

    name: str
    on: Estimate
    off: Estimate


def architecture_strip(parent: Architecture, child: Architecture) -> str:
    """Draw every layer's key/value heads and FFN width relative to the parent's; fused blocks span what they joined."""
    parent_block = parent.blocks[0]
    parent_heads = parent_block.attention.num_key_value_heads or 1
    parent_width = parent_block.ffn.intermediate_size or 1
    with mpl.rc_context(_STYLE):
        figure = _figure(width=max(7.0, 0.27 * parent.num_hidden_layers + 1.6), height=3.5)
        attention, ffn = figure.subplots(2, 1, sharex=True)
        tallest = 1.0
        for block in child.blocks:
            first, num_layers = min(block.parent_layers), len(block.parent_layers)
            heads = block.attention.num_key_value_heads
            _strip_bar(attention, first, num_layers, kind=block.attention.kind, share=(heads or 0) / parent_heads)
            width = block.ffn.intermediate_size
            _strip_bar(ffn, first, num_layers, kind=block.ffn.kind, share=(width or 0) / parent_width)
            tallest = max(tallest, (width or 0) / parent_width)
        for axes, label, limit in ((attention, "KV heads", 1.0), (ffn, "FFN width", tallest)):
            axes.set_ylim(0, 1.08 * limit)
            axes.set_ylabel(f"{label}\n(parent = 1)")
            axes.axhline(1.0, color=INK, linewidth=0.7, linestyle=":")
            axes.grid(visible=False)
        ffn.set_xlim(-0.6, parent.num_hidden_layers - 0.4)
        ffn.set_xlabel("parent layer")
        ffn.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
        attention.set_title(
            f"Architecture: {child.num_hidden_layers} layers from {parent.num_hidden_layers} "
            f"(parent: {parent_heads} KV heads, FFN {parent_width:,})"
        )
        handles = [
            Patch(facecolor=BLUE, label="kept or narrowed"),
            Patch(facecolor=ORANGE, hatch="//", edgecolor=INK, label="linear"),
            Patch(facecolor="none", hatch="xx", edgecolor=VERMILION, label="removed"),
            Patch(facecolor=GREEN, label="fused"),
        ]
        _legend_below(figure, handles=handles)
        return _svg(figure, "architecture")


def curve_panels(panels: Sequence[CurvePanel], *, name: str = "curves") -> str:
    """Draw loss curves side by side, each panel with its own axes."""
    with mpl.rc_context(_STYLE):
        num_columns = min(len(panels), 2)
        num_rows = -(-len(panels) // num_columns)
        figure = _figure(width=4.6 * num_columns, height=2.9 * num_rows)
        grid = figure.subplots(num_rows, num_columns, squeeze=False)
        for index, axes in enumerate(grid.flat):
            if index >= len(panels):
                axes.set_visible(False)
                continue
            panel = panels[index]
            for curve, color in zip(panel.curves, CYCLE, strict=False):
                axes.plot(curve.x, curve.y, color=color, label=curve.label, marker="o" if len(curve.x) == 1 else None)
            axes.set_title(panel.title)
            axes.set_xlabel(panel.x_label)
            axes.set_ylabel(panel.y_label)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
            if len(panel.curves) > 1:
                axes.legend(fontsize=8.5)
        return _svg(figure, name)


def quality_through_stages(points: Sequence[QualityPoint]) -> str:
    """Draw perplexity and KL to the parent for each checkpoint, with 95% intervals over windows of text."""
    with mpl.rc_context(_STYLE):
        figure = _figure(width=9.2, height=3.2)
        left, right = figure.subplots(1, 2)
        names = [point.name for point in points]
        _error_line(left, names, [point.perplexity for point in points], color=BLUE, marker="o")
        left.set_title("Perplexity on held-out text")
        left.set_ylabel("perplexity")
        perplexities = [point.perplexity.value for point in points]
        if max(perplexities) > 8 * min(perplexities):
            left.set_yscale("log")
            left.set_ylabel("perplexity (log scale)")
        if "parent" in names:
            left.axhline(perplexities[names.index("parent")], color=INK, linewidth=0.8, linestyle=":")
        _error_line(right, names, [point.kl_nats_per_token for point in points], color=VERMILION, marker="s")
        right.set_title("KL(parent || checkpoint)")
        right.set_ylabel("nats per token")
        right.set_ylim(bottom=0)
        for axes in (left, right):
            axes.set_xlabel("checkpoint (bars: 95% interval)")
        return _svg(figure, "quality")


def speed_bars(bars: Sequence[SpeedBar]) -> str:
    """Draw predicted and measured speed relative to the parent, with the measured 95% interval."""
    with mpl.rc_context(_STYLE):
        figure = _figure(width=max(5.5, 1.6 * len(bars) + 2.4), height=3.4)
        axes = figure.subplots()
        for position, bar in enumerate(bars):
            if bar.predicted is not None:
                axes.bar(position - 0.2, bar.predicted, width=0.38, color=SKY, hatch="//", edgecolor=INK, linewidth=0.6)
                _bar_label(axes, position - 0.2, bar.predicted, height=bar.predicted)
            if bar.measured is not None:
                value = bar.measured.value
                axes.bar(position + 0.2, value, width=0.38, color=BLUE, edgecolor=INK, linewidth=0.6)
                errors = [[value - bar.measured.low], [bar.measured.high - value]]
                axes.errorbar([position + 0.2], [value], yerr=errors, color=INK, capsize=3, linewidth=1.0)
                _bar_label(axes, position + 0.2, value, height=bar.measured.high)
        axes.axhline(1.0, color=INK, linewidth=0.9, linestyle=":")
        axes.set_xticks(range(len(bars)), [bar.label for bar in bars])
        axes.set_ylabel("speed, parent = 1")
        axes.margins(y=0.14)
        axes.set_ylim(bottom=0)
        axes.grid(visible=False, axis="x")
        axes.set_title("Predicted and measured speed")
        handles = [
            Patch(facecolor=SKY, hatch="//", edgecolor=INK, label="predicted by the search"),
            Patch(facecolor=BLUE, edgecolor=INK, label="measured (bar: interval over rounds)"),
        ]
        _legend_below(figure, handles=handles)
        return _svg(figure, "speed")


def score_heat_map(
    *, layers: Sequence[int], candidates: Sequence[str], values: Mapping[tuple[int, str], float], label: str
) -> str:
    """Draw a value per layer and candidate, on a log scale where the values span it; missing pairs stay empty."""
    grid = [[values.get((layer, candidate), float("nan")) for layer in layers] for candidate in candidates]
    positive = [value for value in values.values() if value > 0]
    is_log = bool(positive) and max(positive) > 20 * min(positive)
    with mpl.rc_context(_STYLE):
        figure = _figure(width=max(6.5, 0.26 * len(layers) + 2.8), height=max(2.4, 0.26 * len(candidates) + 1.5))
        axes = figure.subplots()
        norm = LogNorm(vmin=min(positive), vmax=max(positive)) if is_log else None
        image = axes.pcolormesh(grid, cmap="cividis", norm=norm, edgecolors=PAPER, linewidth=0.4)
        axes.set_xticks([index + 0.5 for index in range(len(layers))], [str(layer) for layer in layers], fontsize=8)
        axes.set_yticks([index + 0.5 for index in range(len(candidates))], list(candidates), fontsize=8)
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.set_xlabel("layer replaced")
        axes.set_title("Replace-1-block scores")
        figure.colorbar(image, ax=axes, label=label)
        return _svg(figure, "scores")


def dependency_heat_map(
    *, layers: Sequence[int], values: Mapping[tuple[int, int], float], highlighted: Sequence[int]
) -> str:
    """Draw M_ij on a log scale, the removed block i across and the later block j downwards.

    The numbers of `highlighted` layers, those without attention, stand out.
    """
    grid = [[values.get((removed, layer), float("nan")) or float("nan") for removed in layers] for layer in layers]
    positive = [value for value in values.values() if value > 0]
    side = max(4.5, 0.2 * len(layers) + 1.5)
    with mpl.rc_context(_STYLE):
        figure = _figure(width=side + 1.2, height=side)
        axes = figure.subplots()
        norm = LogNorm(vmin=min(positive), vmax=max(positive)) if positive else None
        image = axes.pcolormesh(grid, cmap="cividis", norm=norm, edgecolors=PAPER, linewidth=0.4)
        ticks, labels = [index + 0.5 for index in range(len(layers))], [str(layer) for layer in layers]
        axes.set_xticks(ticks, labels, fontsize=7, rotation=90)
        axes.set_yticks(ticks, labels, fontsize=7)
        for layer, across, down in zip(layers, axes.get_xticklabels(), axes.get_yticklabels(), strict=True):
            if layer in highlighted:
                across.set(color=VERMILION, weight="bold")
                down.set(color=VERMILION, weight="bold")
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.set_xlabel("layer removed (without attention: red)")
        axes.set_ylabel("later layer")
        axes.set_title("Dependency of blocks")
        figure.colorbar(image, ax=axes, label="cosine distance of the later layer's update")
        return _svg(figure, "dependencies")


def toggle_bars(points: Sequence[TogglePoint]) -> str:
    """Draw the share of answers that obey the switch, per checkpoint and mode, with Wilson intervals."""
    with mpl.rc_context(_STYLE):
        figure = _figure(width=max(5.5, 1.0 * len(points) + 2.4), height=3.2)
        axes = figure.subplots()
        for offset, color, hatch, name in ((-0.2, PURPLE, None, "on"), (0.2, GREEN, "//", "off")):
            for position, point in enumerate(points):
                estimate = point.on if name == "on" else point.off
                axes.bar(
                    position + offset,
                    estimate.value,
                    width=0.38,
                    color=color,
                    hatch=hatch,
                    edgecolor=INK,
                    linewidth=0.6,
                )
                errors = [[estimate.value - estimate.low], [estimate.high - estimate.value]]
                axes.errorbar([position + offset], [estimate.value], yerr=errors, color=INK, capsize=3, linewidth=1.0)
        axes.set_xticks(range(len(points)), [point.name for point in points])
        axes.set_ylim(0, 1.05)
        axes.set_ylabel("share of answers")
        axes.set_xlabel(f"checkpoint (n = {points[-1].on.num_samples} answers per mode, bars: 95% interval)")
        axes.grid(visible=False, axis="x")
        axes.set_title("Answers that obey the reasoning switch")
        handles = [
            Patch(facecolor=PURPLE, edgecolor=INK, label="on: one well-formed think block"),
            Patch(facecolor=GREEN, hatch="//", edgecolor=INK, label="off: no think tag"),
        ]
        _legend_below(figure, handles=handles)
        return _svg(figure, "toggle")


def lines_by_layer(
    series: Mapping[str, Mapping[int, float]], *, title: str, y_label: str, is_log: bool, name: str
) -> str:
    """Draw one mark per layer and variant: importance statistics, losses of the block library."""
    with mpl.rc_context(_STYLE):
        figure = _figure(width=8.2, height=3.4)
        axes = figure.subplots()
        for index, (label, values) in enumerate(series.items()):
            layers = sorted(values)
            color, marker = CYCLE[index % len(CYCLE)], MARKS[index % len(MARKS)]
            heights = [values[layer] for layer in layers]
            axes.plot(layers, heights, color=color, marker=marker, markersize=4, linewidth=0.9, label=label)
        if is_log:
            axes.set_yscale("log")
        axes.set_title(title)
        axes.set_xlabel("layer")
        axes.set_ylabel(y_label)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
        _legend_below(figure, handles=axes.get_legend_handles_labels()[0])
        return _svg(figure, name)


def pareto_panels(panels: Mapping[Panel, Sequence[Point]]) -> str:
    """Draw the distance to the parent over measured speed, the children that no other beats joined by a line."""
    methods = list(dict.fromkeys(_family(point) for points in panels.values() for point in points))
    with mpl.rc_context(_STYLE):
        figure = _figure(width=5.4 * len(panels) + 0.6, height=4.4)
        handles: dict[str, Line2D] = {}
        for axes, (panel, points) in zip(
            figure.subplots(1, len(panels), squeeze=False).flat, panels.items(), strict=True
        ):
            best = frontier(points)
            axes.plot(
                [point.speedup.value for point in best], [point.kl.value for point in best], color=INK, linewidth=0.9
            )
            for point in points:
                if math.isfinite(point.kl.value):
                    _pareto_point(axes, point, place=methods.index(_family(point)), handles=handles)
            distances = [point.kl.value for point in points if 0 < point.kl.value < math.inf]
            if distances and max(distances) > 20 * min(distances):
                axes.set_yscale("symlog", linthresh=min(distances))
            axes.set_ylim(bottom=0)
            axes.set_title(panel.title)
            axes.set_xlabel("measured speed, parent = 1 (bars: interval over rounds)")
            axes.set_ylabel("KL to the parent, nats per token")
        _legend_below(figure, handles=list(handles.values()))
        return _svg(figure, "pareto")


def _pareto_point(axes: Axes, point: Point, *, place: int, handles: dict[str, Line2D]) -> None:
    name, speed, kl = _family(point), point.speedup, point.kl
    color, marker = CYCLE[place % len(CYCLE)], MARKS[place % len(MARKS)]
    axes.errorbar(
        [speed.value],
        [kl.value],
        xerr=[[speed.value - speed.low], [speed.high - speed.value]],
        yerr=[[kl.value - kl.low], [kl.high - kl.value]],
        color=color,
        marker=marker,
        markersize=8 if point.is_ours else 5,
        markerfacecolor=color if point.is_ours else PAPER,
        capsize=2,
        linewidth=0.8,
    )
    handles.setdefault(
        name,
        Line2D(
            [],
            [],
            color=color,
            marker=marker,
            linestyle="",
            markerfacecolor=color if point.is_ours else PAPER,
            label=name,
        ),
    )
    if point.method in (PUZZLE, CHILD, FINAL):
        axes.annotate(point.target, (speed.value, kl.value), xytext=(6, 5), textcoords="offset points", fontsize=8.5)


def _family(point: Point) -> str:
    """Return the method without the number of a random draw."""
    return point.method.split(" ")[0] if point.method.startswith("random ") else point.method


def _figure(*, width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def _svg(figure: Figure, name: str) -> str:
    # The salt fixes the ids that matplotlib would draw at random, and keeps those of two figures on one page apart.
    with mpl.rc_context({"svg.hashsalt": f"refit-{name}"}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Title": name})
    svg = buffer.getvalue()
    # Groups carry ids that repeat from figure to figure (axes_1); nothing refers to them.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    return "\n".join(line.rstrip() for line in svg[svg.index("<svg") :].splitlines()) + "\n"


def _legend_below(figure: Figure, *, handles: Sequence[object]) -> None:
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, max(1, len(handles))), fontsize=9)


def _strip_bar(axes: Axes, first: int, num_layers: int, *, kind: str, share: float) -> None:
    left, width = first - 0.42, num_layers - 0.16
    if kind == "no_op":
        axes.add_patch(Rectangle((left, 0), width, 0.22, fill=False, hatch="xxx", edgecolor=VERMILION, linewidth=0.8))
    elif kind == "linear":
        axes.add_patch(Rectangle((left, 0), width, 0.3, facecolor=ORANGE, hatch="//", edgecolor=INK, linewidth=0.6))
    else:
        color = GREEN if num_layers > 1 else BLUE
        axes.add_patch(Rectangle((left, 0), width, share, facecolor=color, edgecolor="none"))


def _error_line(axes: Axes, names: Sequence[str], estimates: Sequence[Estimate], *, color: str, marker: str) -> None:
    values = [estimate.value for estimate in estimates]
    below = [estimate.value - estimate.low for estimate in estimates]
    above = [estimate.high - estimate.value for estimate in estimates]
    axes.errorbar(range(len(names)), values, yerr=[below, above], color=color, marker=marker, capsize=3)
    axes.set_xticks(range(len(names)), list(names))


def _bar_label(axes: Axes, position: float, value: float, *, height: float) -> None:
    axes.annotate(
        f"{value:.2f}x", (position, height), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=9
    )
