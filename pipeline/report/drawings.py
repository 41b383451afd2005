"""The figures of a report, from ReportInputs: which numbers go into which figure. Drawing itself is in figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from pipeline.architecture import Architecture
from pipeline.evaluation.results import CheckpointEvaluation
from pipeline.report.evaluation_tables import ordered
from pipeline.report.figures import (
    Curve,
    CurvePanel,
    QualityPoint,
    SpeedBar,
    TogglePoint,
    architecture_strip,
    curve_panels,
    quality_through_stages,
    speed_bars,
    toggle_bars,
)
from pipeline.report.inputs import ReportInputs
from pipeline.report.search_figures import dependency_heat_map, lines_by_layer, score_heat_map
from pipeline.stage import VIEW_DIR

CURVE_TITLES = {
    "kd_checkpoint": "Knowledge distillation",
    "cpt_checkpoint": "Continued pre-training",
    "sft_checkpoint": "Supervised fine-tuning",
    "rl_checkpoint": "Reinforcement learning",
}
# What a training's panel shows where its curve has it; a policy's loss says nothing, its reward does.
CURVE_COLUMNS = {"kd_checkpoint": ("loss", "kl", "cosine"), "rl_checkpoint": ("reward", "accuracy", "format_rate")}


def draw(inputs: ReportInputs) -> dict[str, str]:
    """Return every figure that the inputs allow, by name, as SVG text."""
    found: dict[str, str] = {}
    parent = inputs.architectures.get("parent_checkpoint")
    child = inputs.architectures.get("rl_checkpoint") or inputs.architectures.get("child_checkpoint")
    if parent is not None and child is not None:
        found["architecture"] = architecture_strip(parent, child)
    bars = speed_comparison(inputs)
    if bars:
        found["speed"] = speed_bars(bars)
    found |= draw_evaluations(inputs.evaluations)
    panels = loss_panels(inputs.curves)
    if panels:
        found["curves"] = curve_panels(panels)
    if inputs.scores is not None:
        found["scores"] = draw_scores(inputs.scores)
    if inputs.library_losses is not None:
        found["library"] = draw_library(inputs.library_losses)
    child = inputs.architectures.get("child_checkpoint")
    if inputs.dependencies is not None and child is not None:
        found["dependencies"] = draw_dependencies(inputs.dependencies, child)
    return found


def draw_evaluations(evaluations: Mapping[str, CheckpointEvaluation]) -> dict[str, str]:
    """Return the figures of quality and toggle compliance through the stages; none without an evaluation."""
    measured = [(name, evaluations[name]) for name in ordered(evaluations)]
    if not measured:
        return {}
    quality = [
        QualityPoint(
            name=name,
            perplexity=found.text_overall.perplexity,
            kl_nats_per_token=found.text_overall.kl_nats_per_token,
        )
        for name, found in measured
    ]
    toggle = [
        TogglePoint(name=name, on=found.thinking_on.toggle_compliance, off=found.thinking_off.toggle_compliance)
        for name, found in measured
    ]
    return {"quality": quality_through_stages(quality), "toggle": toggle_bars(toggle)}


def save_figures(figures: Mapping[str, str], *, out_dir: Path) -> dict[str, str]:
    """Write figures below out_dir/view and return their paths there, as a StageResult names them."""
    directory = out_dir / VIEW_DIR
    directory.mkdir(parents=True, exist_ok=True)
    for name, svg in figures.items():
        (directory / f"{name}.svg").write_text(svg, encoding="utf-8")
    return {name: f"{name}.svg" for name in figures}


def speed_comparison(inputs: ReportInputs) -> list[SpeedBar]:
    """Return predicted and measured speed of each phase for which there is either."""
    bars = []
    for phase in ("decode", "prefill"):
        predicted, measured = inputs.predicted_speedup(phase), inputs.speedup(phase)
        if predicted is not None or measured is not None:
            bars.append(SpeedBar(label=phase, predicted=predicted, measured=measured))
    return bars


def loss_panels(curves: Mapping[str, pl.DataFrame]) -> list[CurvePanel]:
    """Return one panel per training, over the tokens it has seen."""
    panels = []
    for asset, frame in curves.items():
        columns = [column for column in CURVE_COLUMNS.get(asset, ("loss",)) if column in frame.columns] or ["loss"]
        panels.append(
            CurvePanel(
                title=CURVE_TITLES[asset],
                x_label="tokens",
                y_label=columns[0] if len(columns) == 1 else "value per step",
                curves=[Curve(label=name, x=frame["tokens"].to_list(), y=frame[name].to_list()) for name in columns],
            )
        )
    return panels


def draw_scores(scores: pl.DataFrame) -> str:
    """Draw the replace-1-block KL of every layer and candidate, from the columns of scores.parquet."""
    rows = scores.select("layer", "attention", "ffn", "kl").rows()
    values = {(layer, f"{attention}+{ffn}"): kl for layer, attention, ffn, kl in rows}
    layers = sorted({layer for layer, _ in values})
    return score_heat_map(
        layers=layers,
        candidates=by_mean(values, layers=layers),
        values=values,
        label="KL to the parent, nats per token",
    )


def by_mean(values: Mapping[tuple[int, str], float], *, layers: Sequence[int]) -> list[str]:
    """Return the candidates from the mildest to the harshest, by their mean over the layers that have them."""
    means = {}
    for candidate in sorted({candidate for _, candidate in values}):
        found = [values[layer, candidate] for layer in layers if (layer, candidate) in values]
        means[candidate] = sum(found) / len(found)
    return sorted(means, key=lambda candidate: means[candidate])


def draw_dependencies(dependencies: pl.DataFrame, child: Architecture) -> str:
    """Draw the dependency matrix from the columns of dependencies.parquet."""
    values = {(removed, layer): distance for removed, layer, distance in dependencies.rows()}
    return dependency_heat_map(
        layers=sorted({layer for pair in values for layer in pair}),
        values=values,
        highlighted=[layer for layer, block in enumerate(child.blocks) if block.attention.kind == "no_op"],
    )


def draw_library(losses: pl.DataFrame) -> str:
    """Draw the last distillation loss of every trained block, from the columns of losses.parquet."""
    last = losses.sort("step").group_by("subblock", "variant", "layer", maintain_order=True).last()
    series: dict[str, dict[int, float]] = {}
    for subblock, variant, layer, loss in last.select("subblock", "variant", "layer", "loss").sort(pl.all()).rows():
        series.setdefault(f"{subblock} {variant}", {})[layer] = loss
    return lines_by_layer(
        series,
        title="Block library: loss of each trained variant",
        y_label="normalised MSE (log scale)",
        is_log=True,
        name="library",
    )
