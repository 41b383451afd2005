"""child_checkpoint: the child assembled from the library and measured against its parent, in turn.

Short of the target, the measured child sets the calibration and the programme over the refined scores is solved again
near the model they are around, at most `search.max_recalibrations` times; the last child that was assembled stays.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.artifacts import ArtifactStore, write_atomically
from pipeline.errors import InfeasibleError
from pipeline.hardware import describe_hardware
from pipeline.model.checkpoint import TORCH_DTYPES, load_model
from pipeline.puzzle.assemble import assemble_child
from pipeline.puzzle.backends import measure_as_profiled, runtime_name
from pipeline.puzzle.batches import settle
from pipeline.puzzle.calibration import PHASES
from pipeline.puzzle.devices import Ranks, place
from pipeline.puzzle.library import read_index
from pipeline.puzzle.measure import Measurements
from pipeline.puzzle.predictions import headline_scenario
from pipeline.puzzle.programme import OutOfTimeError
from pipeline.puzzle.refinement import search_again
from pipeline.puzzle.score_table import read_scores
from pipeline.puzzle.search import (
    SolutionRecord,
    read_costs,
    read_solution,
    recalibrated,
    write_solution,
)
from pipeline.puzzle.verification import CHILD, PARENT, CheckedLimit, check_limits, recalibrate
from pipeline.recipe import PoolConfig
from pipeline.report.drawings import save_figures
from pipeline.report.figures import architecture_strip
from pipeline.stage import VIEW_DIR, WORK_DIR, Number, StageInputs, StageResult, Table
from pipeline.stages.configs import ChildStage

SEARCH_LOG = "search_log.json"
ONE_ANSWER = PoolConfig(num_solutions=1, max_overlap=0.0)


def run(config: ChildStage, inputs: StageInputs, out_dir: Path) -> StageResult:
    """Write the child's checkpoint, the solution it is of, and the log of the search."""
    dtype, device = TORCH_DTYPES[config.profile.precision], Ranks().device
    record = read_solution(inputs["refined_solution"])
    requirements, costs = settle(
        config.requirements,
        read_costs(inputs["block_profile"], profile=config.profile),
        [one.limit for one in record.limits],
    )
    # From here on, at the batch that the search chose: others are neither measured nor searched again.
    config = config.model_copy(update={"requirements": requirements, "profile": costs.profile})
    scores, index = read_scores(inputs["refined_solution"]), read_index(inputs["block_library"])
    parent_dir = inputs["parent_checkpoint"]
    parent = place(load_model(parent_dir, dtype=dtype), device)
    log: list[dict[str, Any]] = []
    while True:
        assemble_child(
            out_dir, record.blocks, parent_dir=parent_dir, index=index, store=ArtifactStore(inputs.store_root)
        )
        measurements = measure_as_profiled(
            {PARENT: parent, CHILD: place(load_model(out_dir, dtype=dtype), device)},
            profile=config.profile,
            scenarios=config.profile.scenarios,
            measurement=config.measurement,
            work_dir=out_dir / WORK_DIR,
            reporter=inputs.reporter,
        )
        checked = check_limits(record, measurements, costs=costs, tolerance=config.search.speed_tolerance)
        log.append(_log_entry(record, checked))
        missed = [limit.record.name for limit in checked if not limit.is_met]
        # Times of a named device, which need not be the one at hand, stay.
        if not missed or not config.profile.is_of_this_machine or len(log) > config.search.max_recalibrations:
            break
        inputs.reporter.note(f"measured short of {'; '.join(missed)}: calibrating on this child and solving again")
        costs = recalibrated(costs, recalibrate(record, measurements, costs=costs))
        try:
            record = search_again(
                scores,
                costs=costs,
                target_name=config.target_name,
                requirements=config.requirements,
                settings=config.search.model_copy(update={"pool": ONE_ANSWER}),
                note=inputs.reporter.note,
            )
        except (InfeasibleError, OutOfTimeError) as err:
            # The child at hand is the best answer there is; the check on num_missed_limits tells of it.
            log.append({"infeasible": str(err)})
            inputs.reporter.note(str(err))
            break
    write_solution(out_dir, record)
    write_atomically(out_dir / VIEW_DIR / SEARCH_LOG, (json.dumps(log, indent=1) + "\n").encode())
    result = _result(config, record, measurements, checked, log)
    strip = architecture_strip(costs.parent, record.architecture)
    return result.model_copy(update={"figures": save_figures({"architecture": strip}, out_dir=out_dir)})


