"""mip_solution: one variant per layer: the lowest predicted loss that meets every limit of the target.

An infeasible target fails here, naming the limit that binds and the best that can be reached.
"""

import dagster as dg

from assets.stage_asset import describe_outcome, stage_asset
from pipeline.recipe import Recipe
from resources.launcher import Launcher


def build(recipe: Recipe) -> dg.AssetsDefinition:
    """Return the asset for one recipe."""

    @stage_asset("mip_solution", recipe=recipe, kinds={"pulp"})
    def mip_solution(context: dg.AssetExecutionContext, launcher: dg.ResourceParam[Launcher]) -> dg.MaterializeResult:
        return describe_outcome(launcher.materialize(context, "mip_solution"), recipe=recipe)

    return mip_solution
