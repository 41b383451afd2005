"""mip_solution: one block per layer, the lowest predicted loss that meets every limit; and answers unlike it."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.costs import block_parameters
from pipeline.puzzle.calibration import PHASES
from pipeline.puzzle.predictions import headline_scenario
from pipeline.puzzle.score_table import read_scores
from pipeline.puzzle.search import SolutionPool, SolutionRecord, read_costs, search, write_pool, write_solution
from pipeline.report.drawings import save_figures
from pipeline.report.figures import architecture_strip
from pipeline.stage import Number, StageInputs, StageResult, Table
from pipeline.stages.configs import MipStage


def run(config: MipStage, inputs: StageInputs, out_dir: Path) -> StageResult:
    """Write solution.json, the best answer, and pool.json, all of them."""
    costs = read_costs(inputs["block_profile"], profile=config.profile)
    records = search(
        read_scores(inputs["block_scores"]),
        costs=costs,
        target_name=config.target_name,
        requirements=config.requirements,
        settings=config.search,
    )
    record = records[0]
    out_dir.mkdir(parents=True, exist_ok=True)
    write_solution(out_dir, record)
    write_pool(out_dir, SolutionPool(solutions=records))
    prefill, decode = (
        headline_scenario(config.requirements.limits, f"{phase}_speed", profile=config.profile) for phase in PHASES
    )
    metrics: dict[str, Number] = {
        "predicted_decode_speedup": record.predicted[f"{decode}_decode_speedup"],
        "predicted_prefill_speedup": record.predicted[f"{prefill}_prefill_speedup"],
        f"predicted_{record.objective_name}": record.objective,
        "num_parameters": int(record.predicted["num_parameters"]),
        "kv_bytes_per_token": record.predicted["kv_bytes_per_token"],
        "num_attention_free_layers": int(record.predicted["num_attention_free_layers"]),
        "num_violated_limits": sum(not limit.is_met for limit in record.limits),
        "relative_gap": record.gap,
        "num_solutions": len(records),
    }
    return StageResult(
        metrics=metrics,
        facts={"status": record.status, "objective": f"sum of {record.objective_name}"},
        figures=save_figures({"architecture": architecture_strip(costs.parent, record.architecture)}, out_dir=out_dir),
        tables={"layers": layer_table(record), "limits": limit_table(record), "pool": _pool_table(records)},
    )


def limit_table(record: SolutionRecord) -> Table:
    """Return every limit with what is predicted, in the unit of its bound."""
    return Table.of(
        ("limit", "bound", "predicted", "is_met"),
        [(limit.name, limit.limit.bound, round(limit.predicted, 4), limit.is_met) for limit in record.limits],
    )


def layer_table(record: SolutionRecord) -> Table:
    """Return the chosen block of every layer."""
    return Table.of(
        ("layer", "attention", "ffn", f"{record.objective_name}_alone", "num_parameters"),
        [
            (
                layer,
                block.attention.key,
                block.ffn.key,
                round(score, 5),
                block_parameters(record.architecture, block),
            )
            for layer, (block, score) in enumerate(zip(record.blocks, record.layer_scores, strict=True))
        ],
    )


def _pool_table(records: Sequence[SolutionRecord]) -> Table:
    first = records[0].blocks
    return Table.of(
        ("solution", f"sum_of_{records[0].objective_name}", "num_layers_unlike_the_first", "num_parameters"),
        [
            (
                number,
                round(record.objective, 5),
                sum(block.key != other.key for block, other in zip(record.blocks, first, strict=True)),
                int(record.predicted["num_parameters"]),
            )
            for number, record in enumerate(records)
        ],
    )
