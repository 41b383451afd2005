"""Runs stages one after the other on every rank; a program of its own so that one launch serves many cases.

python -m torch.distributed.run --nproc_per_node 2 -m tests.pipeline.training.run_stages SPEC.json ...

Each spec is named <stage>-<anything>.json.
"""

import sys
from pathlib import Path

from pipeline.progress import SilentReporter
from pipeline.stages.registry import get_stage
from pipeline.stages.spec import StageSpec

if __name__ == "__main__":
    for argument in sys.argv[1:]:
        spec = StageSpec.model_validate_json(Path(argument).read_bytes())
        get_stage(Path(argument).name.partition("-")[0]).load()(
            spec.parse_config(),
            spec.inputs(SilentReporter()),
            Path(spec.out_dir),
        )
