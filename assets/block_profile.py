"""block_profile: measured prefill and decode time of every variant, with exact weight and KV memory.

Reads the parent's shapes, the search space and the hardware, never the weights of the library.
"""

import dagster as dg

from assets.stage_asset import describe_outcome, stage_asset
from pipeline.recipe import Recipe
from resources.launcher import Launcher


def build(recipe: Recipe) -> dg.AssetsDefinition:
    """Return the asset for one recipe."""

    @stage_asset("block_profile", recipe=recipe, kinds={"torch", "parquet"})
    def block_profile(context: dg.AssetExecutionContext, launcher: dg.ResourceParam[Launcher]) -> dg.MaterializeResult:
        return describe_outcome(launcher.materialize(context, "block_profile"), recipe=recipe)

    return block_profile
