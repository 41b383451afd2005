"""block_library: every alternative subblock of every layer, trained by block-wise local distillation.

Only blocks that the store does not hold yet are trained. Several ranks split the parent's layers, and with them the
blocks, and pass activations on; where not all blocks of a rank fit its memory they are trained in rounds. A block's
weights are the same however it came about, and rank 0 writes the index.
"""

import json
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import polars as pl

from pipeline.architecture import Architecture
from pipeline.artifacts import ArtifactStore
from pipeline.costs import MIB
from pipeline.data.packed import load_packed
from pipeline.errors import StageError
from pipeline.model.checkpoint import TORCH_DTYPES, TensorReader, load_layers, read_architecture
from pipeline.puzzle.bld import FailedBlock, TrainedBlock, train_blocks
from pipeline.puzzle.bld_cost import (
    bounded_rounds,
    flops_of_separate_runs,
    flops_per_token,
    layer_costs,
    parent_flops_per_token,
    split_layers,
    training_flops_per_token,
)
from pipeline.puzzle.bld_state import saved_step
from pipeline.puzzle.block_keys import BlockKey, library_keys
from pipeline.puzzle.devices import Ranks, matmul_peak, num_threads
from pipeline.puzzle.importance import load_importance
from pipeline.puzzle.library import (
    BLOCK_ASSET,
    BlockRecord,
    block_fingerprint,
    build_index,
    content_hash_of,
    publish_block,
    read_record,
    trained_entry,
    write_index,
)
from pipeline.puzzle.parent_layers import ParentLayers
from pipeline.puzzle.search_space import resolve
from pipeline.puzzle.tables import LOSSES, SCHEMAS, write_table
from pipeline.report.drawings import draw_library, save_figures
from pipeline.stage import WORK_DIR, StageInputs, StageResult, Table
from pipeline.stages.configs import BlockLibraryStage
from pipeline.training.distributed import LONGEST_CACHE_S, barrier, gather_across_ranks, told_by_rank_0

UPSTREAM = ("parent_checkpoint", "distillation_mix", "channel_importance")


def run(config: BlockLibraryStage, inputs: StageInputs, out_dir: Path) -> StageResult:
    """Train the missing blocks and write index.json and losses.parquet."""
    ranks = Ranks()
    store = ArtifactStore(inputs.store_root)
    architecture = read_architecture(inputs["parent_checkpoint"])
    space = resolve(config.search_space, architecture)
    upstream = {asset: content_hash_of(inputs[asset]) for asset in UPSTREAM}
    wanted = {
        key: block_fingerprint(key, upstream=upstream, settings=config.block_library)
        for key in library_keys(space, config.block_library)
    }
    missing = _missing(wanted, store, ranks)
    inputs.reporter.note(f"{len(wanted)} blocks wanted, {len(missing)} to train")
    training = _Training(ranks=ranks, store=store, config=config, inputs=inputs, architecture=architecture)
    if missing:
        with num_threads(inputs.execution.num_threads):
            training.run(wanted, missing, work_dir=out_dir / WORK_DIR)
    if ranks.rank != 0:
        return StageResult()

    artifacts = {key: store.find(BLOCK_ASSET, block_id) for key, block_id in wanted.items()}
    found = {key: artifact for key, artifact in artifacts.items() if artifact is not None}
    index = build_index(
        space, config.block_library, trained={key: trained_entry(artifact) for key, artifact in found.items()}
    )
    records = {key: read_record(artifact) for key, artifact in found.items()}
    out_dir.mkdir(parents=True, exist_ok=True)
    write_index(out_dir, index)
    losses = _losses(records)
    write_table(out_dir, LOSSES, losses)
    failed = [key for key in wanted if key not in found]
    improved = [record.final_loss < record.initial_loss for record in records.values()]
    size_bytes = sum(entry.size_bytes for artifact in found.values() for entry in artifact.manifest.files.values())
    return StageResult(
        metrics={
            "num_blocks": len(wanted),
            "num_trained_blocks": len(missing),
            "num_failed_blocks": len(failed),
            "share_of_blocks_improved": statistics.fmean(improved) if improved else 1.0,
            "num_tokens": config.block_library.tokens,
            "blocks_mib": round(size_bytes / MIB, 1),
            **training.cost_metrics(list(missing)),
        },
        facts={f"failed: {key}": training.reasons[str(key)] for key in failed},
        figures=save_figures({"library": draw_library(losses)} if records else {}, out_dir=out_dir),
        tables={"variants": _variant_table(records), "layers": _layer_table(records)},
    )


