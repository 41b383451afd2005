"""block_scores: replace-1-block KL and LM loss of every composed block on the mixture's validation tokens."""

import math
import statistics
from pathlib import Path

from pipeline.artifacts import ArtifactStore
from pipeline.data.packed import load_packed
from pipeline.model.checkpoint import TORCH_DTYPES, load_model, read_architecture
from pipeline.puzzle.devices import Ranks, num_threads, place
from pipeline.puzzle.initial import library_variants
from pipeline.puzzle.library import read_index
from pipeline.puzzle.score_table import score_table, write_scores
from pipeline.puzzle.scoring import Scores, score_blocks
from pipeline.puzzle.search_space import resolve
from pipeline.report.drawings import draw_scores, save_figures
from pipeline.stage import WORK_DIR, StageInputs, StageResult, Table
from pipeline.stages.configs import BlockScoresStage


def run(config: BlockScoresStage, inputs: StageInputs, out_dir: Path) -> StageResult:
    """Write scores.parquet: one row per layer and composed block, the parent's own with a KL of 0."""
    architecture = read_architecture(inputs["parent_checkpoint"])
    space = resolve(config.search_space, architecture)
    dtype, device = TORCH_DTYPES[config.block_scores.precision], Ranks().device
    index, store = read_index(inputs["block_library"]), ArtifactStore(inputs.store_root)

    with num_threads(inputs.execution.num_threads):
        scores = score_blocks(
            place(load_model(inputs["parent_checkpoint"], dtype=dtype), device),
            space,
            library_variants(architecture, index=index, store=store, dtype=dtype, device=device),
            load_packed(inputs["distillation_mix"], "validation").take(config.block_scores.tokens),
            work_dir=out_dir / WORK_DIR,
            reporter=inputs.reporter,
        )
    table = score_table(scores, space)
    out_dir.mkdir(parents=True, exist_ok=True)
    write_scores(out_dir, table)
    num_non_finite = sum(not math.isfinite(one.divergence.kl) for one in scores.candidates)
    return StageResult(
        metrics={
            "num_candidates": len(scores.candidates),
            "num_non_finite_scores": num_non_finite,
            "num_tokens": scores.base.num_tokens,
            "parent_lm_loss": scores.base.lm_loss,
        },
        figures=save_figures({"scores": draw_scores(table)}, out_dir=out_dir),
        tables={"kl_nats_per_token": _heat_map(scores), "by_block": _by_block(scores)},
    )


def _heat_map(scores: Scores) -> Table:
    """Return one row per layer and one column per composed block; a block that a layer may not become is empty."""
    columns = list(dict.fromkeys(one.block.key for one in scores.candidates))
    kl = {(one.layer, one.block.key): one.divergence.kl for one in scores.candidates}
    layers = sorted({one.layer for one in scores.candidates})
    return Table.of(
        ("layer", *columns), [(layer, *(_shown(kl.get((layer, key))) for key in columns)) for layer in layers]
    )


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


def _shown(value: float | None) -> float | None:
    return round(value, 5) if value is not None and math.isfinite(value) else None
