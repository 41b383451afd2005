"""After an edit only what reads it runs again: a recipe line, one more width or target; ranks change nothing."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifacts import ArtifactStore
from pipeline.execution import Workspace, materialize
from pipeline.recipe import Recipe
from pipeline.recipe_file import load_recipe, parse_recipe
from pipeline.stage import ExecutionSettings
from pipeline.stages.registry import BY_NAME, STAGES
from tests.end_to_end.conftest import TinyRun

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture
def store(tiny_run: TinyRun, tmp_path: Path) -> ArtifactStore:
    """Return a copy of the finished run's store, without any of Dagster's own state."""
    shutil.copytree(tiny_run.home / "store", tmp_path / "store")
    return ArtifactStore(tmp_path / "store")


def edited(edit: Edit) -> Recipe:
    data = load_recipe("tiny").model_dump(mode="json")
    edit(data)
    return parse_recipe(data, origin="edited tiny")


def workspace(store: ArtifactStore, recipe: Recipe) -> Workspace:
    return Workspace(
        recipe=recipe,
        recipe_given=recipe.name,
        store=store,
        downloads=store.root.parent / "downloads",
        execution=ExecutionSettings(num_threads=1),
    )


def outcomes(store: ArtifactStore, recipe: Recipe, names: list[str], *, target: str = "fused") -> dict[str, str]:
    return {name: materialize(workspace(store, recipe), name, target).how for name in names}


def blocks_of(store: ArtifactStore) -> dict[str, float]:
    """Return every published block and when it was published."""
    return {path.parent.name: path.stat().st_mtime for path in (store.root / "bld_block").glob("*/manifest.json")}


def test_editing_kd_tokens_runs_kd_and_nothing_before_it(store: ArtifactStore):
    def shorten(data: dict[str, Any]) -> None:
        data["kd"]["tokens"] = 4096

    names = [stage.name for stage in STAGES[: [stage.name for stage in STAGES].index("kd_checkpoint") + 1]]
    how = outcomes(store, edited(shorten), names)

    assert how.pop("kd_checkpoint") == "ran"
    assert set(how.values()) == {"reused"}


def test_adding_one_ffn_width_trains_that_width_alone(store: ArtifactStore):
    def widen(data: dict[str, Any]) -> None:
        data["search_space"]["ffn"] = [*data["search_space"]["ffn"], 48]

    before = blocks_of(store)
    how = outcomes(store, edited(widen), ["block_library"])

    after = blocks_of(store)
    assert how == {"block_library": "ran"}
    assert {block: after[block] for block in before} == before
    assert len(after) == len(before) + load_recipe("tiny").parent.num_hidden_layers  # type: ignore[union-attr]


def test_second_target_reuses_everything_above_the_programme(store: ArtifactStore):
    shared = [stage.name for stage in STAGES if not stage.per_target and not stage.over_targets]
    of_target = ["mip_solution", "refined_solution", "child_checkpoint"]
    how = outcomes(store, load_recipe("tiny"), [*shared, *of_target], target="light")

    assert [how.pop(name) for name in of_target] == ["ran"] * 3
    assert set(how.values()) == {"reused"}
    assert all(not BY_NAME[name].per_target for name in how)


def test_block_library_on_two_ranks_equals_that_of_one(store: ArtifactStore):
    one_rank = materialize(workspace(store, load_recipe("tiny")), "block_library", "fused").artifact
    for asset in ("block_library", "bld_block"):
        shutil.rmtree(store.root / asset)
    two_ranks = replace(workspace(store, load_recipe("tiny")), execution=ExecutionSettings(num_ranks=2, num_threads=1))

    again = materialize(two_ranks, "block_library", "fused")

    assert again.how == "ran"
    assert again.artifact.content_hash == one_rank.content_hash
