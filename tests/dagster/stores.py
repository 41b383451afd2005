"""Stores for tests of the shell: the tiny recipe's artifacts, published with contents that pass every check."""

import json
from pathlib import Path

from pipeline.artifacts import Artifact, ArtifactStore
from pipeline.execution import Workspace, stage_fingerprint
from pipeline.recipe import Recipe
from pipeline.recipe_file import load_recipe
from pipeline.stage import ExecutionSettings, StageResult
from pipeline.stages.registry import STAGES, Stage

TRAINED = {"kind": "trained", "fingerprint": "f1", "content_hash": "a1", "initial_loss": 0.5, "final_loss": 0.25}
WITHOUT_WEIGHTS = {"fingerprint": None, "content_hash": None, "initial_loss": None, "final_loss": None}
BLOCK_INDEX = {
    "0": {"attention": {"parent": {"kind": "parent", **WITHOUT_WEIGHTS}}, "ffn": {"width-96": TRAINED}},
    "2": {"attention": {"linear": TRAINED}, "ffn": {"no_op": {"kind": "no_op", **WITHOUT_WEIGHTS}}},
}


def open_tiny(home: Path, *, recipe: Recipe | None = None) -> Workspace:
    """Return the tiny recipe's workspace below `home`, as REFIT_HOME=home would."""
    return Workspace(
        recipe=recipe or load_recipe("tiny"),
        recipe_given=recipe.name if recipe else "tiny",
        store=ArtifactStore(home / "store"),
        downloads=home / "downloads",
        execution=ExecutionSettings(),
    )


def publish_all(workspace: Workspace, *, target: str) -> dict[str, Artifact]:
    """Publish an artifact for every stage of a target and return them by name."""
    return {stage.name: publish(workspace, stage, target=target) for stage in STAGES}


def publish(workspace: Workspace, stage: Stage, *, target: str, **metrics: float) -> Artifact:
    """Publish one artifact whose metrics stand exactly at the bounds of its checks, or as given."""
    key = stage_fingerprint(workspace, stage, target)
    if found := workspace.store.find(stage.name, key):
        return found
    directory = workspace.store.directory(stage.name, key)
    directory.mkdir(parents=True)
    name, content = ("index.json", BLOCK_INDEX) if stage.name == "block_library" else ("made.json", {"by": key})
    (directory / name).write_text(json.dumps(content), encoding="utf-8")
    at_bounds = {check.metric: check.bound_for(workspace.recipe) for check in stage.checks}
    result = StageResult(metrics={**at_bounds, **metrics}, facts={"made_by": "a test"})
    return workspace.store.publish(stage.name, key, result=result, wall_s=1.5, provenance={})
