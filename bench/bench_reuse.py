"""How much faster the tiny recipe is when every artifact is already there: python bench/bench_reuse.py."""

import tempfile
import time
from pathlib import Path

from pipeline.artifacts import ArtifactStore
from pipeline.execution import Workspace, materialize
from pipeline.recipe_file import load_recipe
from pipeline.stage import ExecutionSettings
from pipeline.stages.registry import STAGES


def materialize_all(workspace: Workspace) -> float:
    """Return the seconds that every stage of the default target took together."""
    began = time.perf_counter()
    for stage in STAGES:
        materialize(workspace, stage.name, workspace.recipe.default_target)
    return time.perf_counter() - began


def main() -> None:
    """Materialize twice and compare."""
    with tempfile.TemporaryDirectory(prefix="refit-bench-") as directory:
        workspace = Workspace(
            recipe=load_recipe("tiny"),
            recipe_given="tiny",
            store=ArtifactStore(Path(directory) / "store"),
            downloads=Path(directory) / "downloads",
            execution=ExecutionSettings(),
        )
        first_s = materialize_all(workspace)
        again_s = materialize_all(workspace)
    print(f"{len(STAGES)} stages made in {first_s:.1f} s, found again in {again_s:.2f} s")
    print(f"reuse: {first_s / again_s:.0f} times as fast as running")


if __name__ == "__main__":
    main()
