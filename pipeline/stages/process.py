"""Running one stage: in this process, or in one of its own that reads a spec file and leaves a result file.

Belongs here: the command and environment of a stage's process, and the lines of progress it leaves. What to run and
where its result goes is pipeline.execution's business.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pipeline.architecture import Frozen
from pipeline.artifacts import PROGRESS, STAGE_LOG, write_atomically
from pipeline.errors import StageError
from pipeline.processes import run_group
from pipeline.progress import JsonlReporter
from pipeline.stage import WORK_DIR, ExecutionSettings, StageInputs, StageResult
from pipeline.stages.registry import Stage
from pipeline.stages.spec import RESULT_IN_WORK, SPEC_FILE, StageSpec, config_type_name, take_error

REPOSITORY = Path(__file__).resolve().parents[2]
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
    spec = StageSpec(
        config_type=config_type_name(config),
        config=config.model_dump(mode="json"),
        artifacts={name: str(path.absolute()) for name, path in inputs.artifacts.items()},
        store_root=str(inputs.store_root.absolute()),
        downloads=str(inputs.downloads.absolute()),
        out_dir=str(out_dir.absolute()),
        execution=inputs.execution,
    )
    spec_path = out_dir / WORK_DIR / SPEC_FILE
    result_path = out_dir / RESULT_IN_WORK
    result_path.unlink(missing_ok=True)
    write_atomically(spec_path, spec.model_dump_json(indent=1).encode())
    take_error(out_dir)
    exit_code = run_group(
        _command(inputs.execution, stage, spec_path),
        env=_child_environment(inputs.execution),
        log_path=out_dir / STAGE_LOG,
        grace_s=inputs.execution.grace_seconds,
        poll=tail.forward,
    )
    if exit_code or not result_path.is_file():
        told = take_error(out_dir)
        raise StageError(told if told is not None else _failure(stage, exit_code, out_dir / STAGE_LOG))
    return StageResult.model_validate_json(result_path.read_bytes())


def _command(execution: ExecutionSettings, stage: Stage, spec_path: Path) -> list[str]:
    """Return the command of a stage process; training stages run on every rank, the others on one."""
    arguments = ["-m", "pipeline.stages", stage.name, "--spec", str(spec_path)]
    if execution.num_ranks == 1 or not stage.runs_on_all_ranks:
        return [sys.executable, *arguments]
    ranks = ["--standalone", "--nproc_per_node", str(execution.num_ranks)]
    return [sys.executable, "-m", "torch.distributed.run", *ranks, *arguments]


def _child_environment(execution: ExecutionSettings) -> dict[str, str]:
    environment = {
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
        "OMP_WAIT_POLICY": "PASSIVE",  # libgomp's spinning threads slowed a shared 2-core machine up to 80 times
        # glibc would map every large tensor anew and unmap it at once: a fault for each page, 12% of scoring's time.
        "MALLOC_MMAP_THRESHOLD_": str(2**30),
        "MALLOC_TRIM_THRESHOLD_": str(2**32),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",  # what a stage process reads is in the store; nothing is looked up behind its back
    }
    num_threads = execution.num_threads
    if num_threads is None and execution.num_ranks > 1:
        num_threads = max(1, (os.cpu_count() or 1) // execution.num_ranks)  # torchrun's own default is one
    if num_threads is not None:
        environment["OMP_NUM_THREADS"] = str(num_threads)
    return environment


def _failure(stage: Stage, exit_code: int, log_path: Path) -> str:
    tail = "\n".join(log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-25:])
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
