"""child_checkpoint: the child assembled from the library and measured; the search is repeated where it falls short.

Speed is measured on the assembled child; where it falls short, the search is repeated with what was learnt.
"""

import dagster as dg

from assets.stage_asset import describe_outcome, stage_asset
from pipeline.recipe import Recipe
from resources.launcher import Launcher


def build(recipe: Recipe) -> dg.AssetsDefinition:
    """Return the asset for one recipe."""

    @stage_asset("child_checkpoint", recipe=recipe, kinds={"torch", "safetensors"})
    def child_checkpoint(
        context: dg.AssetExecutionContext, launcher: dg.ResourceParam[Launcher]
    ) -> dg.MaterializeResult:
        return describe_outcome(launcher.materialize(context, "child_checkpoint"), recipe=recipe)

    return child_checkpoint
