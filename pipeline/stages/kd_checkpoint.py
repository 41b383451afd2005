"""kd_checkpoint: the child learns from its parent on the distillation mixture (Puzzle, equation 1).

    python -m pipeline materialize kd_checkpoint          # on every rank that the execution settings name

Leaves out: the ordinary language-model loss, which the paper found not to help.
"""

from pathlib import Path

from pipeline.data.packed import load_packed
from pipeline.recipe import DistillationConfig
from pipeline.stage import StageInputs, StageResult
from pipeline.stages.training_figures import with_curve
from pipeline.training.fitting import fit_checkpoint, fitting_result, plan_phases, prepare_process
from pipeline.training.frozen import load_for_training, placed_frozen
from pipeline.training.objectives import DistillationObjective
from pipeline.training.validation import mean_kl, validation_rows

_NUM_VALIDATION_ROWS = 4
_NEGLIGIBLE_KL = 1e-4  # nats per token; the rounding of bf16 logits alone makes about this much


def run(config: DistillationConfig, inputs: StageInputs, out_dir: Path) -> StageResult:
    """Distil fused_checkpoint from parent_checkpoint."""
    device = prepare_process(inputs.execution)
    mixture_dir = inputs["distillation_mix"]
    phases = plan_phases(
        mixture_dir,
        tokens=config.tokens,
        global_batch_size=config.global_batch_size,
        optimizer=config.optimizer,
        long_context=config.long_context,
        what="kd",
    )
    validation = validation_rows(load_packed(mixture_dir, "validation"), max_rows=_NUM_VALIDATION_ROWS)
    teacher = load_for_training(inputs["parent_checkpoint"], precision=config.precision, execution=inputs.execution)
    with placed_frozen(teacher, precision=config.precision, execution=inputs.execution):
        fitted = fit_checkpoint(
            start_dir=inputs["fused_checkpoint"],
            out_dir=out_dir,
            phases=phases,
            precision=config.precision,
            make_objective=lambda student: DistillationObjective(
                student=student, teacher=teacher, cosine_weight=config.cosine_weight, kl_weight=config.kl_weight
            ),
            validate=lambda student: mean_kl(
                student, validation, teacher=teacher, batch_size=inputs.execution.micro_batch_size, device=device
            ),
            what="KD steps",
            inputs=inputs,
        )
    result = fitting_result(fitted, phases=phases, judged_by="validation_kl", ratio_floor=_NEGLIGIBLE_KL)
    return with_curve(result, asset="kd_checkpoint", curve=fitted.run.curve, out_dir=out_dir)
