"""report: the whole run on one HTML page, and its figures one by one below view/."""

import re
from pathlib import Path

from pipeline.report.content import headline_table, wall_time_table
from pipeline.report.drawings import draw, save_figures
from pipeline.report.html import render_page
from pipeline.report.inputs import read_inputs
from pipeline.report.page import compose_page
from pipeline.report.summary import REPORT_FILE
from pipeline.stage import StageInputs, StageResult
from pipeline.stages.configs import ReportStage

_REMOTE_LOAD = re.compile(
    r"""<link\b|<script\b[^>]*\bsrc=|<(?:img|iframe)\b[^>]*\bsrc=["']?https?:|@import""", re.IGNORECASE
)


def run(config: ReportStage, inputs: StageInputs, out_dir: Path) -> StageResult:
    """Write report.html."""
    found = read_inputs(inputs.artifacts)
    figures = draw(found)
    page = compose_page(
        found,
        figures=figures,
        recipe_name=config.recipe_name,
        recipe_description=config.recipe_description,
        target_name=config.target_name,
    )
    html = render_page(page)
    (out_dir / REPORT_FILE).write_text(html, encoding="utf-8")
    return StageResult(
        metrics={
            "size_bytes": len(html.encode()),
            "num_sections": len(page.sections),
            "num_remote_loads": len(_REMOTE_LOAD.findall(html)),
        },
        facts={"verdict": page.verdict},
        tables={"final_checkpoint_against_parent": headline_table(found), "wall_time": wall_time_table(found)},
        figures=save_figures(figures, out_dir=out_dir),
    )
