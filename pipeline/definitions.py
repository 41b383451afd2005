"""The Dagster graph of one recipe: the one module of this package that knows Dagster. Loading it imports no torch.

RECIPE (a name or a path, default `smol`) selects the recipe, REFIT_HOME moves all state, REFIT_EXECUTION names a YAML
file of execution settings. A test or a tool builds its own with `build_defs`.
"""

import importlib

import dagster as dg

from assets.bld_block import SPEC as BLD_BLOCK_SPEC
from assets.jobs import ALL_STAGES, build_schedule
from pipeline.execution import Workspace, open_workspace
from pipeline.recipe import Recipe
from pipeline.stages.registry import STAGES
from resources.launcher import Launcher


def build_defs(
    *,
    workspace: Workspace | None = None,
    launcher: Launcher | None = None,
    executor: dg.ExecutorDefinition = dg.in_process_executor,
) -> dg.Definitions:
    """Return the definitions of one recipe.

    Raises:
        RecipeError: when RECIPE names no recipe, or one that is not valid.
    """
    workspace = workspace or open_workspace()
    return dg.Definitions(
        assets=[*load_assets(workspace.recipe), BLD_BLOCK_SPEC],
        jobs=[ALL_STAGES],
        schedules=[build_schedule(workspace)],
        resources={"launcher": launcher or Launcher(workspace=workspace)},
        executor=executor,
    )


def load_assets(recipe: Recipe) -> list[dg.AssetsDefinition]:
    """Return the asset of every stage of the registry, each built by the module of its name in `assets`."""
    return [importlib.import_module(f"assets.{stage.name}").build(recipe) for stage in STAGES]


defs = build_defs()
