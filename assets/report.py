"""report: one self-contained HTML page: architecture, predicted against measured, quality, loss curves.

The page to open first: everything a target's run found out, in one file.
"""

import dagster as dg

from assets.stage_asset import describe_outcome, stage_asset
from pipeline.recipe import Recipe
from resources.launcher import Launcher


def build(recipe: Recipe) -> dg.AssetsDefinition:
    """Return the asset for one recipe."""

    @stage_asset("report", recipe=recipe, kinds={"html"})
    def report(context: dg.AssetExecutionContext, launcher: dg.ResourceParam[Launcher]) -> dg.MaterializeResult:
        return describe_outcome(launcher.materialize(context, "report"), recipe=recipe)

    return report
