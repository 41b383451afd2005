"""Opens a checkpoint in bf16 and exports it again; a program of its own so that several ranks can run it.

python -m torch.distributed.run --nproc_per_node 2 -m tests.pipeline.training.export_untrained START OUT ZERO_STAGE
"""

import sys
from pathlib import Path

from pipeline.recipe import OptimizerConfig
from pipeline.stage import ExecutionSettings
from pipeline.training.engine import TrainEngine
from pipeline.training.fitting import export_checkpoint, open_engine

# Signs alone decide AdamW's first step, so that what it adds is known: the learning rate at most.
LEARNING_RATE = 1e-6
OPTIMIZER = OptimizerConfig(
    learning_rate=LEARNING_RATE,
    min_learning_rate_ratio=1.0,
    warmup_ratio=0.0,
    schedule="constant",
    weight_decay=0.0,
    betas=(0.9, 0.95),
    max_grad_norm=1e9,
)


def open_bf16(start_dir: Path, *, zero_stage: int) -> TrainEngine:
    return open_engine(
        start_dir,
        optimizer=OPTIMIZER,
        total_steps=4,
        precision="bf16",
        execution=ExecutionSettings.model_validate({"zero_stage": zero_stage, "micro_batch_size": 4}),
        global_batch_size=4,
    )


def export_without_steps(start_dir: Path, out_dir: Path, *, zero_stage: int) -> None:
    engine = open_bf16(start_dir, zero_stage=zero_stage)
    export_checkpoint(engine, start_dir=start_dir, out_dir=out_dir)
    engine.close()


if __name__ == "__main__":
    export_without_steps(Path(sys.argv[1]), Path(sys.argv[2]), zero_stage=int(sys.argv[3]))
