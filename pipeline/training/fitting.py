"""Trains one checkpoint directory into another: load, validate, train or continue, validate, export, report.

The three supervised stages differ in their data, their objective and what they are judged by; the rest is here.
"""

import collections
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pipeline.architecture import Frozen
from pipeline.artifacts import write_atomically
from pipeline.data.packed import PackedTokens, load_packed, long_context_split
from pipeline.model.checkpoint import TensorReader, read_architecture, save_checkpoint
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.progress import Reporter
from pipeline.recipe import LongContextPhase, OptimizerConfig, Precision
from pipeline.stage import WORK_DIR, ExecutionSettings, StageInputs, StageResult, Table
from pipeline.training.batches import BatchPlan, plan_batches
from pipeline.training.distributed import barrier, init_distributed, told_by_rank_0, use_threads
from pipeline.training.engine import TrainEngine, release_memory
from pipeline.training.frozen import load_for_training
from pipeline.training.loop import TrainingRun, train
from pipeline.training.metrics import CurveRow, write_curve
from pipeline.training.objectives import Objective, RunModel

_NUM_TABLE_ROWS = 12
_PHASE_FILE = "phase.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedCheckpoint:
    """A training that is done and exported; `before` and `after` are what `validate` measured."""

    run: TrainingRun
    before: float
    after: float
    facts: dict[str, str]


def prepare_process(execution: ExecutionSettings) -> torch.device:
    """Join the process group, set threads, and return the device to compute on."""
    use_threads(execution.num_threads)
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
        load_for_training(start_dir, precision=precision, execution=execution).train(),
        optimizer=optimizer,
        total_steps=total_steps,
        precision=precision,
        execution=execution,
        global_batch_size=global_batch_size,
    )
    if precision == "bf16":
        engine.set_master_weights(TensorReader(start_dir).read)
    return engine


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """One part of a training, from the weights of the part before: its windows, its batch, its optimizer."""

    plan: BatchPlan
    global_batch_size: int
    optimizer: OptimizerConfig


def plan_phases(
    mixture_dir: Path,
    *,
    tokens: int,
    global_batch_size: int,
    optimizer: OptimizerConfig,
    long_context: tuple[LongContextPhase, ...],
    what: str,
) -> tuple[Phase, ...]:
    """Return the parts of a training on a mixture, each window of which is read once: `train`, then longer windows.

    Raises:
        DataError: when a part's tokens do not fill one step, or exceed its windows.
    """
    base = plan_batches(
        load_packed(mixture_dir, "train"),
        tokens=tokens,
        global_batch_size=global_batch_size,
        shuffle_seed=None,
        what=what,
    )
    phases = [Phase(plan=base, global_batch_size=global_batch_size, optimizer=optimizer)]
    for more in long_context:
        plan = plan_batches(
            load_packed(mixture_dir, long_context_split(more.sequence_length)),
            tokens=more.tokens,
            global_batch_size=more.global_batch_size,
            shuffle_seed=None,
            what=f"{what}.long_context of {more.sequence_length:,}",
        )
        changed = optimizer.model_copy(update={"learning_rate": more.learning_rate})
        phases.append(Phase(plan=plan, global_batch_size=more.global_batch_size, optimizer=changed))
    return tuple(phases)


def fit_checkpoint(
    *,
    start_dir: Path,
    out_dir: Path,
    phases: Sequence[Phase],
    precision: Precision,
    make_objective: Callable[[HeterogeneousLlamaForCausalLM], Objective],
    validate: Callable[[RunModel], float],
    what: str,
    inputs: StageInputs,
) -> FittedCheckpoint:
    """Train the checkpoint in `start_dir` through every phase and write the result and its curve to `out_dir`.

    Every rank calls this after `prepare_process`; rank 0 writes. Weights are stored in the dtype they had, rounded once
    from the fp32 master weights; between two phases they are kept in fp32. A finished phase is not trained again.

    Raises:
        DivergedError, DataError, CheckpointError: see pipeline.training.loop.train.
    """
    rank = init_distributed().rank
    done: list[_FinishedPhase] = []
    trained: _TrainedPhase | None = None
    for index, phase in enumerate(phases):
        is_last = index == len(phases) - 1
        work_dir = out_dir / WORK_DIR / (f"phase-{index}" if index else "")
        kept_dir = out_dir / WORK_DIR / f"weights-{index}"
        record = kept_dir / _PHASE_FILE
        finished = told_by_rank_0(record.read_text(encoding="utf-8") if record.is_file() else "")
        if finished:
            done.append(_FinishedPhase.model_validate_json(finished))
            continue
        # In a call of its own: an engine that a variable still names would take its memory beside the next one's.
        trained = _train_phase(
            phase,
            start_dir=start_dir if index == 0 else out_dir / WORK_DIR / f"weights-{index - 1}",
            like_dir=start_dir,
            out_dir=out_dir if is_last else kept_dir,
            stored_dtype=None if is_last else torch.float32,
            checkpoints_dir=work_dir / "checkpoints",
            precision=precision,
            make_objective=make_objective,
            validate=validate,
            what=what if len(phases) == 1 else f"{what}, {phase.plan.data.sequence_length:,} tokens a window",
            execution=_for_windows(inputs.execution, phase.plan.data, base=phases[0].plan.data),
            reporter=inputs.reporter,
        )
        release_memory()
        done.append(trained.finished)
        if not is_last:
            if rank == 0:
                write_atomically(record, done[-1].model_dump_json().encode())
            barrier()
            if rank == 0:
                shutil.rmtree(work_dir / "checkpoints", ignore_errors=True)
                _remove_weights(out_dir / WORK_DIR / f"weights-{index - 1}")
    assert trained is not None
    curve = _joined([phase.curve for phase in done])
    if rank == 0:
        write_curve(out_dir, curve)
    return FittedCheckpoint(
        run=replace(trained.run, curve=curve, num_resumes=sum(phase.num_resumes for phase in done)),
        before=done[0].before,
        after=done[-1].after,
        facts=trained.facts,
    )


