"""rl_checkpoint: the child after group-relative policy optimisation on verifiable rewards.

The last training; its checkpoint is what is evaluated, exported and reported.
"""

import dagster as dg

from assets.stage_asset import describe_outcome, stage_asset
from pipeline.recipe import Recipe
from resources.launcher import Launcher


def build(recipe: Recipe) -> dg.AssetsDefinition:
    """Return the asset for one recipe."""

    @stage_asset("rl_checkpoint", recipe=recipe, kinds={"torch", "deepspeed"})
    def rl_checkpoint(context: dg.AssetExecutionContext, launcher: dg.ResourceParam[Launcher]) -> dg.MaterializeResult:
        return describe_outcome(launcher.materialize(context, "rl_checkpoint"), recipe=recipe)

    return rl_checkpoint
