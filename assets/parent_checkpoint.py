"""parent_checkpoint: the checkpoint that everything starts from, verified and in the pipeline's own layout.

Fetched or made once, then shared by every target. Refused here, with the reason, rather than half-way down the
graph: weights that are not safetensors, families other than Llama, sizes that do not add up.
"""

import dagster as dg

from assets.stage_asset import describe_outcome, stage_asset
from pipeline.recipe import Recipe
from resources.launcher import Launcher


def build(recipe: Recipe) -> dg.AssetsDefinition:
    """Return the asset for one recipe."""

    @stage_asset("parent_checkpoint", recipe=recipe, kinds={"safetensors"})
    def parent_checkpoint(
        context: dg.AssetExecutionContext, launcher: dg.ResourceParam[Launcher]
    ) -> dg.MaterializeResult:
        return describe_outcome(launcher.materialize(context, "parent_checkpoint"), recipe=recipe)

    return parent_checkpoint
