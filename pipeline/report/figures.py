"""Figures of models and their training as SVG text: numbers in, one string out. Those of the search: search_figures."""

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from pipeline.architecture import Architecture
from pipeline.evaluation.intervals import Estimate
from pipeline.report.canvas import (
    BLUE,
    CYCLE,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    STYLE,
    VERMILION,
    as_svg,
    legend_below,
    new_figure,
)


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
    with mpl.rc_context(STYLE):
        figure = new_figure(width=max(7.0, 0.27 * parent.num_hidden_layers + 1.6), height=3.5)
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
        legend_below(figure, handles=handles)
        return as_svg(figure, "architecture")


def curve_panels(panels: Sequence[CurvePanel], *, name: str = "curves") -> str:
    """Draw loss curves side by side, each panel with its own axes."""
    with mpl.rc_context(STYLE):
        num_columns = min(len(panels), 2)
        num_rows = -(-len(panels) // num_columns)
        figure = new_figure(width=4.6 * num_columns, height=2.9 * num_rows)
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
        return as_svg(figure, name)


def quality_through_stages(points: Sequence[QualityPoint]) -> str:
    """Draw perplexity and KL to the parent for each checkpoint, with 95% intervals over windows of text."""
    with mpl.rc_context(STYLE):
        figure = new_figure(width=9.2, height=3.2)
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
        return as_svg(figure, "quality")


def speed_bars(bars: Sequence[SpeedBar]) -> str:
    """Draw predicted and measured speed relative to the parent, with the measured 95% interval."""
    with mpl.rc_context(STYLE):
        figure = new_figure(width=max(5.5, 1.6 * len(bars) + 2.4), height=3.4)
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
        legend_below(figure, handles=handles)
        return as_svg(figure, "speed")


def toggle_bars(points: Sequence[TogglePoint]) -> str:
    """Draw the share of answers that obey the switch, per checkpoint and mode, with Wilson intervals."""
    with mpl.rc_context(STYLE):
        figure = new_figure(width=max(5.5, 1.0 * len(points) + 2.4), height=3.2)
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
        legend_below(figure, handles=handles)
        return as_svg(figure, "toggle")


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
