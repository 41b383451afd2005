"""Figures of the search, as figures draws the others: scores, dependencies, the block library, quality over speed."""

import math
from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from pipeline.puzzle.baselines import PUZZLE
from pipeline.report.canvas import (
    CYCLE,
    INK,
    MARKS,
    PAPER,
    STYLE,
    VERMILION,
    as_svg,
    legend_below,
    new_figure,
)
from pipeline.report.pareto import CHILD, FINAL, Panel, Point, frontier


def score_heat_map(
    *, layers: Sequence[int], candidates: Sequence[str], values: Mapping[tuple[int, str], float], label: str
) -> str:
    """Draw a value per layer and candidate, on a log scale where the values span it; missing pairs stay empty."""
    grid = [[values.get((layer, candidate), float("nan")) for layer in layers] for candidate in candidates]
    positive = [value for value in values.values() if value > 0]
    is_log = bool(positive) and max(positive) > 20 * min(positive)
    with mpl.rc_context(STYLE):
        figure = new_figure(width=max(6.5, 0.26 * len(layers) + 2.8), height=max(2.4, 0.26 * len(candidates) + 1.5))
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
        return as_svg(figure, "scores")


def dependency_heat_map(
    *, layers: Sequence[int], values: Mapping[tuple[int, int], float], highlighted: Sequence[int]
) -> str:
    """Draw M_ij on a log scale, the removed block i across and the later block j downwards.

    The numbers of `highlighted` layers, those without attention, stand out.
    """
    grid = [[values.get((removed, layer), float("nan")) or float("nan") for removed in layers] for layer in layers]
    positive = [value for value in values.values() if value > 0]
    side = max(4.5, 0.2 * len(layers) + 1.5)
    with mpl.rc_context(STYLE):
        figure = new_figure(width=side + 1.2, height=side)
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
        return as_svg(figure, "dependencies")


def lines_by_layer(
    series: Mapping[str, Mapping[int, float]], *, title: str, y_label: str, is_log: bool, name: str
) -> str:
    """Draw one mark per layer and variant: importance statistics, losses of the block library."""
    with mpl.rc_context(STYLE):
        figure = new_figure(width=8.2, height=3.4)
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
        legend_below(figure, handles=axes.get_legend_handles_labels()[0])
        return as_svg(figure, name)


def pareto_panels(panels: Mapping[Panel, Sequence[Point]]) -> str:
    """Draw the distance to the parent over measured speed, the children that no other beats joined by a line."""
    methods = list(dict.fromkeys(_family(point) for points in panels.values() for point in points))
    with mpl.rc_context(STYLE):
        figure = new_figure(width=5.4 * len(panels) + 0.6, height=4.4)
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
        legend_below(figure, handles=list(handles.values()))
        return as_svg(figure, "pareto")


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
