"""distillation_mix: packed tokens for importance, block distillation, scores and knowledge distillation.

Read by importance, block distillation, scores and knowledge distillation, each from the front.
"""

import dagster as dg

from assets.stage_asset import describe_outcome, stage_asset
from pipeline.recipe import Recipe
from resources.launcher import Launcher


def build(recipe: Recipe) -> dg.AssetsDefinition:
    """Return the asset for one recipe."""

    @stage_asset("distillation_mix", recipe=recipe, kinds={"safetensors"})
    def distillation_mix(
        context: dg.AssetExecutionContext, launcher: dg.ResourceParam[Launcher]
    ) -> dg.MaterializeResult:
        return describe_outcome(launcher.materialize(context, "distillation_mix"), recipe=recipe)

    return distillation_mix
