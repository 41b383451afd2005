"""mip_solution: one block per layer, the lowest predicted loss that meets every limit of the target."""

from pathlib import Path

from pipeline.costs import block_parameters
from pipeline.puzzle.predictions import SPEEDS, headline_scenario
from pipeline.puzzle.search import SolutionRecord, read_costs, read_scores, search, write_solution
from pipeline.report.drawings import save_figures
from pipeline.report.figures import architecture_strip
from pipeline.stage import Number, StageInputs, StageResult, Table
from pipeline.stages.configs import MipStage


def run(config: MipStage, inputs: StageInputs, out_dir: Path) -> StageResult:
    """Write solution.json."""
    costs = read_costs(inputs["block_profile"], profile=config.profile)
    record = search(
        read_scores(inputs["block_scores"]),
        costs=costs,
        target_name=config.target_name,
        requirements=config.requirements,
        settings=config.search,
    )
    out_dir.mkdir(parents=True, exist_ok=True)
    write_solution(out_dir, record)
    decode, prefill = (
        headline_scenario(config.requirements.limits, quantity, profile=config.profile) for quantity in SPEEDS
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
    }
    if record.greedy_objective is not None:
        metrics["greedy_objective"] = record.greedy_objective
    greedy = "met no choice of blocks" if record.greedy_objective is None else f"{record.greedy_objective:.4f}"
    return StageResult(
        metrics=metrics,
        facts={"status": record.status, "objective": f"sum of {record.objective_name}", "greedy baseline": greedy},
        figures=save_figures({"architecture": architecture_strip(costs.parent, record.architecture)}, out_dir=out_dir),
        tables={"layers": _layer_table(record), "limits": limit_table(record)},
    )


def limit_table(record: SolutionRecord) -> Table:
    """Return every limit with what is predicted, in the unit of its bound."""
    return Table.of(
        ("limit", "bound", "predicted", "is_met"),
        [(limit.name, limit.limit.bound, round(limit.predicted, 4), limit.is_met) for limit in record.limits],
    )


def _layer_table(record: SolutionRecord) -> Table:
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
