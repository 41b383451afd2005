"""rl_prompts: verifiable questions and instructions that neither supervised fine-tuning nor evaluation uses.

Kept apart from the fine-tuning set, so that a reward is never for something memorised.
"""

import dagster as dg

from assets.stage_asset import describe_outcome, stage_asset
from pipeline.recipe import Recipe
from resources.launcher import Launcher


def build(recipe: Recipe) -> dg.AssetsDefinition:
    """Return the asset for one recipe."""

    @stage_asset("rl_prompts", recipe=recipe, kinds={"parquet"})
    def rl_prompts(context: dg.AssetExecutionContext, launcher: dg.ResourceParam[Launcher]) -> dg.MaterializeResult:
        return describe_outcome(launcher.materialize(context, "rl_prompts"), recipe=recipe)

    return rl_prompts
