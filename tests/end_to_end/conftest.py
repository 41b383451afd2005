"""One real run of the tiny recipe through the command line, made once and shared by the tests that read it."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.dagster.commands import materialize_command, run_module


@dataclass(frozen=True, kw_only=True)
class TinyRun:
    """The home of a finished run, and what its command printed."""

    home: Path
    process: "subprocess.CompletedProcess[str]"


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    home = tmp_path_factory.mktemp("tiny-home")
    process = run_module(*materialize_command(select="*", target="fused"), home=home, timeout_s=500)
    assert process.returncode == 0, process.stderr[-5000:]
    return TinyRun(home=home, process=process)
