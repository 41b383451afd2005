"""Which stages a recipe asks to run again: those whose current fingerprint has no artifact, and all that follow."""

from pipeline.execution import Workspace, find_artifact
from pipeline.stages.registry import STAGES, Stage


def find_stale_stages(workspace: Workspace, target: str) -> list[str]:
    """Return, inputs first, every stage of a target that is missing or follows a missing one.

    Dagster's own staleness looks one level up: after an edit it would take one run per stage to walk down the graph.
    """
    stale: list[str] = []
    for stage in STAGES:
        follows = not set(stage.upstream).isdisjoint(stale)
        if follows or (find_artifact(workspace, stage.name, target) is None and not _waits(workspace, stage)):
            stale.append(stage.name)
    return stale


def _waits(workspace: Workspace, stage: Stage) -> bool:
    """Return whether a stage that reads every target will be made with a target that has still to be made itself."""
    return any(
        find_artifact(workspace, name, target) is None
        for name in stage.over_targets
        for target in workspace.recipe.targets
    )
