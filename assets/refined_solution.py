"""refined_solution: the programme's answers scored as whole models, and the best of them improved in rounds.

What child_checkpoint assembles; the table of whole models says what sums of single scores were worth.
"""

import dagster as dg

from assets.stage_asset import describe_outcome, stage_asset
from pipeline.recipe import Recipe
from resources.launcher import Launcher


def build(recipe: Recipe) -> dg.AssetsDefinition:
    """Return the asset for one recipe."""

    @stage_asset("refined_solution", recipe=recipe, kinds={"torch", "pulp"})
    def refined_solution(
        context: dg.AssetExecutionContext, launcher: dg.ResourceParam[Launcher]
    ) -> dg.MaterializeResult:
        return describe_outcome(launcher.materialize(context, "refined_solution"), recipe=recipe)

    return refined_solution
