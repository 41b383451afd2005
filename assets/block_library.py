"""block_library: alternative subblocks of every layer, each trained to imitate the parent's.

One run trains all missing blocks; each block also shows as a partition of `bld_block`, with its losses.
"""

import dagster as dg

from assets.stage_asset import describe_outcome, stage_asset
from pipeline.recipe import Recipe
from resources.block_partitions import report_blocks
from resources.launcher import Launcher


def build(recipe: Recipe) -> dg.AssetsDefinition:
    """Return the asset for one recipe."""

    @stage_asset("block_library", recipe=recipe, kinds={"torch", "safetensors"})
    def block_library(context: dg.AssetExecutionContext, launcher: dg.ResourceParam[Launcher]) -> dg.MaterializeResult:
        outcome = launcher.materialize(context, "block_library")
        num_new = report_blocks(context, outcome.artifact)
        context.log.info(f"{num_new} blocks are new to bld_block")
        return describe_outcome(outcome, recipe=recipe)

    return block_library
