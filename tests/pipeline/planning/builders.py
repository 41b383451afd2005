"""Recipes as the plan sees them: in a workspace, as a case, with another target."""

from pathlib import Path
from typing import Any

from pipeline.artifacts import ArtifactStore
from pipeline.execution import Workspace
from pipeline.model.architecture_files import parent_architecture
from pipeline.planning.case import Case
from pipeline.planning.sizes import model_sizes
from pipeline.recipe import Limit, Pin, Recipe, Target
from pipeline.stage import ExecutionSettings


def workspace(tmp_path: Path, recipe: Recipe, **execution: Any) -> Workspace:
    return Workspace(
        recipe=recipe,
        recipe_given=recipe.name,
        store=ArtifactStore(tmp_path / "store"),
        downloads=tmp_path / "downloads",
        execution=ExecutionSettings(**execution),
    )


def case(recipe: Recipe, *, target: Target | None = None, **execution: Any) -> Case:
    return Case(
        recipe=recipe,
        sizes=model_sizes(
            recipe, target or recipe.targets[recipe.default_target], parent=parent_architecture(recipe.parent)
        ),
        execution=ExecutionSettings(**execution),
    )


def with_target(recipe: Recipe, *limits: Limit, pins: tuple[Pin, ...] = ()) -> Recipe:
    target = Target(limits=limits, pins=pins, description="made for a test")
    return recipe.model_copy(update={"targets": {"made": target}, "default_target": "made"})
