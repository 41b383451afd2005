"""channel_importance: contribution of every FFN channel and key/value head of the parent, over calibration tokens."""

from dataclasses import replace
from pathlib import Path

from pipeline.data.packed import load_packed
from pipeline.model.checkpoint import TORCH_DTYPES, load_model
from pipeline.puzzle.block_loss import output_curvature
from pipeline.puzzle.devices import Ranks, num_threads, place
from pipeline.puzzle.importance import count_non_finite, measure_importance, save_importance
from pipeline.stage import StageInputs, StageResult, Table
from pipeline.stages.configs import ImportanceStage


def run(config: ImportanceStage, inputs: StageInputs, out_dir: Path) -> StageResult:
    """Write importance.safetensors."""
    settings = config.importance
    packed = load_packed(inputs["distillation_mix"], "train").take(settings.tokens)
    model = place(load_model(inputs["parent_checkpoint"], dtype=TORCH_DTYPES[settings.precision]), Ranks().device)
    with num_threads(inputs.execution.num_threads):
        importance = measure_importance(model, packed, settings=settings, reporter=inputs.reporter)
        if config.with_output_curvature:
            curvature = output_curvature(model, packed, batch_size=settings.batch_size, reporter=inputs.reporter)
            importance = replace(importance, output_curvature=curvature)
    out_dir.mkdir(parents=True, exist_ok=True)
    save_importance(importance, out_dir)
    rows = []
    for layer, (channels_F, heads_K) in enumerate(
        zip(importance.ffn_contribution, importance.kv_contribution, strict=True)
    ):
        ordered_F = channels_F.sort(descending=True).values
        half = ordered_F[: len(ordered_F) // 2].sum() / ordered_F.sum()
        rows.append(
            (
                layer,
                round(channels_F.mean().item(), 5),
                round(channels_F.max().item(), 5),
                round(half.item(), 4),
                *(round(head, 5) for head in heads_K.tolist()),
            )
        )
    heads = [f"kv_head_{head}" for head in range(len(importance.kv_contribution[0]))]
    return StageResult(
        metrics={"num_non_finite_values": count_non_finite(importance), "num_tokens": packed.num_tokens},
        tables={
            "contribution": Table.of(
                ("layer", "mean_channel", "largest_channel", "share_of_the_stronger_half", *heads), rows
            )
        },
    )
