"""reasoning_traces: rows of reasoning and chat before any filter, from solvers, the parent, endpoints, imported sets.

What costs requests and sampling, kept apart from what is made of it.
"""

import dagster as dg

from assets.stage_asset import describe_outcome, stage_asset
from pipeline.recipe import Recipe
from resources.launcher import Launcher


def build(recipe: Recipe) -> dg.AssetsDefinition:
    """Return the asset for one recipe."""

    @stage_asset("reasoning_traces", recipe=recipe, kinds={"parquet"})
    def reasoning_traces(
        context: dg.AssetExecutionContext, launcher: dg.ResourceParam[Launcher]
    ) -> dg.MaterializeResult:
        return describe_outcome(launcher.materialize(context, "reasoning_traces"), recipe=recipe)

    return reasoning_traces
