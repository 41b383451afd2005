"""channel_importance: fFN channel contribution and KV-head statistics over calibration tokens.

Decides which FFN channels a narrower variant keeps and which heads are pooled.
"""

import dagster as dg

from assets.stage_asset import describe_outcome, stage_asset
from pipeline.recipe import Recipe
from resources.launcher import Launcher


def build(recipe: Recipe) -> dg.AssetsDefinition:
    """Return the asset for one recipe."""

    @stage_asset("channel_importance", recipe=recipe, kinds={"torch", "safetensors"})
    def channel_importance(
        context: dg.AssetExecutionContext, launcher: dg.ResourceParam[Launcher]
    ) -> dg.MaterializeResult:
        return describe_outcome(launcher.materialize(context, "channel_importance"), recipe=recipe)

    return channel_importance
