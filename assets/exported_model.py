"""exported_model: the final checkpoint as one DeciLM (nemotron-nas) directory, and as GGUF where the recipe asks.

The directory to hand on; its logits are compared with those of the checkpoint it came from.
"""

import dagster as dg

from assets.stage_asset import describe_outcome, stage_asset
from pipeline.recipe import Recipe
from resources.launcher import Launcher


def build(recipe: Recipe) -> dg.AssetsDefinition:
    """Return the asset for one recipe."""

    @stage_asset("exported_model", recipe=recipe, kinds={"safetensors"})
    def exported_model(context: dg.AssetExecutionContext, launcher: dg.ResourceParam[Launcher]) -> dg.MaterializeResult:
        return describe_outcome(launcher.materialize(context, "exported_model"), recipe=recipe)

    return exported_model
