"""pretraining_mix: packed tokens for continued pre-training.

A mixture of its own: continued pre-training may want other domains than distillation.
"""

import dagster as dg

from assets.stage_asset import describe_outcome, stage_asset
from pipeline.recipe import Recipe
from resources.launcher import Launcher


def build(recipe: Recipe) -> dg.AssetsDefinition:
    """Return the asset for one recipe."""

    @stage_asset("pretraining_mix", recipe=recipe, kinds={"safetensors"})
    def pretraining_mix(
        context: dg.AssetExecutionContext, launcher: dg.ResourceParam[Launcher]
    ) -> dg.MaterializeResult:
        return describe_outcome(launcher.materialize(context, "pretraining_mix"), recipe=recipe)

    return pretraining_mix
