"""dependency_matrix: how much each block of the child needs the blocks before it.

A heat map of cosine distances; FFN fusion joins attention-free layers that hardly depend on each other.
"""

import dagster as dg

from assets.stage_asset import describe_outcome, stage_asset
from pipeline.recipe import Recipe
from resources.launcher import Launcher


def build(recipe: Recipe) -> dg.AssetsDefinition:
    """Return the asset for one recipe."""

    @stage_asset("dependency_matrix", recipe=recipe, kinds={"torch", "parquet"})
    def dependency_matrix(
        context: dg.AssetExecutionContext, launcher: dg.ResourceParam[Launcher]
    ) -> dg.MaterializeResult:
        return describe_outcome(launcher.materialize(context, "dependency_matrix"), recipe=recipe)

    return dependency_matrix
