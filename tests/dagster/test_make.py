"""The Makefile's own part, with stand-ins for Python and Dagster: what it starts, and that it leaves nobody behind."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from resources.run_hygiene import process_identity
from tests.dagster.commands import REPOSITORY

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="runs make")

# Writes down what it is asked, an argument to each |, and answers as Python would.
PYTHON = """#!/bin/sh
printf '%s|' python "$@" >> "$LOG"; echo >> "$LOG"
case "$*" in
  *resources.home*--select*) echo fused;;
  *evaluation.lm_eval*) [ "$RECIPE" != smol-full ] || exit 3;;
esac
"""
REAL_PYTHON = f"""#!/bin/sh
exec '{sys.executable}' "$@"
"""
DAGSTER = """#!/bin/sh
printf '%s|' dagster "$@" >> "$LOG"; echo >> "$LOG"
"""
BUSY_DAGSTER = """#!/bin/sh
echo $$ > "$LOG.part" && mv "$LOG.part" "$LOG.pid"
exec sleep 120
"""


def stand_in(tmp_path: Path, *, python: str = PYTHON, dagster: str = DAGSTER) -> Path:
    """Return an environment that the Makefile takes for installed and whose programs are these scripts."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    for name, script in (("python", python), ("dagster", dagster)):
        (venv / "bin" / name).write_text(script)
        (venv / "bin" / name).chmod(0o755)
    (venv / ".refit-installed").touch()
    return venv


def start_make(*arguments: str, venv: Path) -> "subprocess.Popen[str]":
    """Start make with its state in a folder with a space in its name, and without what a `make test` above it set."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RECIPE", "TARGET", "SELECT", "PORT", "MFLAGS") and not name.startswith("MAKE")
    }
    return subprocess.Popen(
        ["make", *arguments, f"VENV={venv}", f"REFIT_HOME={venv.parent / 'a home'}"],
        cwd=REPOSITORY,
        env={**inherited, "LOG": str(venv.parent / "log")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def asked_of(program: str, *arguments: str, venv: Path) -> list[list[str]]:
    """Run make to its end and return every command line that it gave a program, without the program."""
    process = start_make(*arguments, venv=venv)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    lines = [line.split("|")[:-1] for line in (venv.parent / "log").read_text().splitlines()]
    return [line[1:] for line in lines if line[0] == program]


def after(option: str, arguments: list[str]) -> str | None:
    return arguments[arguments.index(option) + 1] if option in arguments else None


@pytest.mark.parametrize("goal", ["demo", "materialize", "ui"])
def test_make_told_to_end_takes_dagster_along(goal: str, tmp_path: Path):
    process = start_make(goal, venv=stand_in(tmp_path, dagster=BUSY_DAGSTER))
    pid_path = tmp_path / "log.pid"
    deadline = time.monotonic() + 60
    while not pid_path.exists():
        assert time.monotonic() < deadline, "dagster was never started"
        time.sleep(0.05)
    pid = int(pid_path.read_text())
    try:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)

        assert process_identity(pid) is None, f"process {pid} outlived make"
    finally:
        if process_identity(pid) is not None:
            os.kill(pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "RECIPE=typo"], "error: no recipe 'typo': give a path to a YAML file, or one of "),
        (["ui", "RECIPE=typo"], "error: no recipe 'typo': give a path to a YAML file, or one of "),
        (["demo", "RECIPE=tiny", "TARGET=typo"], "error: recipe tiny has no target 'typo'; it has fused, light"),
        (
            ["materialize", "RECIPE=tiny", "SELECT=kd_checkpoint"],
            "error: SELECT='kd_checkpoint' selects kd_checkpoint, of which every target has its own: add TARGET= ",
        ),
    ],
    ids=["demo_recipe", "ui_recipe", "demo_target", "materialize_without_target"],
)
def test_mistake_is_one_line_before_dagster_starts(arguments: list[str], message: str, tmp_path: Path):
    process = start_make(*arguments, venv=stand_in(tmp_path, python=REAL_PYTHON))
    out, err = process.communicate(timeout=120)

    assert process.returncode != 0
    assert "Traceback" not in out + err
    assert [line for line in err.splitlines() if line.startswith("error: ")] == [
        line for line in err.splitlines() if line.startswith(message)
    ], err
    assert not (tmp_path / "log").exists(), "dagster was started"
    assert not (tmp_path / "a home").exists()


def test_demo_runs_the_graph_then_asks_in_both_modes_and_prints_the_results(tmp_path: Path):
    venv = stand_in(tmp_path)

    (materialize,) = asked_of("dagster", "demo", "TARGET=a target", venv=venv)
    followed = [line[2:] for line in asked_of("python", "demo", "TARGET=a target", venv=venv) if line[1] == "pipeline"]

    assert after("--select", materialize) == "*"
    assert after("--partition", materialize) == "fused"  # what resources.home answered
    assert [(line[0], after("--thinking", line), after("--target", line)) for line in followed[:3]] == [
        ("chat", "on", "a target"),
        ("chat", "off", "a target"),
        ("summary", None, "a target"),
    ]


def test_materialize_hands_on_its_selection_as_it_stands(tmp_path: Path):
    (materialize,) = asked_of("dagster", "materialize", 'SELECT=key:"kd\'s" or *corpora', venv=stand_in(tmp_path))

    assert after("--select", materialize) == 'key:"kd\'s" or *corpora'
    assert after("--partition", materialize) == "fused"


def test_materialize_of_what_all_targets_share_names_no_partition(tmp_path: Path):
    silent = PYTHON.replace("echo fused", ":")

    (materialize,) = asked_of("dagster", "materialize", "SELECT=corpora", venv=stand_in(tmp_path, python=silent))

    assert after("--select", materialize) == "corpora"
    assert "--partition" not in materialize


def test_ui_reads_the_workspace_of_a_home_with_a_space_in_its_name(tmp_path: Path):
    (served,) = asked_of("dagster", "ui", "RECIPE=tiny", venv=stand_in(tmp_path))

    assert after("-w", served) == str(tmp_path / "a home" / "dagster" / "tiny" / "workspace.yaml")
    assert after("-h", served) == "127.0.0.1"


@pytest.mark.parametrize("goal", ["demo", "materialize", "ui"])
@pytest.mark.parametrize(("recipe", "is_wanted"), [("smol-full", True), ("smol", False)])
def test_lm_eval_is_installed_for_a_recipe_that_asks_for_it(goal: str, recipe: str, is_wanted: bool, tmp_path: Path):
    asked = asked_of("python", goal, f"RECIPE={recipe}", venv=stand_in(tmp_path))

    assert (["-m", "pip", "install", "--quiet", "-e", ".[dev,lm-eval]"] in asked) is is_wanted


def test_help_lists_every_goal_in_one_column(tmp_path: Path):
    process = start_make("help", venv=stand_in(tmp_path))
    out, _ = process.communicate(timeout=60)

    described = [line for line in (REPOSITORY / "Makefile").read_text().splitlines() if ": " in line and " ## " in line]
    assert len(out.splitlines()) == len(described)
    assert len({line.index(line[len("  make ") :].split(maxsplit=1)[1]) for line in out.splitlines()}) == 1


def test_workflow_materializes_as_make_does():
    workflow = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "materialize.yml").read_text())
    commands = [step.get("run", "") for step in workflow["jobs"]["materialize"]["steps"]]

    assert "make materialize" in commands
    assert not any("bin/dagster" in command for command in commands)
