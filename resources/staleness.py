"""Which stages a recipe asks to run again: those whose current fingerprint has no artifact, and all that follow."""

from pipeline.execution import Workspace, find_artifact
from pipeline.stages.registry import STAGES


def find_stale_stages(workspace: Workspace, target: str) -> list[str]:
    """Return, inputs first, every stage of a target that is missing or follows a missing one.

    Dagster's own staleness looks one level up: after an edit it would take one run per stage to walk down the graph.
    """
    stale: list[str] = []
    for stage in STAGES:
        if not set(stage.inputs).isdisjoint(stale) or find_artifact(workspace, stage.name, target) is None:
            stale.append(stage.name)
    return stale
