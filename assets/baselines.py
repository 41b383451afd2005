"""baselines: what simpler methods choose under the same limits, scored as whole models and measured.

The honest comparison for refined_solution; nothing downstream is built from it.
"""

import dagster as dg

from assets.stage_asset import describe_outcome, stage_asset
from pipeline.recipe import Recipe
from resources.launcher import Launcher


def build(recipe: Recipe) -> dg.AssetsDefinition:
    """Return the asset for one recipe."""

    @stage_asset("baselines", recipe=recipe, kinds={"torch", "pulp"})
    def baselines(context: dg.AssetExecutionContext, launcher: dg.ResourceParam[Launcher]) -> dg.MaterializeResult:
        return describe_outcome(launcher.materialize(context, "baselines"), recipe=recipe)

    return baselines
