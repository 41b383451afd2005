"""block_scores: replace-1-block measures of every composed block on the mixture's validation tokens.

It also says what scores of whole blocks were worth: how far their KL is from the sum of the scores of their halves.
And in which order whole layers may go, for the method drop_by_score, which knows no other block.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import polars as pl

from pipeline.artifacts import ArtifactStore
from pipeline.model.checkpoint import TORCH_DTYPES, load_model, read_architecture
from pipeline.puzzle.depth import depth_table, measure_depth
from pipeline.puzzle.devices import Ranks, num_threads, place
from pipeline.puzzle.divergence import Divergence
from pipeline.puzzle.initial import library_variants
from pipeline.puzzle.known_scores import (
    depth_fingerprints,
    known_among,
    read_known,
    score_fingerprints,
    write_known,
)
from pipeline.puzzle.library import content_hash_of, read_index
from pipeline.puzzle.score_table import joint_against_sums, score_table, write_scores
from pipeline.puzzle.scoring import LayerBlock, Scores, score_blocks
from pipeline.puzzle.search_space import resolve
from pipeline.puzzle.tables import DEPTH, write_table
from pipeline.report.drawings import draw_scores, save_figures
from pipeline.stage import WORK_DIR, Number, StageInputs, StageResult, Table
from pipeline.stages.configs import BlockScoresStage
from pipeline.stages.score_inputs import load_validation, score_functions


def run(config: BlockScoresStage, inputs: StageInputs, out_dir: Path) -> StageResult:
    """Write the scores, the order of layers, and known.json.

    scores.parquet has one row per layer and composed block, the parent's own with a KL of 0; depth.parquet one a layer.
    """
    architecture = read_architecture(inputs["parent_checkpoint"])
    space = resolve(config.search_space, architecture)
    settings = config.block_scores
    dtype, device = TORCH_DTYPES[settings.precision], Ranks().device
    index, store = read_index(inputs["block_library"]), ArtifactStore(inputs.store_root)
    text_hashes = {asset: content_hash_of(inputs[asset]) for asset in ("parent_checkpoint", "distillation_mix")}
    task_hashes = {"evaluation_sets": content_hash_of(inputs["evaluation_sets"])} if settings.task else {}
    fingerprints = score_fingerprints(space, index, upstream={**text_hashes, **task_hashes}, settings=settings)
    known_before = read_known(store)
    known = known_among(known_before, fingerprints)
    inputs.reporter.note(f"{len(fingerprints)} candidates wanted, {len(fingerprints) - len(known)} to score")
    parent = place(load_model(inputs["parent_checkpoint"], dtype=dtype), device)
    functions = score_functions(inputs, load_validation(inputs).take(settings.tokens), task=settings.task)
    with num_threads(inputs.execution.num_threads):
        scores = score_blocks(
            parent,
            space,
            library_variants(architecture, index=index, store=store, dtype=dtype, device=device),
            functions,
            work_dir=out_dir / WORK_DIR,
            max_activation_bytes=inputs.execution.max_activation_bytes,
            reporter=inputs.reporter,
            known=known,
        )

        def known_without(gone: Sequence[int]) -> dict[LayerBlock, Divergence]:
            names = depth_fingerprints(range(len(space.layers)), gone=gone, upstream=text_hashes, settings=settings)
            # The first step's are candidates where the space lets a layer go; the order knows nothing of a task.
            scored = {
                (one.layer, one.block.key): replace(one.divergence, task_error=None)
                for one in ([] if gone else scores.candidates)
                if (one.layer, one.block.key) in names
            }
            return known_among(known_before, names) | scored

        depth = measure_depth(
            parent,
            space.parent,
            functions[:1],  # on text; a task's items are many more tokens
            num_steps=settings.depth_steps,
            known=known_without,
            work_dir=out_dir / WORK_DIR,
            max_activation_bytes=inputs.execution.max_activation_bytes,
            reporter=inputs.reporter,
        )
    table = score_table(scores, space)
    out_dir.mkdir(parents=True, exist_ok=True)
    write_scores(out_dir, table)
    order = depth_table(depth)
    write_table(out_dir, DEPTH, order)
    found = {fingerprints[one.layer, one.block.key]: one.divergence for one in scores.candidates}
    for step in depth:
        names = depth_fingerprints(step.found, gone=step.gone, upstream=text_hashes, settings=settings)
        found |= {name: step.found[layer] for (layer, _), name in names.items()}
    write_known(out_dir, found)
    measured = [one.divergence for one in scores.candidates]
    measured += [divergence for step in depth if step.gone for divergence in step.found.values()]
    composed = joint_against_sums(table, space).filter(pl.col("joint").is_finite() & (pl.col("sum") > 0))
    return StageResult(
        metrics={
            "num_candidates": len(scores.candidates),
            "num_scored_candidates": len(scores.candidates) - len(known),
            "num_non_finite_scores": sum(not math.isfinite(one.kl) for one in measured),
            "num_tokens": scores.base.num_tokens,
            "parent_lm_loss": scores.base.lm_loss,
            **({} if scores.base.task_error is None else {"parent_task_error": scores.base.task_error}),
            **_ratios(composed),
        },
        figures=save_figures({"scores": draw_scores(table)}, out_dir=out_dir),
        tables={
            "kl_nats_per_token": _heat_map(scores),
            "by_block": _by_block(scores),
            **({} if composed.is_empty() else {"joint_against_sums": _composition(composed)}),
            "depth": _depth(order),
        },
    )


def _heat_map(scores: Scores) -> Table:
    """Return one row per layer and one column per composed block; a block that a layer may not become is empty."""
    columns = list(dict.fromkeys(one.block.key for one in scores.candidates))
    kl = {(one.layer, one.block.key): one.divergence.kl for one in scores.candidates}
    layers = sorted({one.layer for one in scores.candidates})
    return Table.of(
        ("layer", *columns), [(layer, *(_shown(kl.get((layer, key))) for key in columns)) for layer in layers]
    )


def _depth(table: pl.DataFrame) -> Table:
    """Return in which order layers go, and how far the model is without each and those that had gone before."""
    columns = ("place", "layer", "num_gone", "kl")
    rows = table.select(columns).rows()
    return Table.of(columns, [(place, layer, num_gone, _shown(kl)) for place, layer, num_gone, kl in rows])


def _by_block(scores: Scores) -> Table:
    groups: dict[str, list[float]] = {}
    for one in scores.candidates:
        groups.setdefault(one.block.key, []).append(one.divergence.kl)
    return Table.of(
        ("block", "num_layers", "lowest_kl", "median_kl", "highest_kl"),
        [
            (key, len(kls), _shown(min(kls)), _shown(statistics.median(kls)), _shown(max(kls)))
            for key, kls in groups.items()
        ],
    )


def _ratios(composed: pl.DataFrame) -> dict[str, Number]:
    """Return how the KL of a block with both halves replaced stands to the sum of each alone; empty without any."""
    if composed.is_empty():
        return {}
    ratio = composed["joint"] / composed["sum"]
    return {
        "num_joint_scores": len(ratio),
        "joint_over_sum_median": _quantile(ratio, 0.5),
        "joint_over_sum_p10": _quantile(ratio, 0.1),
        "joint_over_sum_p90": _quantile(ratio, 0.9),
    }


def _composition(composed: pl.DataFrame) -> Table:
    """Return the same by block, over the layers."""
    rows = []
    for (attention, ffn), group in composed.group_by("attention", "ffn", maintain_order=True):
        ratio = group["joint"] / group["sum"]
        medians = (_shown(_quantile(group[name], 0.5)) for name in ("joint", "sum"))
        ratios = (_shown(_quantile(ratio, share)) for share in (0.1, 0.5, 0.9))
        rows.append((f"{attention}+{ffn}", len(group), *medians, *ratios))
    columns = ("block", "num_layers", "median_joint_kl", "median_sum_of_kl", "ratio_p10", "ratio_median", "ratio_p90")
    return Table.of(columns, rows)


def _quantile(values: pl.Series, share: float) -> float:
    found = values.quantile(share, interpolation="linear")
    assert found is not None
    return float(found)


def _shown(value: float | None) -> float | None:
    return round(value, 5) if value is not None and math.isfinite(value) else None
