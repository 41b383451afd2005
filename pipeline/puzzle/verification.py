"""Does the assembled child do what was asked? A target's limits against measured times and counted sizes. Pure."""

from dataclasses import dataclass

from pipeline.puzzle.calibration import PHASES, Calibration, Phase, calibrate
from pipeline.puzzle.measure import Measurements
from pipeline.puzzle.predictions import CostModel
from pipeline.puzzle.search import LimitRecord, SolutionRecord
from pipeline.recipe import Limit, Scenario

PARENT, CHILD = "parent", "child"


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedLimit:
    """One limit: predicted and measured in the unit of its bound. Counted quantities are their own measurement."""

    record: LimitRecord
    measured: float
    is_met: bool


def check_limits(
    record: SolutionRecord, measurements: Measurements, *, costs: CostModel, tolerance: float
) -> tuple[CheckedLimit, ...]:
    """Compare every limit with what was measured; timings may miss their bound by the share `tolerance`."""
    return tuple(_check(limit, measurements, costs=costs, tolerance=tolerance) for limit in record.limits)


def recalibrate(record: SolutionRecord, measurements: Measurements, *, costs: CostModel) -> Calibration:
    """Return the calibration under which the measured child's prediction is its measurement."""
    keys: list[tuple[str, Phase]] = [(scenario.name, phase) for scenario in costs.profile.scenarios for phase in PHASES]
    return calibrate(
        sum_ms={key: costs.sum_ms(record.blocks, *key) for key in keys},
        measured_ms={key: measurements.median_ms(CHILD, *key) for key in keys},
        parent_ms={key: measurements.median_ms(PARENT, *key) for key in keys},
    )


def _check(record: LimitRecord, measurements: Measurements, *, costs: CostModel, tolerance: float) -> CheckedLimit:
    limit = record.limit
    if limit.quantity in ("decode_speed", "prefill_speed"):
        phase: Phase = "decode" if limit.quantity == "decode_speed" else "prefill"
        measured = _speed(limit, measurements, scenario=_scenario(limit, costs), phase=phase)
        return CheckedLimit(record=record, measured=measured, is_met=measured >= limit.bound * (1 - tolerance))
    if limit.quantity == "latency_ms":
        measured = _latency(limit, measurements, scenario=_scenario(limit, costs))
        return CheckedLimit(record=record, measured=measured, is_met=measured <= limit.bound * (1 + tolerance))
    return CheckedLimit(record=record, measured=record.predicted, is_met=record.is_met)


def _speed(limit: Limit, measurements: Measurements, *, scenario: Scenario, phase: Phase) -> float:
    if limit.relative_to == "parent":
        return measurements.speedup(CHILD, scenario.name, phase, over=PARENT).median
    return measurements.tokens_per_second(CHILD, scenario, phase).median


def _latency(limit: Limit, measurements: Measurements, *, scenario: Scenario) -> float:
    def of(model: str) -> float:
        prefill_ms = measurements.median_ms(model, scenario.name, "prefill")
        return prefill_ms + scenario.generation_tokens * measurements.median_ms(model, scenario.name, "decode")

    return of(CHILD) / of(PARENT) if limit.relative_to == "parent" else of(CHILD)


def _scenario(limit: Limit, costs: CostModel) -> Scenario:
    assert limit.scenario is not None  # the recipe's own check: every measured quantity names one
    return costs.scenario(limit.scenario)
