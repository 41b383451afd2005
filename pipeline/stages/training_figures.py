"""The curve of a training as the figure that its asset shows; drawn once, by rank 0."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from pipeline.report.drawings import loss_panels, save_figures
from pipeline.report.figures import curve_panels
from pipeline.stage import StageResult
from pipeline.training.distributed import init_distributed


def with_curve(result: StageResult, *, asset: str, curve: Sequence[Mapping[str, float]], out_dir: Path) -> StageResult:
    """Return the result with the figure of its training curve, one mapping per step."""
    if init_distributed().rank != 0:
        return result
    panels = loss_panels({asset: pl.DataFrame(list(curve))})
    return result.model_copy(update={"figures": save_figures({"curve": curve_panels(panels)}, out_dir=out_dir)})
