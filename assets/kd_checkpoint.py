"""kd_checkpoint: the child after knowledge distillation from the parent.

Starts from the fused child, with the parent as teacher; loss and KL are observed while it trains.
"""

import dagster as dg

from assets.stage_asset import describe_outcome, stage_asset
from pipeline.recipe import Recipe
from resources.launcher import Launcher


def build(recipe: Recipe) -> dg.AssetsDefinition:
    """Return the asset for one recipe."""

    @stage_asset("kd_checkpoint", recipe=recipe, kinds={"torch", "deepspeed"})
    def kd_checkpoint(context: dg.AssetExecutionContext, launcher: dg.ResourceParam[Launcher]) -> dg.MaterializeResult:
        return describe_outcome(launcher.materialize(context, "kd_checkpoint"), recipe=recipe)

    return kd_checkpoint
