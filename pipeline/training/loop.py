"""The one training loop: steps, gradients, curve, progress, checkpoints and resume. Knows neither stage nor loss.

A run that is ended at any moment and started again ends with the curve and the weights, bit for bit, of one that was
not.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import DataError, DivergedError
from pipeline.progress import Reporter
from pipeline.training.batches import BatchPlan
from pipeline.training.checkpoints import newest_path
from pipeline.training.distributed import sum_across_ranks
from pipeline.training.engine import StepInfo, TrainEngine
from pipeline.training.metrics import CurveRow, Throughput
from pipeline.training.objectives import Objective, take_batch


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRun:
    """A finished loop. `curve` covers all steps, those before a resume included; the speed, this process alone."""

    curve: tuple[CurveRow, ...]
    tokens_per_second: float
    num_resumes: int


def train(
    engine: TrainEngine,
    *,
    plan: BatchPlan,
    objective: Objective,
    what: str,
    reporter: Reporter,
    checkpoints_dir: Path,
    checkpoint_interval_steps: int,
) -> TrainingRun:
    """Train through the plan, from the newest checkpoint in `checkpoints_dir` where there is one.

    Args:
        engine: whose global batch is the plan's.
        plan: the windows of every step.
        objective: what is minimised.
        what: the steps' name for people: `KD steps`.
        reporter: hears of every step.
        checkpoints_dir: on a disk that all ranks share.
        checkpoint_interval_steps: optimizer steps between two checkpoints.

    Raises:
        DivergedError: when loss or gradient norm is not finite; names the step and the newest checkpoint.
        DataError: when a step has nothing to train on.
        CheckpointError: when the newest checkpoint was written under other settings.
    """
    state = engine.load_latest(checkpoints_dir, reporter=reporter)
    curve: list[dict[str, int | float]] = [] if state is None else list(state["curve"])
    num_resumes = 0 if state is None else int(state["num_resumes"]) + 1
    if state is not None:
        reporter.note(f"continuing {what} after step {engine.num_steps} of {plan.num_steps}")
    throughput = Throughput()
    while engine.num_steps < plan.num_steps:
        terms = _accumulate(engine, plan=plan, objective=objective)
        info = engine.step()
        row = {
            "step": info.step,
            "tokens": info.step * plan.tokens_per_step,
            "loss": terms["loss"],
            "learning_rate": info.learning_rate,
            "grad_norm": info.grad_norm,
            **terms,
        }
        _require_finite(info, loss=terms["loss"], plan=plan, what=what, checkpoints_dir=checkpoints_dir)
        curve.append(row)
        throughput.add(plan.tokens_per_step)
        if info.step % checkpoint_interval_steps == 0 and info.step < plan.num_steps:
            saved: dict[str, Any] = {"curve": curve, "num_resumes": num_resumes}
            engine.save(checkpoints_dir, saved)
        reporter.step(
            info.step,
            plan.num_steps,
            what=what,
            loss=terms["loss"],
            tokens_per_second=throughput.tokens_per_second,
        )
    return TrainingRun(curve=tuple(curve), tokens_per_second=throughput.tokens_per_second, num_resumes=num_resumes)


def _accumulate(engine: TrainEngine, *, plan: BatchPlan, objective: Objective) -> dict[str, float]:
    """Run all micro-batches of the next step on this rank; return the step's terms, summed over ranks."""
    step = engine.num_steps
    rows = plan.rows(step)
    num_targets = objective.num_targets(plan.data.labels_NT[rows])
    if num_targets == 0:
        raise DataError(f"step {step + 1} has no token to train on: every label of its {len(rows)} windows is masked")
    totals = torch.zeros(len(objective.terms), dtype=torch.float64, device=engine.device)
    for micro_step in range(engine.num_micro_steps):
        first = (micro_step * engine.world_size + engine.rank) * engine.micro_batch_size
        batch = take_batch(plan.data, rows[first : first + engine.micro_batch_size], device=engine.device)
        terms = objective(engine.forward, batch, num_targets=num_targets)
        engine.backward(terms["loss"])
        totals += torch.stack([terms[name].detach().double() for name in objective.terms])
    summed = sum_across_ranks(totals.tolist(), device=engine.device)
    return dict(zip(objective.terms, summed, strict=True))


def _require_finite(info: StepInfo, *, loss: float, plan: BatchPlan, what: str, checkpoints_dir: Path) -> None:
    if math.isfinite(loss) and math.isfinite(info.grad_norm):
        return
    good = newest_path(checkpoints_dir)
    raise DivergedError(
        f"{what}: step {info.step} of {plan.num_steps} has loss {loss} and gradient norm {info.grad_norm} at learning "
        f"rate {info.learning_rate:.3g}; the newest good checkpoint is {good or 'none'}. Lower the learning rate, "
        "lengthen the warm-up, or look at the windows of this step"
    )
