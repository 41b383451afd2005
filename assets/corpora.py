"""corpora: documents of every named source, with licence and counts per domain.

Its tables list licence, documents and tokens of every source; whatever is trained on later comes from here.
"""

import dagster as dg

from assets.stage_asset import describe_outcome, stage_asset
from pipeline.recipe import Recipe
from resources.launcher import Launcher


def build(recipe: Recipe) -> dg.AssetsDefinition:
    """Return the asset for one recipe."""

    @stage_asset("corpora", recipe=recipe, kinds={"parquet"})
    def corpora(context: dg.AssetExecutionContext, launcher: dg.ResourceParam[Launcher]) -> dg.MaterializeResult:
        return describe_outcome(launcher.materialize(context, "corpora"), recipe=recipe)

    return corpora
