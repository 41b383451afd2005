"""speed_report: prefill and decode of parent, child and final checkpoint, measured in turn; cached tokens.

Predicted and measured stand side by side; measured means this machine, these threads, this dtype.
"""

import dagster as dg

from assets.stage_asset import describe_outcome, stage_asset
from pipeline.recipe import Recipe
from resources.launcher import Launcher


def build(recipe: Recipe) -> dg.AssetsDefinition:
    """Return the asset for one recipe."""

    @stage_asset("speed_report", recipe=recipe, kinds={"torch"})
    def speed_report(context: dg.AssetExecutionContext, launcher: dg.ResourceParam[Launcher]) -> dg.MaterializeResult:
        return describe_outcome(launcher.materialize(context, "speed_report"), recipe=recipe)

    return speed_report
