"""block_library: every alternative subblock of every layer, trained by decoupled block-wise local distillation.

Only blocks that the store does not hold yet are trained. Under several ranks each trains its share of the layers; a
block's weights are the same whoever trains it, and rank 0 writes the index.
"""

import statistics
import time
from pathlib import Path

import polars as pl

from pipeline.artifacts import ArtifactStore
from pipeline.data.packed import load_packed
from pipeline.model.checkpoint import TORCH_DTYPES, TensorReader, load_model, read_architecture
from pipeline.puzzle.bld import FailedBlock, TrainedBlock, train_blocks
from pipeline.puzzle.devices import Ranks, num_threads, place
from pipeline.puzzle.importance import load_importance
from pipeline.puzzle.library import (
    BLOCK_ASSET,
    BlockKey,
    BlockRecord,
    block_fingerprint,
    build_index,
    content_hash_of,
    publish_block,
    read_record,
    trainable_keys,
    trained_entry,
    write_index,
)
from pipeline.puzzle.search_space import resolve
from pipeline.puzzle.tables import LOSSES, SCHEMAS, write_table
from pipeline.report.drawings import draw_library, save_figures
from pipeline.stage import WORK_DIR, StageInputs, StageResult, Table
from pipeline.stages.configs import BlockLibraryStage
from pipeline.training.distributed import barrier

UPSTREAM = ("parent_checkpoint", "distillation_mix", "channel_importance")


def run(config: BlockLibraryStage, inputs: StageInputs, out_dir: Path) -> StageResult:
    """Train the missing blocks and write index.json and losses.parquet."""
    ranks = Ranks()
    store = ArtifactStore(inputs.store_root)
    architecture = read_architecture(inputs["parent_checkpoint"])
    space = resolve(config.search_space, architecture)
    upstream = {asset: content_hash_of(inputs[asset]) for asset in UPSTREAM}
    wanted = {
        key: block_fingerprint(key, upstream=upstream, settings=config.block_library) for key in trainable_keys(space)
    }
    missing = {key: block_id for key, block_id in wanted.items() if store.find(BLOCK_ASSET, block_id) is None}
    num_trained = len(missing)
    mine = {key: block_id for key, block_id in missing.items() if key.layer % ranks.size == ranks.rank}
    inputs.reporter.note(f"{len(wanted)} blocks wanted, {len(missing)} to train")
    failures = _train(mine, config, inputs, out_dir / WORK_DIR / f"rank-{ranks.rank}", ranks, store) if mine else []
    if ranks.size > 1:
        barrier()
    if ranks.rank != 0:
        return StageResult()

    artifacts = {key: store.find(BLOCK_ASSET, block_id) for key, block_id in wanted.items()}
    found = {key: artifact for key, artifact in artifacts.items() if artifact is not None}
    index = build_index(space, trained={key: trained_entry(artifact) for key, artifact in found.items()})
    records = {key: read_record(artifact) for key, artifact in found.items()}
    out_dir.mkdir(parents=True, exist_ok=True)
    write_index(out_dir, index)
    losses = _losses(records)
    write_table(out_dir, LOSSES, losses)
    failed = [key for key in wanted if key not in found]
    improved = [record.final_loss < record.initial_loss for record in records.values()]
    reasons = {failure.key: failure.reason for failure in failures}
    return StageResult(
        metrics={
            "num_blocks": len(wanted),
            "num_trained_blocks": num_trained,
            "num_failed_blocks": len(failed),
            "share_of_blocks_improved": statistics.fmean(improved) if improved else 1.0,
            "num_tokens": config.block_library.tokens,
        },
        facts={f"failed: {key}": reasons.get(key, "trained by another rank") for key in failed},
        figures=save_figures({"library": draw_library(losses)} if records else {}, out_dir=out_dir),
        tables={"variants": _variant_table(records), "layers": _layer_table(records)},
    )


def _train(
    missing: dict[BlockKey, str],
    config: BlockLibraryStage,
    inputs: StageInputs,
    work_dir: Path,
    ranks: Ranks,
    store: ArtifactStore,
) -> list[FailedBlock]:
    settings = config.block_library
    began = time.monotonic()
    parent_dir = inputs["parent_checkpoint"]
    with num_threads(inputs.execution.num_threads):
        outcomes = train_blocks(
            place(load_model(parent_dir, dtype=TORCH_DTYPES[settings.precision]), ranks.device),
            missing,
            parent_tensors=TensorReader(parent_dir),
            importance=load_importance(inputs["channel_importance"]),
            train=load_packed(inputs["distillation_mix"], "train").take(settings.tokens),
            validation=load_packed(inputs["distillation_mix"], "validation"),
            settings=settings,
            work_dir=work_dir,
            checkpoint_interval_steps=inputs.execution.checkpoint_interval_steps,
            reporter=inputs.reporter,
        )
    wall_s = (time.monotonic() - began) / len(missing)
    for outcome in outcomes:
        if isinstance(outcome, TrainedBlock):
            block_id = missing[outcome.key]
            publish_block(store, block_id, tensors=outcome.tensors, record=outcome.record, wall_s=wall_s)
    return [outcome for outcome in outcomes if isinstance(outcome, FailedBlock)]


def _losses(records: dict[BlockKey, BlockRecord]) -> pl.DataFrame:
    rows = [
        (key.layer, key.subblock, key.variant, point.step, point.loss)
        for key, record in records.items()
        for point in record.curve
    ]
    return pl.DataFrame(rows, schema=SCHEMAS[LOSSES], orient="row")


def _variant_table(records: dict[BlockKey, BlockRecord]) -> Table:
    groups: dict[tuple[str, str], list[BlockRecord]] = {}
    for key, record in records.items():
        groups.setdefault((key.subblock, key.variant), []).append(record)
    return Table.of(
        ("subblock", "variant", "num_layers", "median_initial_loss", "median_final_loss", "num_improved"),
        [
            (
                subblock,
                variant,
                len(group),
                round(statistics.median(record.initial_loss for record in group), 6),
                round(statistics.median(record.final_loss for record in group), 6),
                sum(record.final_loss < record.initial_loss for record in group),
            )
            for (subblock, variant), group in groups.items()
        ],
    )


def _layer_table(records: dict[BlockKey, BlockRecord]) -> Table:
    return Table.of(
        ("layer", "subblock", "variant", "initial_loss", "final_loss"),
        [
            (key.layer, key.subblock, key.variant, round(record.initial_loss, 6), round(record.final_loss, 6))
            for key, record in records.items()
        ],
    )
