"""evaluation: every checkpoint of the target by one harness: perplexity, KL, tasks, toggle compliance.

Collects one evaluation per checkpoint, each reused while checkpoint, suite and harness stay the same.
"""

import dagster as dg

from assets.stage_asset import describe_outcome, stage_asset
from pipeline.recipe import Recipe
from resources.launcher import Launcher


def build(recipe: Recipe) -> dg.AssetsDefinition:
    """Return the asset for one recipe."""

    @stage_asset("evaluation", recipe=recipe, kinds={"torch"})
    def evaluation(context: dg.AssetExecutionContext, launcher: dg.ResourceParam[Launcher]) -> dg.MaterializeResult:
        return describe_outcome(launcher.materialize(context, "evaluation"), recipe=recipe)

    return evaluation
