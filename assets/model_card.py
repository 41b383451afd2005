"""model_card: what the exported model is, how it was made, measured and licensed.

Written from the artifacts themselves, so that no number in it is typed by hand.
"""

import dagster as dg

from assets.stage_asset import describe_outcome, stage_asset
from pipeline.recipe import Recipe
from resources.launcher import Launcher


def build(recipe: Recipe) -> dg.AssetsDefinition:
    """Return the asset for one recipe."""

    @stage_asset("model_card", recipe=recipe, kinds={"markdown"})
    def model_card(context: dg.AssetExecutionContext, launcher: dg.ResourceParam[Launcher]) -> dg.MaterializeResult:
        return describe_outcome(launcher.materialize(context, "model_card"), recipe=recipe)

    return model_card
