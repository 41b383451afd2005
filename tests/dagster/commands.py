"""The project's commands as a user runs them: real processes, with all state below a directory of the test."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def environment(home: Path, *, recipe: str = "tiny") -> dict[str, str]:
    """Return the environment that the Makefile gives its commands, and make the Dagster home."""
    dagster_home = home / "dagster" / "tiny"
    dagster_home.mkdir(parents=True, exist_ok=True)
    return {
        **os.environ,
        "RECIPE": recipe,
        "REFIT_HOME": str(home),
        "DAGSTER_HOME": str(dagster_home),
        "DAGSTER_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
    }


def run_module(
    *arguments: str, home: Path, recipe: str = "tiny", timeout_s: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run `python -m <arguments>` to its end."""
    return run_python("-m", *arguments, home=home, recipe=recipe, timeout_s=timeout_s)


def run_python(
    *arguments: str, home: Path, recipe: str = "tiny", timeout_s: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run the interpreter to its end."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env=environment(home, recipe=recipe),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def materialize_command(*, select: str, target: str) -> list[str]:
    """Return the arguments of `python -m` that materialize a selection for a target."""
    return ["dagster", "asset", "materialize", "-m", "pipeline.definitions", "--select", select, "--partition", target]
