"""Runs a stage as Dagster's process would: python -m tests.slurm.run_stage_here kd_checkpoint SPEC.json."""

import sys
from pathlib import Path

from pipeline.progress import SilentReporter
from pipeline.stages.process import run_stage
from pipeline.stages.registry import get_stage
from pipeline.stages.spec import StageSpec

if __name__ == "__main__":
    name, path = sys.argv[1:]
    spec = StageSpec.model_validate_json(Path(path).read_bytes())
    inputs = spec.inputs(SilentReporter())
    run_stage(get_stage(name), spec.parse_config(), inputs, Path(spec.out_dir), on_progress=print)
