"""block_scores: replace-1-block KL and LM loss of every composed block on held-out tokens.

One number per layer and block: what the model loses when that block alone replaces the parent's. And the order in which
whole layers cost least to leave out.
"""

import dagster as dg

from assets.stage_asset import describe_outcome, stage_asset
from pipeline.recipe import Recipe
from resources.launcher import Launcher


def build(recipe: Recipe) -> dg.AssetsDefinition:
    """Return the asset for one recipe."""

    @stage_asset("block_scores", recipe=recipe, kinds={"torch", "parquet"})
    def block_scores(context: dg.AssetExecutionContext, launcher: dg.ResourceParam[Launcher]) -> dg.MaterializeResult:
        return describe_outcome(launcher.materialize(context, "block_scores"), recipe=recipe)

    return block_scores
