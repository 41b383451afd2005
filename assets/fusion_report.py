"""fusion_report: what fusion cost the child, beside reversed and deleted FFNs, and after distillation.

All on the same held-out windows, and timed in turn on this machine.
"""

import dagster as dg

from assets.stage_asset import describe_outcome, stage_asset
from pipeline.recipe import Recipe
from resources.launcher import Launcher


def build(recipe: Recipe) -> dg.AssetsDefinition:
    """Return the asset for one recipe."""

    @stage_asset("fusion_report", recipe=recipe, kinds={"torch", "json"})
    def fusion_report(context: dg.AssetExecutionContext, launcher: dg.ResourceParam[Launcher]) -> dg.MaterializeResult:
        return describe_outcome(launcher.materialize(context, "fusion_report"), recipe=recipe)

    return fusion_report
