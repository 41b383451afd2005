"""Trains one checkpoint directory into another: load, validate, train or continue, validate, export, report.

The three supervised stages differ in their data, their objective and what they are judged by; the rest is here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from pipeline.model.checkpoint import TORCH_DTYPES, TensorReader, load_model, read_architecture, save_checkpoint
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.recipe import OptimizerConfig, Precision
from pipeline.stage import WORK_DIR, ExecutionSettings, StageInputs, StageResult, Table
from pipeline.training.batches import BatchPlan
from pipeline.training.distributed import barrier, init_distributed
from pipeline.training.engine import TrainEngine
from pipeline.training.loop import TrainingRun, train
from pipeline.training.metrics import write_curve
from pipeline.training.objectives import Objective, RunModel

_NUM_TABLE_ROWS = 12


class TrainingConfig(Protocol):
    """What the supervised stages' configs have in common."""

    @property
    def global_batch_size(self) -> int:
        """Windows per optimizer step, over all ranks."""
        ...

    @property
    def optimizer(self) -> OptimizerConfig:
        """AdamW and its schedule."""
        ...

    @property
    def precision(self) -> Precision:
        """What the model computes in."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedCheckpoint:
    """A training that is done and exported; `before` and `after` are what `validate` measured."""

    run: TrainingRun
    before: float
    after: float
    facts: dict[str, str]


def prepare_process(execution: ExecutionSettings) -> torch.device:
    """Join the process group, set threads, and return the device to compute on."""
    if execution.num_threads is not None:
        torch.set_num_threads(execution.num_threads)
    return init_distributed().device


def open_engine(
    start_dir: Path,
    *,
    optimizer: OptimizerConfig,
    total_steps: int,
    precision: Precision,
    execution: ExecutionSettings,
    global_batch_size: int,
) -> TrainEngine:
    """Put the checkpoint in `start_dir` under training; bf16 starts from its full-precision weights all the same.

    Raises:
        RecipeError, StageError: see TrainEngine.create.
        CheckpointError: see pipeline.model.checkpoint.load_model.
    """
    engine = TrainEngine.create(
        load_model(start_dir, dtype=TORCH_DTYPES[precision]).train(),
        optimizer=optimizer,
        total_steps=total_steps,
        precision=precision,
        execution=execution,
        global_batch_size=global_batch_size,
    )
    if precision == "bf16":
        engine.set_master_weights(TensorReader(start_dir).read)
    return engine


def fit_checkpoint(
    *,
    start_dir: Path,
    out_dir: Path,
    config: TrainingConfig,
    plan: BatchPlan,
    make_objective: Callable[[HeterogeneousLlamaForCausalLM], Objective],
    validate: Callable[[RunModel], float],
    what: str,
    inputs: StageInputs,
) -> FittedCheckpoint:
    """Train the checkpoint in `start_dir` through the plan and write the result and its curve to `out_dir`.

    Every rank calls this after `prepare_process`; rank 0 writes. Weights are stored in the dtype they had, rounded once
    from the fp32 master weights.

    Raises:
        DivergedError, DataError, CheckpointError: see pipeline.training.loop.train.
    """
    engine = open_engine(
        start_dir,
        optimizer=config.optimizer,
        total_steps=plan.num_steps,
        precision=config.precision,
        execution=inputs.execution,
        global_batch_size=config.global_batch_size,
    )
    try:
        before = validate(engine.model)
        inputs.reporter.note(f"validation before training: {before:.4g}")
        run = train(
            engine,
            plan=plan,
            objective=make_objective(engine.model),
            what=what,
            reporter=inputs.reporter,
            checkpoints_dir=out_dir / WORK_DIR / "checkpoints",
            checkpoint_interval_steps=inputs.execution.checkpoint_interval_steps,
        )
        after = validate(engine.model)
        inputs.reporter.note(f"validation after training: {after:.4g}")
        export_checkpoint(engine, start_dir=start_dir, out_dir=out_dir)
        if engine.rank == 0:
            write_curve(out_dir, run.curve)
        facts = training_facts(engine)
    finally:
        engine.close()
    return FittedCheckpoint(run=run, before=before, after=after, facts=facts)


def export_checkpoint(engine: TrainEngine, *, start_dir: Path, out_dir: Path) -> None:
    """Write the engine's weights as a checkpoint like the one training began from: architecture, dtypes, tokenizer."""
    tensors = engine.state_dict_for_export()
    if engine.rank == 0:
        stored = TensorReader(start_dir)
        save_checkpoint(
            out_dir,
            architecture=read_architecture(start_dir),
            tensors={name: tensor.to(stored.dtype(name)) for name, tensor in tensors.items()},
            tokenizer_dir=start_dir,
        )
    barrier()


def training_facts(engine: TrainEngine) -> dict[str, str]:
    """Return how the training was spread: results agree across these to rounding, not to the bit."""
    return {
        "world_size": str(engine.world_size),
        "zero_stage": str(engine.zero_stage),
        "micro_batch_size": str(engine.micro_batch_size),
        "precision": engine.precision,
        "device": engine.device.type,
    }


def fitting_result(
    fitted: FittedCheckpoint, *, plan: BatchPlan, judged_by: str, ratio_floor: float = 0.0
) -> StageResult:
    """Return the stage's result: speed and loss of the run, and `judged_by` before, after, and as a ratio.

    A value before training below `ratio_floor` counts as `ratio_floor`: a student that already equals its teacher has
    nothing to be divided by.
    """
    run = fitted.run
    return StageResult(
        metrics={
            "num_steps": plan.num_steps,
            "num_tokens": plan.num_steps * plan.tokens_per_step,
            "num_epochs": plan.num_epochs,
            "num_resumes": run.num_resumes,
            "tokens_per_second": run.tokens_per_second,
            "first_loss": run.curve[0]["loss"],
            "final_loss": run.curve[-1]["loss"],
            f"{judged_by}_before": fitted.before,
            f"{judged_by}_after": fitted.after,
            f"{judged_by}_ratio": fitted.after / max(fitted.before, ratio_floor),
        },
        facts=fitted.facts,
        tables={"training_curve": _curve_table(run)},
    )


def _curve_table(run: TrainingRun) -> Table:
    """About a dozen rows of the curve, evenly spaced, the last one included."""
    last = len(run.curve) - 1
    chosen = sorted({round(index * last / (_NUM_TABLE_ROWS - 1)) for index in range(_NUM_TABLE_ROWS)})
    columns = tuple(run.curve[0])
    return Table.of(columns, [[run.curve[index][column] for column in columns] for index in chosen])
