"""cpt_checkpoint: continued pre-training of the distilled child on the pre-training mixture.

    python -m pipeline materialize cpt_checkpoint          # on every rank that the execution settings name

Leaves out: the teacher; this is next-token cross-entropy alone.
"""

import math
from pathlib import Path

from pipeline.data.packed import load_packed
from pipeline.recipe import PretrainingConfig
from pipeline.stage import StageInputs, StageResult
from pipeline.stages.training_figures import with_curve
from pipeline.training.fitting import fit_checkpoint, fitting_result, plan_phases, prepare_process
from pipeline.training.objectives import NextTokenObjective
from pipeline.training.validation import mean_cross_entropy, validation_rows

_NUM_VALIDATION_ROWS = 8


def run(config: PretrainingConfig, inputs: StageInputs, out_dir: Path) -> StageResult:
    """Train kd_checkpoint on pretraining_mix."""
    device = prepare_process(inputs.execution)
    mixture_dir = inputs["pretraining_mix"]
    phases = plan_phases(
        mixture_dir,
        tokens=config.tokens,
        global_batch_size=config.global_batch_size,
        optimizer=config.optimizer,
        long_context=config.long_context,
        what="cpt",
    )
    validation = validation_rows(load_packed(mixture_dir, "validation"), max_rows=_NUM_VALIDATION_ROWS)
    fitted = fit_checkpoint(
        start_dir=inputs["kd_checkpoint"],
        out_dir=out_dir,
        phases=phases,
        precision=config.precision,
        make_objective=lambda _: NextTokenObjective(),
        validate=lambda model: math.exp(
            mean_cross_entropy(model, validation, batch_size=inputs.execution.micro_batch_size, device=device)
        ),
        what="CPT steps",
        inputs=inputs,
    )
    result = fitting_result(fitted, phases=phases, judged_by="validation_perplexity")
    return with_curve(result, asset="cpt_checkpoint", curve=fitted.run.curve, out_dir=out_dir)
