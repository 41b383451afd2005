"""Ending a run while a stage works in its own process: by signal, outright, and from the UI. Nobody is left behind."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from pipeline.execution import materialize
from resources.run_hygiene import process_identity
from tests.dagster.commands import REPOSITORY, environment, run_module
from tests.dagster.stores import open_tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc"),
]

STAGE = "block_profile"  # needs the parent alone, and works for seconds in a process of its own

# A run whose stage does not heed SIGTERM, with more patience than the test has; as Dagster does, it raises when told.
STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
with open(sys.argv[1] + ".part", "w") as file:
    file.write(str(os.getpid()))
os.rename(sys.argv[1] + ".part", sys.argv[1])
time.sleep(120)
"""
PATIENT = f"""
import signal, sys
from pathlib import Path
from pipeline.processes import run_group
signal.signal(signal.SIGTERM, signal.default_int_handler)
run_group([sys.executable, "-c", {STUBBORN!r}, sys.argv[1]], env={{}}, log_path=Path(sys.argv[1] + ".log"),
          grace_s=100, poll=lambda: None)
"""

LAUNCH = """
mutation($params: ExecutionParams!) {
  launchPipelineExecution(executionParams: $params) {
    __typename
    ... on LaunchRunSuccess { run { runId } }
    ... on PythonError { message }
    ... on RunConfigValidationInvalid { errors { message } }
  }
}
"""
TERMINATE = "mutation($id: String!) { terminateRun(runId: $id) { __typename } }"
STATUS = "query($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }"
LOCATION = """
query { workspaceOrError { ... on Workspace { locationEntries { name locationOrLoadError { __typename } } } } }
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home that holds the tiny parent, which is all that the stage reads."""
    materialize(open_tiny(tmp_path), "parent_checkpoint", "fused")
    return tmp_path


def stage_processes(home: Path) -> list[int]:
    """Return the stage processes that work below a home."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it ended while being looked at
            continue
        if str(home) in command and "pipeline.stages" in command:
            found.append(int(directory.name))
    return found


def wait_for(what: Callable[[], object], *, within_s: float, message: str) -> None:
    """Return once it is true, or fail."""
    deadline = time.monotonic() + within_s
    while not what():
        assert time.monotonic() < deadline, message
        time.sleep(0.1)


def start_run(home: Path) -> "subprocess.Popen[bytes]":
    """Start a run of the stage and return once its own process works."""
    log = (home / "run.log").open("wb")
    with log:
        process = subprocess.Popen(
            [sys.executable, "-m", "dagster", "asset", "materialize", "-m", "pipeline.definitions", "--select", STAGE],
            cwd=REPOSITORY,
            env=environment(home),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    wait_for(
        lambda: stage_processes(home) or process.poll() is not None, within_s=60, message="the stage never started"
    )
    assert process.poll() is None, (home / "run.log").read_text()
    return process


def run_statuses(home: Path) -> list[dg.DagsterRunStatus]:
    with dg.DagsterInstance.from_config(environment(home)["DAGSTER_HOME"]) as instance:
        return [run.status for run in instance.get_runs()]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["ctrl_c", "sigterm"])
def test_run_that_is_told_to_stop_ends_its_stage(home: Path, sent: signal.Signals):
    process = start_run(home)

    process.send_signal(sent)
    process.wait(timeout=60)

    assert stage_processes(home) == []
    assert dg.DagsterRunStatus.STARTED not in run_statuses(home)


def test_run_killed_outright_takes_its_stage_along_and_is_ended_at_the_next_start(home: Path):
    process = start_run(home)

    process.kill()
    process.wait()

    wait_for(lambda: not stage_processes(home), within_s=20, message=f"left running: {stage_processes(home)}")
    assert run_statuses(home) == [dg.DagsterRunStatus.STARTED]
    done = run_module("resources.home", home=home)
    assert done.returncode == 0, done.stderr
    assert "had no process any more" in done.stderr
    assert run_statuses(home) == [dg.DagsterRunStatus.FAILURE]
    again = run_module(
        "dagster", "asset", "materialize", "-m", "pipeline.definitions", "--select", STAGE, home=home, timeout_s=240
    )
    assert again.returncode == 0, again.stderr[-3000:]


def test_run_told_twice_to_stop_kills_a_stage_that_does_not_heed(tmp_path: Path):
    pid_path = tmp_path / "pid"
    run = subprocess.Popen([sys.executable, "-c", PATIENT, str(pid_path)], cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    wait_for(pid_path.exists, within_s=60, message="the stage never started")
    stage = int(pid_path.read_text())

    run.terminate()
    time.sleep(2.0)
    assert process_identity(stage) is not None, "the stage had no grace"
    run.terminate()

    run.wait(timeout=30)
    assert process_identity(stage) is None, f"process {stage} outlived its run"


@pytest.fixture
def served(home: Path) -> Iterator[Callable[..., dict[str, Any]]]:
    """The UI over the home, as `make ui` starts it, and a function that asks its GraphQL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert run_module("resources.home", home=home).returncode == 0
    workspace = Path(environment(home)["DAGSTER_HOME"]) / "workspace.yaml"
    with (home / "ui.log").open("wb") as log:
        ui = subprocess.Popen(
            [sys.executable, "-m", "dagster", "dev", "-w", str(workspace), "-h", "127.0.0.1", "-p", str(port)],
            cwd=REPOSITORY,
            env=environment(home),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def ask(query: str, **variables: object) -> dict[str, Any]:
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/graphql", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as response:
            answer = json.load(response)
        assert "errors" not in answer, answer
        return answer["data"]

    def is_loaded() -> bool:
        try:
            entries = ask(LOCATION)["workspaceOrError"]["locationEntries"]
        except (urllib.error.URLError, ConnectionError):
            return False
        return bool(entries) and (entries[0]["locationOrLoadError"] or {}).get("__typename") == "RepositoryLocation"

    try:
        wait_for(is_loaded, within_s=120, message="the UI did not load the graph")
        yield ask
    finally:
        ui.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            ui.wait(timeout=30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(ui.pid, signal.SIGKILL)
        ui.wait()


def test_run_terminated_through_graphql_leaves_no_process(home: Path, served: Callable[..., dict[str, Any]]):
    launched = served(
        LAUNCH,
        params={
            "selector": {
                "repositoryLocationName": "refit-tiny",
                "repositoryName": "__repository__",
                "pipelineName": "__ASSET_JOB",
                "assetSelection": [{"path": [STAGE]}],
            },
            "mode": "default",
            "runConfigData": {},
        },
    )["launchPipelineExecution"]
    assert launched["__typename"] == "LaunchRunSuccess", launched
    run_id = launched["run"]["runId"]
    wait_for(lambda: stage_processes(home), within_s=60, message="the stage never started")

    terminated = served(TERMINATE, id=run_id)["terminateRun"]

    assert terminated["__typename"] == "TerminateRunSuccess"
    wait_for(lambda: not stage_processes(home), within_s=30, message="the stage's process is still there")
    wait_for(
        lambda: served(STATUS, id=run_id)["runOrError"]["status"] == "CANCELED",
        within_s=60,
        message="the run is not marked as canceled",
    )
