"""Run one stage from a spec file, on one process or as a rank of many.

    python -m pipeline.stages kd_checkpoint --spec SPEC.json
    python -m torch.distributed.run --nproc_per_node 2 ... -m pipeline.stages kd_checkpoint --spec SPEC.json

The spec names the stage's config, its input artifacts and its output directory. Rank 0 publishes the result by rename.
"""

import argparse
import os
import sys
import traceback
from pathlib import Path

from pipeline.artifacts import PROGRESS, disk_error, write_atomically
from pipeline.errors import RefitError
from pipeline.processes import end_with_parent
from pipeline.progress import JsonlReporter, SilentReporter
from pipeline.stages.registry import get_stage
from pipeline.stages.spec import RESULT_IN_WORK, StageSpec, leave_error


def main() -> None:
    """Run the stage that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.stages", description="Run one stage from a spec file.")
    parser.add_argument("stage")
    parser.add_argument("--spec", type=Path, required=True)
    arguments = parser.parse_args()

    end_with_parent()
    spec = StageSpec.model_validate_json(arguments.spec.read_bytes())
    rank = int(os.environ.get("RANK", "0"))
    stage = get_stage(arguments.stage)
    out_dir = Path(spec.out_dir)
    reporter = JsonlReporter(out_dir / PROGRESS, label=stage.name, echo=True) if rank == 0 else SilentReporter()
    try:
        result = stage.load()(spec.parse_config(), spec.inputs(reporter), out_dir)
    except Exception as err:
        told = err if isinstance(err, RefitError) else disk_error(err, path=out_dir)
        if told is None:
            raise  # a bug, or a library's own error: its traceback is in the log
        traceback.print_exc()
        leave_error(out_dir, told)
        sys.exit(1)
    if rank == 0:
        write_atomically(out_dir / RESULT_IN_WORK, result.model_dump_json(indent=1).encode())


if __name__ == "__main__":
    main()
