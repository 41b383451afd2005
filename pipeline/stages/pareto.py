"""pareto: quality against measured speed, with every target's children, what simpler methods chose, and the parent.

Takes what is there; a target that is missing, or that failed a blocking check, is named and not an error.
"""

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from pipeline.puzzle.batches import compared_scenarios
from pipeline.puzzle.tables import PARETO, SCHEMAS, write_table
from pipeline.report.drawings import save_figures
from pipeline.report.pareto import (
    Point,
    by_panel,
    dominated_targets,
    frontier,
    missing,
    read_baselines,
    read_checkpoints,
)
from pipeline.report.search_figures import pareto_panels
from pipeline.stage import StageInputs, StageResult, Table
from pipeline.stages.configs import ParetoStage


def run(config: ParetoStage, inputs: StageInputs, out_dir: Path) -> StageResult:
    """Write pareto.parquet: one row per child and panel, the parent's included."""
    found = {asset: inputs.by_target(asset) for asset in ("baselines", "evaluation", "speed_report")}
    points: list[Point] = []
    for target, limits in config.limits.items():
        if target in found["baselines"]:
            points += read_baselines(found["baselines"][target], target=target)
        if target in found["evaluation"] and target in found["speed_report"]:
            scenarios, phase = compared_scenarios(limits, config.profile)
            points += read_checkpoints(
                found["evaluation"][target],
                found["speed_report"][target],
                target=target,
                scenarios=scenarios,
                phase=phase,
            )
    table = _table(points)
    out_dir.mkdir(parents=True, exist_ok=True)
    write_table(out_dir, PARETO, table)
    incomplete, dominated = missing(found, list(config.limits)), dominated_targets(points)
    figures = {"pareto": pareto_panels(by_panel(points))} if points else {}
    return StageResult(
        metrics={
            "num_targets": len(config.limits),
            "num_incomplete_targets": len(incomplete),
            "num_dominated_targets": len(dominated),
            "num_children": len(points),
        },
        facts={
            "missing": "; ".join(f"{name}: {', '.join(lacks)}" for name, lacks in incomplete.items()) or "nothing",
            "search beaten in": "; ".join(f"{name}: by {one}" for name, one in dominated.items()) or "no target",
        },
        figures=save_figures(figures, out_dir=out_dir),
        tables={
            "children": Table.of(
                tuple(table.columns),
                [tuple(round(v, 5) if isinstance(v, float) else v for v in row) for row in table.iter_rows()],
            )
        },
    )


def _table(points: Sequence[Point]) -> pl.DataFrame:
    """Return every point, panel by panel, the fastest first."""
    rows = []
    for panel, children in by_panel(points).items():
        best = frontier(children)
        for one in sorted(children, key=lambda point: -point.speedup.value):
            rows.append(
                (
                    one.target,
                    one.method,
                    panel.text,
                    panel.scenario,
                    panel.phase,
                    one.speedup.value,
                    one.speedup.low,
                    one.speedup.high,
                    one.kl.value,
                    one.kl.low,
                    one.kl.high,
                    one.num_parameters,
                    one in best,
                )
            )
    return pl.DataFrame(rows, schema=SCHEMAS[PARETO], orient="row")
