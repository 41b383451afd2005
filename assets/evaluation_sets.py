"""evaluation_sets: held-out text, multiple-choice items and verifiable tasks that nothing trains on.

Made before any training set, because every training set is decontaminated against it.
"""

import dagster as dg

from assets.stage_asset import describe_outcome, stage_asset
from pipeline.recipe import Recipe
from resources.launcher import Launcher


def build(recipe: Recipe) -> dg.AssetsDefinition:
    """Return the asset for one recipe."""

    @stage_asset("evaluation_sets", recipe=recipe, kinds={"parquet"})
    def evaluation_sets(
        context: dg.AssetExecutionContext, launcher: dg.ResourceParam[Launcher]
    ) -> dg.MaterializeResult:
        return describe_outcome(launcher.materialize(context, "evaluation_sets"), recipe=recipe)

    return evaluation_sets
