"""Child processes: their output, their end, and that however a run is left, nobody is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import StageError
from pipeline.processes import run_checked, run_group

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")

REPOSITORY = Path(__file__).parents[2]

# Writes its own process id and that of a grandchild to the file it is given, then waits; `stubborn` ignores SIGTERM.
FAMILY = """
import os, signal, subprocess, sys, time
stubborn = sys.argv[2] == "stubborn"
if stubborn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
ignoring = "signal.signal(signal.SIGTERM, signal.SIG_IGN); " if stubborn else ""
sleeper = f"import signal, time; {ignoring}time.sleep(120)"
child = subprocess.Popen([sys.executable, "-c", sleeper])
time.sleep(0.3)
with open(sys.argv[1] + ".part", "w") as file:
    file.write(f"{os.getpid()} {child.pid}")
os.rename(sys.argv[1] + ".part", sys.argv[1])
if sys.argv[2] == "leaves":
    sys.exit(3)
time.sleep(120)
"""


class CancelledError(Exception):
    """Stands for whatever ends a run from outside."""


def is_running(pid: int) -> bool:
    """Return whether a process exists and is not merely waiting to be collected."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in ("Z", "X")


def wait_until_gone(pids: list[int], *, within_s: float) -> list[int]:
    deadline = time.monotonic() + within_s
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [pid for pid in pids if is_running(pid)]


def read_pids(path: Path) -> list[int]:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, "the family never started"
        time.sleep(0.05)
    return [int(pid) for pid in path.read_text().split()]


def run_family(tmp_path: Path, how: str, *, cancel: bool, grace_s: float) -> int:
    pids_path = tmp_path / "pids"

    def poll() -> None:
        if cancel and pids_path.exists():
            raise CancelledError

    return run_group(
        [sys.executable, "-c", FAMILY, str(pids_path), how],
        env={"MARK": "set"},
        log_path=tmp_path / "log",
        grace_s=grace_s,
        poll=poll,
        poll_interval_s=0.05,
    )


def test_run_group_returns_exit_code_and_keeps_output(tmp_path: Path):
    code = "import os, sys; print('out', os.environ['MARK']); print('err', file=sys.stderr); sys.exit(7)"

    exit_code = run_group(
        [sys.executable, "-c", code],
        env={"MARK": "set"},
        log_path=tmp_path / "sub" / "log",
        grace_s=1,
        poll=lambda: None,
        poll_interval_s=0.05,
    )

    assert exit_code == 7
    assert sorted((tmp_path / "sub" / "log").read_text().splitlines()) == ["err", "out set"]


def test_run_group_polls_after_the_end_too(tmp_path: Path):
    calls: list[bool] = []
    flag = tmp_path / "flag"

    run_group(
        [sys.executable, "-c", "import pathlib, sys; pathlib.Path(sys.argv[1]).touch()", str(flag)],
        env={},
        log_path=tmp_path / "log",
        grace_s=1,
        poll=lambda: calls.append(flag.exists()),
        poll_interval_s=0.05,
    )

    assert calls[-1]


def test_run_group_cancelled_ends_child_and_grandchild(tmp_path: Path):
    with pytest.raises(CancelledError):
        run_family(tmp_path, "obedient", cancel=True, grace_s=10)

    assert wait_until_gone(read_pids(tmp_path / "pids"), within_s=2) == []


def test_run_group_cancelled_kills_a_family_that_ignores_sigterm(tmp_path: Path):
    began = time.monotonic()

    with pytest.raises(CancelledError):
        run_family(tmp_path, "stubborn", cancel=True, grace_s=0.5)

    assert wait_until_gone(read_pids(tmp_path / "pids"), within_s=2) == []
    assert time.monotonic() - began < 20


def test_run_group_child_that_leaves_a_grandchild_has_it_ended(tmp_path: Path):
    assert run_family(tmp_path, "leaves", cancel=False, grace_s=10) == 3

    assert wait_until_gone(read_pids(tmp_path / "pids"), within_s=2) == []


def test_run_group_parent_killed_outright_takes_its_child_along(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from pipeline.processes import run_group\n"
        "run_group([sys.executable, '-c', 'import os, sys, time; open(sys.argv[1], \"w\").write(str(os.getpid())); "
        "time.sleep(120)', sys.argv[1]], env={}, log_path=Path(sys.argv[1] + '.log'), grace_s=1, poll=lambda: None)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "pids")], cwd=REPOSITORY)
    deadline = time.monotonic() + 30
    while not (tmp_path / "pids").exists() or not (tmp_path / "pids").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)

    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()

    assert wait_until_gone(read_pids(tmp_path / "pids"), within_s=5) == []


def test_run_checked_returns_output():
    assert run_checked([sys.executable, "-c", "print('hello')"], what="greeting", timeout_s=30) == "hello\n"


def test_run_checked_failure_shows_what_and_the_end_of_the_output():
    code = "import sys; print('step 1'); print('no such wheel', file=sys.stderr); sys.exit(4)"

    with pytest.raises(StageError, match=r"download failed with exit code 4:\n(.|\n)*no such wheel"):
        run_checked([sys.executable, "-c", code], what="download", timeout_s=30)


def test_run_checked_past_its_time_is_an_error():
    with pytest.raises(StageError, match="did not end within"):
        run_checked([sys.executable, "-c", "import time; time.sleep(60)"], what="download", timeout_s=0.5)
