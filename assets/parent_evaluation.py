"""parent_evaluation: the parent measured by the harness that measures its children.

Shared by all targets; a new child never has the parent measured again.
"""

import dagster as dg

from assets.stage_asset import describe_outcome, stage_asset
from pipeline.recipe import Recipe
from resources.launcher import Launcher


def build(recipe: Recipe) -> dg.AssetsDefinition:
    """Return the asset for one recipe."""

    @stage_asset("parent_evaluation", recipe=recipe, kinds={"torch"})
    def parent_evaluation(
        context: dg.AssetExecutionContext, launcher: dg.ResourceParam[Launcher]
    ) -> dg.MaterializeResult:
        return describe_outcome(launcher.materialize(context, "parent_evaluation"), recipe=recipe)

    return parent_evaluation
