"""Running one stage: in this process, or in one of its own that reads a spec file and leaves a result file.

Belongs here: a stage's process from its start to its result, and the lines of progress it leaves. Its command is
pipeline.stages.launch's business; what to run and where its result goes, pipeline.execution's.
"""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pipeline.architecture import Frozen
from pipeline.artifacts import PROGRESS, STAGE_LOG, write_atomically
from pipeline.errors import StageError
from pipeline.processes import run_group
from pipeline.progress import JsonlReporter
from pipeline.stage import WORK_DIR, StageInputs, StageResult
from pipeline.stages.launch import child_environment, stage_command
from pipeline.stages.registry import Stage
from pipeline.stages.spec import RESULT_IN_WORK, SPEC_FILE, StageSpec, take_error

_LONGEST_DELAY_S = 65.0  # NFS believes that a file is missing for a minute, if nothing else is set
_NUM_TAIL_LINES = 25
ProgressListener = Callable[[dict[str, object]], None]


def run_stage(
    stage: Stage, config: Frozen, inputs: StageInputs, out_dir: Path, *, on_progress: ProgressListener
) -> StageResult:
    """Run a stage to its end and return its result; `on_progress` is handed what it reports on the way.

    Raises:
        StageError: when its process ends without a result, with what the stage said or the end of its log.
    """
    (out_dir / WORK_DIR).mkdir(parents=True, exist_ok=True)
    tail = _ProgressTail(out_dir / PROGRESS, on_progress)
    if not stage.in_child or inputs.execution.launcher == "in_process":
        reporter = JsonlReporter(out_dir / PROGRESS, label=stage.name, echo=False)
        result = stage.load()(config, replace(inputs, reporter=reporter), out_dir)
        tail.forward()
        return result
    spec_path = out_dir / WORK_DIR / SPEC_FILE
    result_path = out_dir / RESULT_IN_WORK
    result_path.unlink(missing_ok=True)
    write_atomically(spec_path, StageSpec.of(config, inputs, out_dir).model_dump_json(indent=1).encode())
    take_error(out_dir)
    exit_code = run_group(
        stage_command(inputs.execution, stage, spec_path),
        env=child_environment(inputs.execution),
        log_path=out_dir / STAGE_LOG,
        grace_s=inputs.execution.grace_seconds,
        poll=tail.forward,
    )
    num_nodes = inputs.execution.num_nodes
    if exit_code or not _appears(result_path, within_s=_LONGEST_DELAY_S if num_nodes > 1 else 0.0):
        told = take_error(out_dir)
        if told is None:
            told = _failure(stage, exit_code, out_dir / STAGE_LOG, num_lines=_NUM_TAIL_LINES * num_nodes)
        raise StageError(told)
    return StageResult.model_validate_json(result_path.read_bytes())


def _appears(path: Path, *, within_s: float) -> bool:
    """Return whether a file is there; one that another node wrote may be seen here later."""
    deadline = time.monotonic() + within_s
    while not path.is_file():
        if time.monotonic() >= deadline:
            return False
        time.sleep(1.0)
    return True


def _failure(stage: Stage, exit_code: int, log_path: Path, *, num_lines: int) -> str:
    tail = "\n".join(log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-num_lines:])
    end = f"exit code {exit_code}" if exit_code else "no result file"
    return f"{stage.name} ended with {end}; the end of {log_path}:\n{tail}"


class _ProgressTail:
    """Hands every new, complete line of a progress file to a listener."""

    def __init__(self, path: Path, listener: ProgressListener) -> None:
        self._path = path
        self._listener = listener
        self._offset = path.stat().st_size if path.is_file() else 0

    def forward(self) -> None:
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                self._listener(json.loads(line))