def _result(
    config: ChildStage,
    record: SolutionRecord,
    measurements: Measurements,
    checked: tuple[CheckedLimit, ...],
    log: list[dict[str, Any]],
) -> StageResult:
    metrics: dict[str, Number] = {
        "num_missed_limits": sum(not limit.is_met for limit in checked),
        "num_recalibrations": sum("limits" in entry for entry in log) - 1,
        "num_parameters": int(record.predicted["num_parameters"]),
        "num_attention_free_layers": int(record.predicted["num_attention_free_layers"]),
        f"predicted_{record.objective_name}": record.objective,
    }
    for phase in PHASES:
        name = headline_scenario(config.requirements.limits, f"{phase}_speed", profile=config.profile)
        scenario = next(one for one in config.profile.scenarios if one.name == name)
        metrics[f"predicted_{phase}_speedup"] = record.predicted[f"{name}_{phase}_speedup"]
        metrics[f"measured_{phase}_speedup"] = measurements.speedup(CHILD, name, phase, over=PARENT).median
        for model in (PARENT, CHILD):
            speed = measurements.tokens_per_second(model, scenario, phase)
            metrics[f"{model}_{phase}_tokens_per_second"] = speed.median
    return StageResult(
        metrics=metrics,
        facts={
            "runtime": runtime_name(config.profile),
            "dtype": config.profile.precision,
            "threads": str(config.profile.num_threads),
            "hardware": describe_hardware(),
            "status": record.status,
        },
        tables={
            "limits": _limit_table(checked),
            "speed": _speed_table(config, record, measurements),
            "search": _search_table(log),
            "layers": Table.of(
                ("layer", "attention", "ffn", f"{record.objective_name}_alone"),
                [
                    (layer, block.attention.key, block.ffn.key, round(score, 5))
                    for layer, (block, score) in enumerate(zip(record.blocks, record.layer_scores, strict=True))
                ],
            ),
        },
    )


def _log_entry(record: SolutionRecord, checked: tuple[CheckedLimit, ...]) -> dict[str, Any]:
    return {
        "objective": record.objective,
        "blocks": [block.key for block in record.blocks],
        "limits": [
            {
                "limit": limit.record.name,
                "predicted": limit.record.predicted,
                "measured": limit.measured,
                "is_met": limit.is_met,
            }
            for limit in checked
        ],
    }


def _limit_table(checked: tuple[CheckedLimit, ...]) -> Table:
    return Table.of(
        ("limit", "bound", "predicted", "measured", "is_met"),
        [
            (
                limit.record.name,
                limit.record.limit.bound,
                round(limit.record.predicted, 4),
                round(limit.measured, 4),
                limit.is_met,
            )
            for limit in checked
        ],
    )


def _speed_table(config: ChildStage, record: SolutionRecord, measurements: Measurements) -> Table:
    rows = []
    for scenario in config.profile.scenarios:
        for phase in PHASES:
            speed = {model: measurements.tokens_per_second(model, scenario, phase).median for model in (PARENT, CHILD)}
            interval = asdict(measurements.speedup(CHILD, scenario.name, phase, over=PARENT))
            rows.append(
                (
                    scenario.name,
                    phase,
                    round(speed[PARENT], 2),
                    round(speed[CHILD], 2),
                    round(record.predicted[f"{scenario.name}_{phase}_speedup"], 3),
                    *(round(interval[name], 3) for name in ("median", "low", "high")),
                    interval["num_samples"],
                )
            )
    return Table.of(
        (
            "scenario",
            "phase",
            "parent_tokens_per_second",
            "child_tokens_per_second",
            "predicted_speedup",
            "measured_speedup",
            "speedup_low",
            "speedup_high",
            "num_rounds",
        ),
        rows,
    )


def _search_table(log: list[dict[str, Any]]) -> Table:
    rows = [
        (attempt, round(entry["objective"], 5), limit["limit"], limit["predicted"], limit["measured"], limit["is_met"])
        for attempt, entry in enumerate(log)
        if "limits" in entry
        for limit in entry["limits"]
    ]
    return Table.of(("attempt", "objective", "limit", "predicted", "measured", "is_met"), rows)
