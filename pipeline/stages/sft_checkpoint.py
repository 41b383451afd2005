"""sft_checkpoint: supervised fine-tuning on paired reasoning modes; only the assistant's tokens carry loss.

    python -m pipeline materialize sft_checkpoint          # on every rank that the execution settings name

The samples are packed into windows, attention never crosses from one to the next, and they are gone through as often
as the token budget asks for, reshuffled every epoch.
"""

from pathlib import Path

from pipeline.data.packed import load_packed
from pipeline.recipe import SFTConfig
from pipeline.stage import StageInputs, StageResult
from pipeline.stages.training_figures import with_curve
from pipeline.training.batches import plan_batches
from pipeline.training.fitting import Phase, fit_checkpoint, fitting_result, prepare_process
from pipeline.training.objectives import NextTokenObjective
from pipeline.training.validation import mean_cross_entropy, require_masked, validation_rows

_NUM_VALIDATION_ROWS = 8


def run(config: SFTConfig, inputs: StageInputs, out_dir: Path) -> StageResult:
    """Train cpt_checkpoint on reasoning_toggle_dataset."""
    device = prepare_process(inputs.execution)
    dataset_dir = inputs["reasoning_toggle_dataset"]
    data = load_packed(dataset_dir, "train")
    trained_share = require_masked(data, what=str(dataset_dir))
    plan = plan_batches(
        data,
        tokens=config.tokens,
        global_batch_size=config.global_batch_size,
        shuffle_seed=config.seed,
        what="sft",
    )
    phases = (Phase(plan=plan, global_batch_size=config.global_batch_size, optimizer=config.optimizer),)
    validation = validation_rows(load_packed(dataset_dir, "validation"), max_rows=_NUM_VALIDATION_ROWS)
    fitted = fit_checkpoint(
        start_dir=inputs["cpt_checkpoint"],
        out_dir=out_dir,
        phases=phases,
        precision=config.precision,
        make_objective=lambda _: NextTokenObjective(),
        validate=lambda model: mean_cross_entropy(
            model, validation, batch_size=inputs.execution.micro_batch_size, device=device
        ),
        what="SFT steps",
        inputs=inputs,
    )
    result = fitting_result(fitted, phases=phases, judged_by="validation_loss")
    result = result.model_copy(update={"metrics": {**result.metrics, "trained_token_share": trained_share}})
    return with_curve(result, asset="sft_checkpoint", curve=fitted.run.curve, out_dir=out_dir)
