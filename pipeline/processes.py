"""Child processes: the one module that starts them. A child has its own process group and dies with its parent."""

import contextlib
import ctypes
import functools
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from pipeline.errors import StageError

_PR_SET_PDEATHSIG = 1
# The process that called run_group, for those below it: ranks have torchrun for a parent.
_RUN_PID = "REFIT_RUN_PID"
_WATCH_INTERVAL_S = 1.0


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
    SIGTERM, `grace_s` seconds, SIGKILL; being told to end once more ends the grace. Standard output and error go to
    `log_path`.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("ab") as log:
        child = subprocess.Popen(
            command,
            env={**os.environ, **env, _RUN_PID: str(os.getpid())},
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
            try:
                _end_group(child, grace_s=grace_s)
            except BaseException:
                # Ctrl-C twice, or a SIGTERM to the whole process group, of which make hands on one more.
                _end_group(child, grace_s=0.0)
                raise


class LineServer:
    """A child that answers each line with a line; one that takes too long, or dies, is ended and started anew."""

    def __init__(self, command: Sequence[str], *, start_timeout_s: float) -> None:
        """`command` prints one line when it is ready, which may take `start_timeout_s`."""
        self._command = command
        self._start_timeout_s = start_timeout_s
        self._child: subprocess.Popen[bytes] | None = None
        self._unread = b""

    def __enter__(self) -> "LineServer":
        """Return itself; the child starts with the first question."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the child."""
        self._end()

    def ask(self, line: str, *, timeout_s: float) -> str | None:
        """Return the child's answer without its line break; None when there was none in time or the child died.

        Raises:
            StageError: when the child does not get ready.
        """
        child = self._child or self._start()
        assert child.stdin is not None
        try:
            child.stdin.write(line.encode() + b"\n")
            child.stdin.flush()
            return self._read_line(child, timeout_s=timeout_s)
        except (BrokenPipeError, TimeoutError, EOFError):
            self._end()
            return None

    def _start(self) -> "subprocess.Popen[bytes]":
        self._unread = b""
        self._child = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=functools.partial(end_with_parent, parent_pid=os.getpid()),
        )
        try:
            self._read_line(self._child, timeout_s=self._start_timeout_s)
        except (TimeoutError, EOFError) as err:
            self._end()
            late = f"was not ready in {self._start_timeout_s:.0f} s"
            how = late if isinstance(err, TimeoutError) else "ended before it was ready"
            raise StageError(f"{' '.join(self._command)} {how}: run it by hand") from err
        return self._child

    def _read_line(self, child: "subprocess.Popen[bytes]", *, timeout_s: float) -> str:
        assert child.stdout is not None
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            ready, _, _ = select.select([child.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            read = os.read(child.stdout.fileno(), 2**16)
            if not read:
                raise EOFError
            self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode()

    def _end(self) -> None:
        if self._child is None:
            return
        child, self._child = self._child, None
        _end_group(child, grace_s=0.0)
        for pipe in (child.stdin, child.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def end_with_parent(*, parent_pid: int | None = None) -> None:
    """Have this process end when its parent dies: by the kernel on Linux, elsewhere by looking once a second.

    With `parent_pid`, a parent that died before the request was made is noticed too. Where the kernel cannot, a stage
    process and its ranks look for the run that started them, which takes a thread: nothing is done between fork and
    exec, where `parent_pid` is given.

    A rank whose launcher is killed outright would otherwise train on, holding its memory and its device, and write into
    a directory whose lock died with the launcher.
    """
    if sys.platform != "linux":
        run_pid = os.environ.get(_RUN_PID)
        if parent_pid is None and run_pid is not None:
            threading.Thread(target=_end_with, args=(int(run_pid),), daemon=True).start()
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if parent_pid is not None and os.getppid() != parent_pid:
        os._exit(1)


def _end_with(run_pid: int) -> None:
    while _exists(run_pid):
        time.sleep(_WATCH_INTERVAL_S)
    os.kill(os.getpid(), signal.SIGTERM)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:  # none of that id, or one of somebody else that was given the id since
        return False
    return True


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
