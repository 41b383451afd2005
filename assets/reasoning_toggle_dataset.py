"""reasoning_toggle_dataset: traces filtered and verified, paired with detailed thinking on and off, and packed.

The data that teaches the switch: the same questions with a trace and without one.
"""

import dagster as dg

from assets.stage_asset import describe_outcome, stage_asset
from pipeline.recipe import Recipe
from resources.launcher import Launcher


def build(recipe: Recipe) -> dg.AssetsDefinition:
    """Return the asset for one recipe."""

    @stage_asset("reasoning_toggle_dataset", recipe=recipe, kinds={"parquet", "safetensors"})
    def reasoning_toggle_dataset(
        context: dg.AssetExecutionContext, launcher: dg.ResourceParam[Launcher]
    ) -> dg.MaterializeResult:
        return describe_outcome(launcher.materialize(context, "reasoning_toggle_dataset"), recipe=recipe)

    return reasoning_toggle_dataset
