"""Where the kernel is not Linux's: limits that it refuses, and orphans that it does not end."""

import io
import logging
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import StageError
from pipeline.processes import LineServer
from pipeline.reasoning import grader
from resources.run_hygiene import process_identity
from tests.dagster.commands import REPOSITORY

# A run whose stage calls end_with_parent as stages do, both as on macOS.
STAGE = """
import os, sys, time
from pipeline.processes import end_with_parent
sys.platform = "darwin"
end_with_parent()
with open(sys.argv[1] + ".part", "w") as file:
    file.write(str(os.getpid()))
os.rename(sys.argv[1] + ".part", sys.argv[1])
time.sleep(120)
"""
RUN = f"""
import sys
from pathlib import Path
from pipeline.processes import run_group
sys.platform = "darwin"
run_group([sys.executable, "-c", {STAGE!r}, sys.argv[1]], env={{}}, log_path=Path(sys.argv[1] + ".log"), grace_s=1,
          poll=lambda: None)
"""


def test_grader_gets_ready_where_memory_cannot_be_limited(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def refuse(*_: object) -> None:
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(resource, "setrlimit", refuse)
    monkeypatch.setattr(logging, "disable", lambda: None)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))

    grader.main()

    assert capsys.readouterr().out == f"{grader.READY}\n"


def test_server_that_dies_at_once_is_not_said_to_be_slow():
    with (
        LineServer([sys.executable, "-c", "raise SystemExit(1)"], start_timeout_s=60) as server,
        pytest.raises(StageError, match=r"ended before it was ready: run it by hand"),
    ):
        server.ask("1 + 1", timeout_s=60)


def test_run_killed_outright_takes_its_stage_along_without_the_kernel(tmp_path: Path):
    pid_path = tmp_path / "pid"
    run = subprocess.Popen([sys.executable, "-c", RUN, str(pid_path)], cwd=REPOSITORY)
    deadline = time.monotonic() + 60
    while not pid_path.exists():
        assert time.monotonic() < deadline, "the stage never started"
        time.sleep(0.05)
    pid = int(pid_path.read_text())
    time.sleep(1.5)  # longer than it takes to look
    assert process_identity(pid) is not None, "the stage ended while its run went on"

    run.kill()
    run.wait()

    deadline = time.monotonic() + 20
    while process_identity(pid) is not None:
        assert time.monotonic() < deadline, f"process {pid} outlived its run"
        time.sleep(0.05)