class _FinishedPhase(Frozen):
    """What is kept of a phase until the training is over."""

    curve: tuple[CurveRow, ...]
    before: float
    after: float
    num_resumes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _TrainedPhase:
    """A phase that this process trained."""

    finished: _FinishedPhase
    run: TrainingRun
    facts: dict[str, str]


def _train_phase(
    phase: Phase,
    *,
    start_dir: Path,
    like_dir: Path,
    out_dir: Path,
    stored_dtype: torch.dtype | None,
    checkpoints_dir: Path,
    precision: Precision,
    make_objective: Callable[[HeterogeneousLlamaForCausalLM], Objective],
    validate: Callable[[RunModel], float],
    what: str,
    execution: ExecutionSettings,
    reporter: Reporter,
) -> _TrainedPhase:
    engine = open_engine(
        start_dir,
        optimizer=phase.optimizer,
        total_steps=phase.plan.num_steps,
        precision=precision,
        execution=execution,
        global_batch_size=phase.global_batch_size,
    )
    try:
        before = validate(engine.model)
        reporter.note(f"validation before training: {before:.4g}")
        run = train(
            engine,
            plan=phase.plan,
            objective=make_objective(engine.model),
            what=what,
            reporter=reporter,
            checkpoints_dir=checkpoints_dir,
            checkpoint_interval_steps=execution.checkpoint_interval_steps,
        )
        after = validate(engine.model)
        reporter.note(f"validation after training: {after:.4g}")
        export_checkpoint(engine, start_dir=like_dir, out_dir=out_dir, dtype=stored_dtype)
        facts = training_facts(engine)
    finally:
        engine.close()
    finished = _FinishedPhase(curve=run.curve, before=before, after=after, num_resumes=run.num_resumes)
    return _TrainedPhase(finished=finished, run=run, facts=facts)


def _remove_weights(kept_dir: Path) -> None:
    """Remove the weights that the next phase began from; the record stays."""
    for path in kept_dir.glob("*"):
        if path.name != _PHASE_FILE:
            path.unlink()


def _for_windows(execution: ExecutionSettings, data: PackedTokens, *, base: PackedTokens) -> ExecutionSettings:
    """Return settings under which a micro-batch of these windows holds no more tokens than one of the first phase's."""
    rows = max(1, execution.micro_batch_size * base.sequence_length // data.sequence_length)
    return execution.model_copy(update={"micro_batch_size": rows})


def _joined(curves: Sequence[tuple[CurveRow, ...]]) -> tuple[CurveRow, ...]:
    """Return the curves one after the other, steps and tokens counted on."""
    joined: list[CurveRow] = []
    for curve in curves:
        steps, tokens = (joined[-1]["step"], joined[-1]["tokens"]) if joined else (0, 0)
        joined += [{**row, "step": row["step"] + steps, "tokens": row["tokens"] + tokens} for row in curve]
    return tuple(joined)


def export_checkpoint(engine: TrainEngine, *, start_dir: Path, out_dir: Path, dtype: torch.dtype | None = None) -> None:
    """Write the engine's weights as a checkpoint like the one training began from: architecture, tokenizer, dtypes.

    `dtype` stores every tensor in that one instead.
    """
    stored = TensorReader(start_dir)
    tensors = ((name, tensor.to(dtype or stored.dtype(name))) for name, tensor in engine.exported_tensors())
    if engine.rank == 0:
        save_checkpoint(out_dir, architecture=read_architecture(start_dir), tensors=tensors, tokenizer_dir=start_dir)
    else:
        collections.deque(tensors, maxlen=0)
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
    fitted: FittedCheckpoint, *, phases: Sequence[Phase], judged_by: str, ratio_floor: float = 0.0
) -> StageResult:
    """Return the stage's result: speed and loss of the run, and `judged_by` before, after, and as a ratio.

    A value before training below `ratio_floor` counts as `ratio_floor`: a student that already equals its teacher has
    nothing to be divided by.
    """
    run = fitted.run
    return StageResult(
        metrics={
            "num_steps": sum(phase.plan.num_steps for phase in phases),
            "num_tokens": sum(phase.plan.num_steps * phase.plan.tokens_per_step for phase in phases),
            "num_epochs": phases[0].plan.num_epochs,
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
