"""dependency_matrix: how much each block of the child needs the blocks before it (FFN Fusion, section 3).

fused_checkpoint chooses its runs by it. The groups of full blocks that could run side by side (appendix B) are a table
and nothing more: no serving engine runs blocks of one model on separate devices.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import polars as pl

from pipeline.architecture import Architecture
from pipeline.data.packed import load_packed
from pipeline.model.checkpoint import TORCH_DTYPES, load_model, read_architecture
from pipeline.puzzle.dependency import Dependencies, measure_dependencies, parallel_groups
from pipeline.puzzle.devices import Ranks, num_threads, place
from pipeline.puzzle.tables import DEPENDENCIES, SCHEMAS, write_table
from pipeline.recipe import DependencyConfig
from pipeline.report.drawings import draw_dependencies, save_figures
from pipeline.stage import StageInputs, StageResult, Table


def run(config: DependencyConfig, inputs: StageInputs, out_dir: Path) -> StageResult:
    """Write dependencies.parquet: one row per pair of blocks, the earlier one removed."""
    child_dir = inputs["child_checkpoint"]
    architecture = read_architecture(child_dir)
    with num_threads(inputs.execution.num_threads):
        found = measure_dependencies(
            place(load_model(child_dir, dtype=TORCH_DTYPES[config.precision]), Ranks().device),
            load_packed(inputs["distillation_mix"], "validation").take(config.tokens),
            reporter=inputs.reporter,
        )
    rows = [(removed, layer, distance) for (removed, layer), distance in found.matrix.items()]
    table = pl.DataFrame(rows, schema=SCHEMAS[DEPENDENCIES], orient="row")
    write_table(out_dir, DEPENDENCIES, table)
    groups = parallel_groups(found, architecture)
    return StageResult(
        metrics={
            "num_pairs": len(found.matrix),
            "num_invalid_pairs": sum(not 0 <= distance <= 2 for distance in found.matrix.values()),
            "num_parallel_groups": len(groups),
            "num_tokens": found.num_tokens,
            **_extremes(found.matrix),
        },
        figures=save_figures({"dependencies": draw_dependencies(table, architecture)}, out_dir=out_dir),
        tables={
            "layers": _layers(found, architecture),
            "full_block_groups": Table.of(
                ("layers", "max_dependency", "sum_dependency"),
                [
                    (f"{one.layers[0]}-{one.layers[-1]}", _shown(one.max_dependency), _shown(one.sum_dependency))
                    for one in groups
                ],
            ),
        },
    )


def _extremes(matrix: Mapping[tuple[int, int], float]) -> dict[str, float]:
    """Return the range of the matrix; nothing for a child of fewer than two blocks."""
    if not matrix:
        return {}
    return {"min_dependency": min(matrix.values()), "max_dependency": max(matrix.values())}


def _layers(found: Dependencies, architecture: Architecture) -> Table:
    """Return one row per block: what it does to its input, and what its removal does to the next and to any block."""
    layers = list(found.layers)
    rows = []
    for index, (layer, geometry) in enumerate(found.layers.items()):
        behind = {later: found.matrix[layer, later] for later in layers[index + 1 :]}
        most = max(behind, key=lambda later, of=behind: of[later], default=None)
        rows.append(
            (
                layer,
                architecture.blocks[layer].key,
                _shown(geometry.update_norm_ratio),
                _shown(geometry.update_cosine_distance),
                _shown(geometry.output_cosine_distance),
                _shown(behind[layers[index + 1]]) if behind else None,
                _shown(behind[most]) if most is not None else None,
                most,
            )
        )
    return Table.of(
        (
            "layer",
            "block",
            "update_norm_ratio",
            "update_cosine_distance",
            "output_cosine_distance",
            "dependency_of_next_block",
            "max_dependency",
            "most_dependent_layer",
        ),
        rows,
    )


def _shown(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None
