"""Kill -9 at work, materialize again: the run continues and its weights are those of an undisturbed run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.artifacts import Manifest
from pipeline.stages.registry import BY_NAME

REPOSITORY = Path(__file__).resolve().parents[2]

MATERIALIZE = """
import sys
from pipeline.execution import materialize, open_workspace
workspace = open_workspace("tiny")
for stage in sys.argv[1].split(","):
    print(stage, materialize(workspace, stage, "fused").how, flush=True)
"""


def stages_up_to(name: str) -> list[str]:
    """Return every stage that `name` depends on and itself, inputs first."""
    found: list[str] = []
    for upstream in BY_NAME[name].inputs:
        found += [stage for stage in stages_up_to(upstream) if stage not in found]
    return [*found, name]


def start(home: Path, stages: list[str]) -> "subprocess.Popen[str]":
    settings = home.parent / "execution.yaml"
    settings.write_text("checkpoint_interval_steps: 2\nnum_threads: 1\n")
    return subprocess.Popen(
        [sys.executable, "-c", MATERIALIZE, ",".join(stages)],
        cwd=REPOSITORY,
        env={**os.environ, "REFIT_HOME": str(home), "REFIT_EXECUTION": str(settings)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def outcomes(process: "subprocess.Popen[str]") -> dict[str, str]:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return dict(line.split() for line in out.splitlines() if len(line.split()) == 2 and line.split()[0] in BY_NAME)


def manifest_of(home: Path, asset: str) -> Manifest:
    (path,) = (home / "store" / asset).glob("*/manifest.json")
    return Manifest.model_validate_json(path.read_bytes())


def last_step(home: Path, asset: str) -> int:
    steps = [0]
    for path in (home / "store" / asset).glob("*/progress.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        steps += [line["step"] for line in lines if "step" in line]
    return max(steps)


def notes_of(home: Path, asset: str) -> list[str]:
    (path,) = (home / "store" / asset).glob("*/progress.jsonl")
    return [line["note"] for line in map(json.loads, path.read_text().splitlines()) if "note" in line]


def checkpoints(home: Path, asset: str) -> int:
    """Return how many files of resumable state the stage has written."""
    return sum(file.is_file() for file in (home / "store" / asset).glob("*/_work/**/*") if file.suffix != ".log")


def wait_for_checkpoint(home: Path, asset: str, process: "subprocess.Popen[str]", *, num_files: int) -> None:
    deadline = time.monotonic() + 200
    while checkpoints(home, asset) < num_files:
        assert process.poll() is None, f"the run ended before {asset} could be killed: {process.communicate()}"
        assert time.monotonic() < deadline, f"{asset} wrote no resumable state"
        time.sleep(0.02)


def processes_using(home: Path) -> list[str]:
    """Return the command lines of processes that mention the home, zombies aside."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # the process ended while it was being looked at
            continue
        if str(home) in command:
            found.append(command)
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(sys.platform != "linux", reason="looks for orphans in /proc")
def test_kill_9_during_block_library_and_kd_resumes_to_identical_weights(tmp_path: Path) -> None:
    stages = stages_up_to("kd_checkpoint")
    calm, disturbed = tmp_path / "calm" / "home", tmp_path / "disturbed" / "home"
    for home in (calm, disturbed):
        home.mkdir(parents=True)
    outcomes(start(calm, stages))

    told: dict[str, str] = {}
    for asset in ("block_library", "kd_checkpoint"):
        process = start(disturbed, stages)
        # spec.json comes first; anything more is state to resume from
        wait_for_checkpoint(disturbed, asset, process, num_files=3)
        os.kill(process.pid, signal.SIGKILL)
        told[asset] = process.communicate()[0]
        deadline = time.monotonic() + 30
        while processes_using(disturbed):
            assert time.monotonic() < deadline, f"left running: {processes_using(disturbed)}"
            time.sleep(0.1)
        assert not list((disturbed / "store" / asset).glob("*/manifest.json"))

    # By the run that was then killed in kd_checkpoint. On a busy machine the first kill may come when every block is
    # published and the library is not: nothing is left to resume then, nor to train.
    assert "block_library resumed" in told["kd_checkpoint"] or "23 blocks wanted, 0 to train" in notes_of(
        disturbed, "block_library"
    )
    how = outcomes(start(disturbed, stages))
    assert how["block_library"] == "reused"
    assert how["kd_checkpoint"] == "resumed"
    for asset in ("block_library", "kd_checkpoint"):
        ours, theirs = manifest_of(disturbed, asset), manifest_of(calm, asset)
        weights = {name: file.sha256 for name, file in ours.files.items() if name.endswith((".safetensors", ".json"))}
        assert weights
        assert weights == {name: theirs.files[name].sha256 for name in weights}
