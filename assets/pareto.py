"""pareto: quality against measured speed, every target's children and baselines on one plot.

Shared by all targets; it reads those that are there, by `deps`, and names those that are not.
"""

import dagster as dg

from assets.stage_asset import describe_outcome, stage_asset
from pipeline.recipe import Recipe
from resources.launcher import Launcher


def build(recipe: Recipe) -> dg.AssetsDefinition:
    """Return the asset for one recipe."""

    @stage_asset("pareto", recipe=recipe, kinds={"parquet"})
    def pareto(context: dg.AssetExecutionContext, launcher: dg.ResourceParam[Launcher]) -> dg.MaterializeResult:
        return describe_outcome(launcher.materialize(context, "pareto"), recipe=recipe)

    return pareto