def _missing(wanted: Mapping[BlockKey, str], store: ArtifactStore, ranks: Ranks) -> dict[BlockKey, str]:
    """Return the blocks that the store does not hold, as rank 0 finds it: others might look a moment later."""
    held = sorted(block_id for block_id in wanted.values() if store.find(BLOCK_ASSET, block_id) is not None)
    if ranks.size > 1:
        held = json.loads(told_by_rank_0(json.dumps(held)))
    return {key: block_id for key, block_id in wanted.items() if block_id not in held}


def _wait_for_one_view(directory: Path, fingerprints: Sequence[str], ranks: Ranks) -> None:
    """Wait until all ranks see the same progress on disk: a disk of the network shows nodes new files one by one."""
    ends_at = time.monotonic() + LONGEST_CACHE_S
    while ranks.size > 1:
        views = gather_across_ranks(str(saved_step(directory, fingerprints)))
        if len(set(views)) == 1:
            return
        if time.monotonic() > ends_at:
            raise StageError(
                f"ranks see different progress in {directory}; the last step saved, rank by rank: {', '.join(views)}: "
                "put the store on a disk that all nodes share"
            )
        time.sleep(1.0)


class _Training:
    """The training of all missing blocks on all ranks, round by round, and what it cost."""

    def __init__(
        self,
        *,
        ranks: Ranks,
        store: ArtifactStore,
        config: BlockLibraryStage,
        inputs: StageInputs,
        architecture: Architecture,
    ) -> None:
        self.reasons: dict[str, str] = {}
        self._ranks, self._store, self._inputs, self._architecture = ranks, store, inputs, architecture
        self._settings = config.block_library
        self._train = load_packed(inputs["distillation_mix"], "train").take(self._settings.tokens)
        self._flops = self._seconds = self._flops_per_token = 0.0

    def run(self, wanted: Mapping[BlockKey, str], missing: Mapping[BlockKey, str], *, work_dir: Path) -> None:
        """Train and publish everything missing.

        Layers and rounds are cut by what is wanted, whatever is missing of it, so that a run that was killed finds the
        progress of its last round.
        """
        costs = layer_costs(self._architecture, wanted, context_tokens=self._train.sequence_length)
        stretches = split_layers(costs[: max(key.layer for key in wanted) + 1], self._ranks.size)
        max_gib = self._inputs.execution.block_memory_gib
        by_rank = [
            bounded_rounds(
                self._architecture,
                [key for key in wanted if key.layer in stretch],
                max_bytes=None if max_gib is None else max_gib * 2**30,
                has_closed_form=self._settings.closed_form_tokens > 0,
            )
            for stretch in stretches
        ]
        rounds = [
            [key for keys in one for key in keys if key in missing] for one in zip_longest(*by_rank, fillvalue=())
        ]
        parent = self._parent(stretches)
        for number, keys in enumerate(rounds, start=1):
            if not keys:
                continue
            if len(rounds) > 1:
                self._inputs.reporter.note(f"round {number} of {len(rounds)}: {len(keys)} blocks")
            self._flops_per_token += flops_per_token(
                self._architecture, keys, context_tokens=self._train.sequence_length
            )
            directory = work_dir / f"bld-{number}"
            _wait_for_one_view(directory, [missing[key] for key in keys], self._ranks)
            if parent is not None:
                self._train_round(parent, {key: missing[key] for key in keys}, directory)
            if self._ranks.size > 1:
                barrier()
            if self._ranks.rank == 0:
                shutil.rmtree(directory, ignore_errors=True)
        if self._ranks.size > 1:
            for told in gather_across_ranks(json.dumps(self.reasons)):
                self.reasons |= json.loads(told)

    def _parent(self, stretches: Sequence[range]) -> ParentLayers | None:
        """Load this rank's layers; None when there are more ranks than layers."""
        rank = self._ranks.rank
        if rank >= len(stretches):
            return None
        return ParentLayers(
            model=load_layers(
                self._inputs["parent_checkpoint"],
                stretches[rank],
                dtype=TORCH_DTYPES[self._settings.precision],
                device=self._ranks.device,
            ),
            layers=stretches[rank],
            device=self._ranks.device,
            previous_rank=rank - 1 if rank > 0 else None,
            next_rank=rank + 1 if rank + 1 < len(stretches) else None,
        )

    def _train_round(self, parent: ParentLayers, blocks: Mapping[BlockKey, str], work_dir: Path) -> None:
        training = train_blocks(
            parent,
            blocks,
            parent_tensors=TensorReader(self._inputs["parent_checkpoint"]),
            importance=load_importance(self._inputs["channel_importance"]),
            train=self._train,
            validation=load_packed(self._inputs["distillation_mix"], "validation"),
            settings=self._settings,
            work_dir=work_dir,
            max_activation_bytes=self._inputs.execution.max_activation_bytes,
            checkpoint_interval_steps=self._inputs.execution.checkpoint_interval_steps,
            reporter=self._inputs.reporter,
        )
        for outcome in training.outcomes:
            if isinstance(outcome, TrainedBlock):
                publish_block(
                    self._store,
                    blocks[outcome.key],
                    tensors=outcome.tensors,
                    record=outcome.record,
                    wall_s=training.seconds / len(training.outcomes),
                )
            else:
                assert isinstance(outcome, FailedBlock)
                self.reasons[str(outcome.key)] = outcome.reason
        length = self._train.sequence_length
        stop = max(key.layer for key in blocks) + 1
        per_token = training_flops_per_token(
            self._architecture, [outcome.key for outcome in training.outcomes], context_tokens=length
        ) + parent_flops_per_token(self._architecture, num_layers=len(parent.until(stop)), context_tokens=length)
        self._flops += per_token * training.num_steps * self._settings.batch_size * length
        self._seconds += training.seconds

    def cost_metrics(self, trained: Sequence[BlockKey]) -> dict[str, float]:
        """Return what this rank computed per second, what matrix products alone reach on its device, and what is saved.

        That is over all ranks: the FLOPs of runs for each variant, and for each block, over those of this one, in which
        the parent runs once a round.
        """
        if not self._flops:
            return {}
        peak = matmul_peak(
            self._architecture,
            num_tokens=self._settings.batch_size * self._train.sequence_length,
            dtype=TORCH_DTYPES[self._settings.precision],
            device=self._ranks.device,
        )
        achieved = self._flops / self._seconds
        per_variant, per_block = flops_of_separate_runs(
            self._architecture, trained, context_tokens=self._train.sequence_length
        )
        return {
            "training_s": round(self._seconds, 1),
            "achieved_gflops_per_s": float(f"{achieved / 1e9:.4g}"),
            "matmul_peak_gflops_per_s": float(f"{peak / 1e9:.4g}"),
            "share_of_matmul_peak": float(f"{achieved / peak:.4g}"),
            "flops_of_runs_per_variant_over_this": round(per_variant / self._flops_per_token, 3),
            "flops_of_runs_per_block_over_this": round(per_block / self._flops_per_token, 3),
        }


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
