"""Prepares the Dagster home of a recipe and ends the runs whose process is gone: `python -m resources.home`.

Every recipe has a home and a code-location name of its own; the artifact store beside them is shared. Every `make`
target that starts Dagster runs this first, so that a mistake in what was asked for is one line and not Dagster's.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import dagster as dg

from pipeline.artifacts import write_atomically
from pipeline.errors import RefitError, UserError
from pipeline.execution import open_workspace
from pipeline.stages.launch import REPOSITORY
from resources.run_hygiene import end_dead_runs
from resources.selection import settle_target

# No run limit: a killed run would hold its place and queue every later one. Resuming is the artifacts' business, and
# with max_resume_run_attempts above 0 Dagster does not forward a cancel to the steps.
DAGSTER_YAML = """\
telemetry: {enabled: false}
nux: {enabled: false}
run_monitoring: {enabled: true, max_resume_run_attempts: 0, free_slots_after_run_end_seconds: 60}
run_retries: {enabled: true, max_retries: 0}
"""


def prepare_home(home: Path, *, recipe_name: str) -> None:
    """Write the instance settings, unless the user has changed them, and the workspace file of the recipe."""
    home.mkdir(parents=True, exist_ok=True)
    settings = home / "dagster.yaml"
    if not settings.exists():
        write_atomically(settings, DAGSTER_YAML.encode())
    location = {
        "module_name": "pipeline.definitions",
        "working_directory": str(REPOSITORY),
        "location_name": f"refit-{recipe_name}",
    }
    # JSON is YAML: a path with odd characters needs no quoting rules of its own.
    workspace = json.dumps({"load_from": [{"python_module": location}]}, indent=1)
    write_atomically(home / "workspace.yaml", f"{workspace}\n".encode())


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare the home that DAGSTER_HOME names and, for a selection, print the target to materialize it for."""
    parser = argparse.ArgumentParser(prog="python -m resources.home", description="Prepare a recipe's Dagster home.")
    parser.add_argument("--select", help="what is going to be materialized; its target is printed")
    parser.add_argument("--target", default="", help="the target that was asked for, if any")
    given = parser.parse_args(arguments)
    try:
        target = _prepare(select=given.select, target=given.target)
    except RefitError as err:
        sys.exit(f"error: {err}")
    if target:
        sys.stdout.write(f"{target}\n")


def _prepare(*, select: str | None, target: str) -> str:
    given = os.environ.get("DAGSTER_HOME")
    if not given or not Path(given).is_absolute():
        raise UserError(f"DAGSTER_HOME is {given!r}; it must be an absolute path (the Makefile sets it)")
    recipe = open_workspace().recipe
    settled = "" if select is None else settle_target(recipe, select=select, target=target)
    prepare_home(Path(given), recipe_name=recipe.name)
    with dg.DagsterInstance.get() as instance:
        ended = end_dead_runs(instance)
    for run_id in ended:
        sys.stderr.write(f"Run {run_id} had no process any more and was marked as ended.\n")
    return settled


if __name__ == "__main__":
    main()
