"""sft_checkpoint: supervised fine-tuning on paired reasoning modes; only the assistant's tokens carry loss.

    python -m pipeline materialize sft_checkpoint          # on every rank that the execution settings name

The samples are packed into windows, and attention never crosses from one to the next. Each stage trains on one blend
from the weights of the stage before, with an optimizer of its own (Llama-Nemotron, section 4.2). Text of the
pre-training mixture may be replayed between the samples.
"""

from pathlib import Path

from pipeline.data.packed import blend_split, load_packed
from pipeline.recipe import SFTConfig
from pipeline.stage import StageInputs, StageResult
from pipeline.stages.training_figures import with_curve
from pipeline.training.batches import plan_batches, with_replay
from pipeline.training.fitting import Phase, fit_checkpoint, fitting_result, prepare_process
from pipeline.training.objectives import NextTokenObjective
from pipeline.training.validation import mean_cross_entropy, require_masked, validation_rows

_NUM_VALIDATION_ROWS = 8


def run(config: SFTConfig, inputs: StageInputs, out_dir: Path) -> StageResult:
    """Train cpt_checkpoint on reasoning_toggle_dataset, and on what is replayed of pretraining_mix."""
    device = prepare_process(inputs.execution)
    dataset_dir = inputs["reasoning_toggle_dataset"]
    trained_shares = []
    phases = []
    for number, stage in enumerate(config.stages):
        blend = load_packed(dataset_dir, blend_split(stage.blend))
        trained_shares.append(require_masked(blend, what=f"{dataset_dir} blend {stage.blend}"))
        if stage.replay_share > 0:
            text = load_packed(inputs["pretraining_mix"], "train")
            blend = with_replay(blend, text, share=stage.replay_share, what=f"sft.stages[{number}]")
        plan = plan_batches(
            blend,
            tokens=stage.tokens,
            global_batch_size=stage.global_batch_size,
            shuffle_seed=config.seed if stage.shuffle else None,
            what=f"sft.stages[{number}]",
        )
        phases.append(Phase(plan=plan, global_batch_size=stage.global_batch_size, optimizer=stage.optimizer))
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
    result = result.model_copy(update={"metrics": {**result.metrics, "trained_token_share": min(trained_shares)}})
    return with_curve(result, asset="sft_checkpoint", curve=fitted.run.curve, out_dir=out_dir)
