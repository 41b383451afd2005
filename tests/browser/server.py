"""Serves the UI of a recipe as `make ui` does, on a free port of the loopback interface with a home of its own."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.dagster.commands import REPOSITORY, environment, run_module

READY_WITHIN_S = 120.0
# Distillation of tiny is over in a second; this many tokens take most of a minute, long enough to be watched.
WATCHED_TOKENS = 491_520


@dataclass(frozen=True, kw_only=True)
class Served:
    """A UI that answers."""

    url: str
    home: Path

    def stage_processes(self) -> list[int]:
        """Return the ids of the stage processes that work below this home, from /proc."""
        found = []
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:  # it ended while being looked at
                continue
            if str(self.home) in command and "pipeline.stages" in command:
                found.append(int(directory.name))
        return found


def write_recipe(home: Path) -> Path:
    """Write the recipe `tiny` as `watched`, with a distillation long enough to be watched, and return where."""
    recipe = yaml.safe_load((REPOSITORY / "pipeline" / "recipes" / "tiny.yaml").read_text(encoding="utf-8"))
    recipe["name"] = "watched"
    for section in ("distillation_mix", "kd"):
        recipe[section]["tokens"] = WATCHED_TOKENS
    path = home / "watched.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


@contextlib.contextmanager
def serve(home: Path) -> Iterator[Served]:
    """Start `dagster dev` for the recipe, wait until it answers, and stop it and all it started at the end."""
    home.mkdir(parents=True, exist_ok=True)
    recipe = str(write_recipe(home))
    prepared = run_module("resources.home", home=home, recipe=recipe)
    assert prepared.returncode == 0, prepared.stderr
    variables = environment(home, recipe=recipe)
    workspace = Path(variables["DAGSTER_HOME"]) / "workspace.yaml"
    port = _free_port()
    with (home / "ui.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "dagster", "dev", "-w", str(workspace), "-h", "127.0.0.1", "-p", str(port)],
            cwd=REPOSITORY,
            env=variables,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    served = Served(url=f"http://127.0.0.1:{port}", home=home)
    try:
        wait_for(lambda: _answers(served.url), within_s=READY_WITHIN_S, what=f"an answer; see {home / 'ui.log'}")
        yield served
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(condition: Callable[[], object], *, within_s: float, what: str) -> None:
    """Return once the condition holds.

    Raises:
        TimeoutError: when it does not within `within_s` seconds.
    """
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {within_s:.0f} s for {what}")
        time.sleep(0.2)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/server_info", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
