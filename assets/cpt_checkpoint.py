"""cpt_checkpoint: the child after continued pre-training.

Follows distillation: plain next-token training on the pre-training mixture.
"""

import dagster as dg

from assets.stage_asset import describe_outcome, stage_asset
from pipeline.recipe import Recipe
from resources.launcher import Launcher


def build(recipe: Recipe) -> dg.AssetsDefinition:
    """Return the asset for one recipe."""

    @stage_asset("cpt_checkpoint", recipe=recipe, kinds={"torch", "deepspeed"})
    def cpt_checkpoint(context: dg.AssetExecutionContext, launcher: dg.ResourceParam[Launcher]) -> dg.MaterializeResult:
        return describe_outcome(launcher.materialize(context, "cpt_checkpoint"), recipe=recipe)

    return cpt_checkpoint
