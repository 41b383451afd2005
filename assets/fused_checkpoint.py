"""fused_checkpoint: runs of attention-free layers joined into wide FFNs; the child itself where it has none.

A child without a run of attention-free layers passes through, and says so.
"""

import dagster as dg

from assets.stage_asset import describe_outcome, stage_asset
from pipeline.recipe import Recipe
from resources.launcher import Launcher


def build(recipe: Recipe) -> dg.AssetsDefinition:
    """Return the asset for one recipe."""

    @stage_asset("fused_checkpoint", recipe=recipe, kinds={"torch", "safetensors"})
    def fused_checkpoint(
        context: dg.AssetExecutionContext, launcher: dg.ResourceParam[Launcher]
    ) -> dg.MaterializeResult:
        return describe_outcome(launcher.materialize(context, "fused_checkpoint"), recipe=recipe)

    return fused_checkpoint
