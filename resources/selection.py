"""What a run is asked for, held against the recipe before Dagster is started.

Dagster's own command answers a slip of the pen, or a target too many, with a traceback.
"""

import re
import warnings

import dagster as dg

from pipeline.errors import RecipeError
from pipeline.recipe import Recipe
from pipeline.recipe_file import require_target
from pipeline.stages.registry import BY_NAME, STAGES, get_stage

EVERYTHING = "*"
_NAME_AND_NEIGHBOURS = re.compile(r"[*+]*(\w+)[*+]*")


def settle_target(recipe: Recipe, *, select: str, target: str) -> str:
    """Return the target that a selection is materialized for, or "" when all targets share what it selects.

    Without a target, everything is made for the recipe's default one.

    Raises:
        RecipeError: when the recipe has no such target, there is no such asset, or one is given without the other.
    """
    if target:
        require_target(recipe, target)
    if select == EVERYTHING:
        return target or recipe.default_target
    if ":" in select:  # an expression over groups or kinds: only the graph itself knows what has them
        return target
    of_a_target = [name for name in _selected(select) if BY_NAME[name].per_target]
    if of_a_target and not target:
        raise RecipeError(
            f"SELECT={select!r} selects {of_a_target[0]}, of which every target has its own: add TARGET= and one of "
            f"{', '.join(sorted(recipe.targets))}"
        )
    if target and not of_a_target:
        raise RecipeError(
            f"SELECT={select!r} selects only what all targets share, so TARGET={target!r} has nothing to choose: leave "
            "it out"
        )
    return target


def _selected(select: str) -> list[str]:
    """Return the stages that a selection names, as Dagster reads it."""
    parts = select.split(",")
    for part in parts:
        if named := _NAME_AND_NEIGHBOURS.fullmatch(part.strip()):
            get_stage(named[1])
    graph = [dg.asset(name=stage.name, deps=list(stage.upstream))(_nothing) for stage in STAGES]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "*" among the parts is in beta
            keys = dg.AssetSelection.from_coercible(parts).resolve(graph)
    except dg.DagsterError as err:
        raise RecipeError(
            f"SELECT={select!r} is no selection of assets ({str(err).splitlines()[0]}): give names with commas "
            "between; '*name' is one with everything that it needs, 'name*' with everything that reads it"
        ) from err
    chosen = {key.to_user_string() for key in keys}
    return [stage.name for stage in STAGES if stage.name in chosen]


def _nothing() -> None: ...
