"""Child processes: the one module that starts them. A child has its own process group and dies with its parent."""

import contextlib
import ctypes
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from pipeline.errors import StageError

_PR_SET_PDEATHSIG = 1


def run_checked(command: Sequence[str], *, what: str, timeout_s: float) -> str:
    """Run a short command and return its standard output.

    Raises:
        StageError: with the end of its output when it fails or runs past `timeout_s`.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as err:
        raise StageError(f"{what} did not end within {timeout_s:.0f} s: {' '.join(command)}") from err
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
        raise StageError(f"{what} failed with exit code {done.returncode}:\n{tail}")
    return done.stdout


def become(command: Sequence[str], *, env: Mapping[str, str]) -> NoReturn:
    """Replace this process by a command that runs until someone ends it: signals and the terminal are its own."""
    sys.stdout.flush()
    os.execvpe(command[0], list(command), {**os.environ, **env})


def run_group(
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    log_path: Path,
    grace_s: float,
    poll: Callable[[], None],
    poll_interval_s: float = 1.0,
) -> int:
    """Run a command in a process group of its own, calling `poll` while it runs, and return its exit code.

    However this function is left (the command ends, `poll` raises, the run is cancelled), the whole group is ended:
    SIGTERM, `grace_s` seconds, SIGKILL. Standard output and error go to `log_path`.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("ab") as log:
        child = subprocess.Popen(
            command,
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=functools.partial(end_with_parent, parent_pid=os.getpid()),
        )
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=poll_interval_s)
                poll()
                if child.returncode is not None:
                    return child.returncode
        finally:
            _end_group(child, grace_s=grace_s)


def end_with_parent(*, parent_pid: int | None = None) -> None:
    """Ask the kernel to end this process when its parent dies; does nothing where the kernel cannot (not Linux).

    With `parent_pid`, a parent that died before the request was made is noticed too.

    A rank whose launcher is killed outright would otherwise train on, holding its memory and its device.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if parent_pid is not None and os.getppid() != parent_pid:
        os._exit(1)


def _end_group(child: "subprocess.Popen[bytes]", *, grace_s: float) -> None:
    for sent, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 5.0)):
        deadline = time.monotonic() + wait_s
        try:
            os.killpg(child.pid, sent)
            while time.monotonic() < deadline:
                child.poll()
                os.killpg(child.pid, 0)
                time.sleep(0.05)
        except ProcessLookupError:
            break
    child.wait()
