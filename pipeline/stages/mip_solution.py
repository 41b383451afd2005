"""mip_solution: one block per layer, the lowest predicted loss that meets every limit; and answers unlike it."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.costs import block_parameters
from pipeline.puzzle.batches import settled_profile
from pipeline.puzzle.calibration import PHASES
from pipeline.puzzle.predictions import headline_scenario
from pipeline.puzzle.score_table import read_scores
from pipeline.puzzle.search import (
    BatchSearch,
    SolutionPool,
    SolutionRecord,
    read_costs,
    search_batches,
    write_pool,
    write_solution,
)
from pipeline.report.drawings import save_figures
from pipeline.report.figures import architecture_strip
from pipeline.stage import Number, StageInputs, StageResult, Table
from pipeline.stages.configs import MipStage


def run(config: MipStage, inputs: StageInputs, out_dir: Path) -> StageResult:
    """Write solution.json, the best answer, and pool.json, all of them."""
    costs = read_costs(inputs["block_profile"], profile=config.profile)
    found = search_batches(
        read_scores(inputs["block_scores"]),
        costs=costs,
        target_name=config.target_name,
        requirements=config.requirements,
        settings=config.search,
        note=inputs.reporter.note,
    )
    records = found.records
    record = records[0]
    limits = tuple(one.limit for one in record.limits)
    profile = settled_profile(config.profile, limits)
    out_dir.mkdir(parents=True, exist_ok=True)
    write_solution(out_dir, record)
    write_pool(out_dir, SolutionPool(solutions=records))
    prefill, decode = (headline_scenario(limits, f"{phase}_speed", profile=profile) for phase in PHASES)
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
        **({} if found.chosen is None else {"batch_size": found.chosen.batch_size}),
    }
    return StageResult(
        metrics=metrics,
        facts={"status": record.status, "objective": f"sum of {record.objective_name}"},
        figures=save_figures({"architecture": architecture_strip(costs.parent, record.architecture)}, out_dir=out_dir),
        tables={
            "layers": layer_table(record),
            "limits": limit_table(record),
            "pool": _pool_table(records),
            **({} if found.chosen is None else {"batches": _batch_table(found, config)}),
        },
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


def _batch_table(found: BatchSearch, config: MipStage) -> Table:
    """Return what was found at each batch size; memory_mib includes activations, cached_tokens are the batch's own."""
    rows = []
    for one in found.batches:
        name, record = one.scenario.name, one.answer
        fit = None
        if record is not None:
            fit = next((limit.predicted for limit in record.limits if limit.limit.quantity == "cached_tokens"), None)
        rows.append(
            (
                one.scenario.batch_size,
                "infeasible" if record is None else record.status,
                one.scenario == found.chosen,
                None if record is None else round(record.objective, 5),
                None if record is None else round(one.tokens_per_s, 2),
                None if record is None else round(record.predicted[f"{name}_weights_and_cache_mib"], 1),
                None if record is None else round(record.predicted[f"{name}_memory_mib"], 1),
                one.scenario.num_tokens,
                None if fit is None else int(fit),
                one.reason,
            )
        )
    return Table.of(
        (
            "batch_size",
            "status",
            "is_chosen",
            f"sum_of_{config.search.objective}",
            "tokens_per_second",
            "weights_and_cache_mib",
            "memory_mib",
            "cached_tokens",
            "cached_tokens_that_fit",
            "reason",
        ),
        rows,
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
