"""sft_checkpoint: the child after supervised fine-tuning on paired reasoning modes.

Teaches both modes at once; only the assistant's tokens, end token included, carry loss.
"""

import dagster as dg

from assets.stage_asset import describe_outcome, stage_asset
from pipeline.recipe import Recipe
from resources.launcher import Launcher


def build(recipe: Recipe) -> dg.AssetsDefinition:
    """Return the asset for one recipe."""

    @stage_asset("sft_checkpoint", recipe=recipe, kinds={"torch", "deepspeed"})
    def sft_checkpoint(context: dg.AssetExecutionContext, launcher: dg.ResourceParam[Launcher]) -> dg.MaterializeResult:
        return describe_outcome(launcher.materialize(context, "sft_checkpoint"), recipe=recipe)

    return sft_checkpoint
