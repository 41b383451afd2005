"""Does a model do what was asked? A target's limits against measured times and counted sizes. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.architecture import Architecture
from pipeline.costs import BYTES_PER_PARAMETER, kv_bytes_per_token, num_parameters
from pipeline.puzzle.calibration import PHASES, Calibration, Phase, calibrate
from pipeline.puzzle.limits import (
    GB,
    LOWER_BOUNDS,
    SPEEDS,
    TIMED,
    cached_tokens,
    describe_limit,
    memory_of,
)
from pipeline.puzzle.measure import Measurements
from pipeline.puzzle.mip import VERIFICATION_TOLERANCE
from pipeline.puzzle.predictions import CostModel
from pipeline.puzzle.search import LimitRecord, SolutionRecord
from pipeline.recipe import Limit, ProfileConfig, Scenario

PARENT, CHILD = "parent", "child"


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedLimit:
    """One limit: predicted and measured in the unit of its bound. Counted quantities are their own measurement."""

    record: LimitRecord
    measured: float
    is_met: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredLimit:
    """One limit on a model that nobody predicted; `needs_tolerance` where a timing misses the bound itself."""

    name: str
    bound: float
    measured: float
    is_met: bool
    needs_tolerance: bool


def check_limits(
    record: SolutionRecord, measurements: Measurements, *, costs: CostModel, tolerance: float
) -> tuple[CheckedLimit, ...]:
    """Compare every limit with what was measured; timings may miss their bound by the share `tolerance`."""
    return tuple(_check(limit, measurements, costs=costs, tolerance=tolerance) for limit in record.limits)


def check_model(
    limits: Sequence[Limit],
    measurements: Measurements,
    *,
    model: str,
    architecture: Architecture,
    parent: Architecture,
    profile: ProfileConfig,
    tolerance: float,
) -> tuple[MeasuredLimit, ...]:
    """Compare every limit with what the named model was measured to do, and with what its own architecture holds."""
    found = []
    for limit in limits:
        scenario = next((one for one in profile.scenarios if one.name == limit.scenario), None)
        measured = None if scenario is None else _timed(limit, measurements, model=model, scenario=scenario)
        allowed = tolerance
        if measured is None:
            measured = _counted(limit, architecture, scenario=scenario, profile=profile)
            if limit.relative_to == "parent":
                measured /= _counted(limit, parent, scenario=scenario, profile=profile)
            allowed = VERIFICATION_TOLERANCE
        is_met = _meets(limit, measured, tolerance=allowed)
        found.append(
            MeasuredLimit(
                name=describe_limit(limit),
                bound=limit.bound,
                measured=measured,
                is_met=is_met,
                needs_tolerance=is_met and not _meets(limit, measured, tolerance=VERIFICATION_TOLERANCE),
            )
        )
    return tuple(found)


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
    scenario = None if limit.scenario is None else costs.scenario(limit.scenario)
    measured = None if scenario is None else _timed(limit, measurements, model=CHILD, scenario=scenario)
    if measured is None:
        return CheckedLimit(record=record, measured=record.predicted, is_met=record.is_met)
    return CheckedLimit(record=record, measured=measured, is_met=_meets(limit, measured, tolerance=tolerance))


def _meets(limit: Limit, value: float, *, tolerance: float) -> bool:
    if limit.quantity in LOWER_BOUNDS:
        return value >= limit.bound * (1 - tolerance)
    return value <= limit.bound * (1 + tolerance)


def _timed(limit: Limit, measurements: Measurements, *, model: str, scenario: Scenario) -> float | None:
    """Return a timed quantity in the unit of its bound, None for a counted one."""
    if limit.quantity not in TIMED:
        return None
    is_relative = limit.relative_to == "parent"
    if limit.quantity in ("decode_speed", "prefill_speed"):
        phase: Phase = "decode" if limit.quantity == "decode_speed" else "prefill"
        if is_relative:
            return measurements.speedup(model, scenario.name, phase, over=PARENT).median
        return measurements.tokens_per_second(model, scenario, phase).median
    generated = 0 if limit.quantity == "time_to_first_token_ms" else scenario.generation_tokens
    time_ms, parent_ms = (
        measurements.median_ms(one, scenario.name, "prefill")
        + generated * measurements.median_ms(one, scenario.name, "decode")
        for one in (model, PARENT)
    )
    if limit.quantity in SPEEDS:
        return parent_ms / time_ms if is_relative else 1000.0 * scenario.num_tokens / time_ms
    return time_ms / parent_ms if is_relative else time_ms


def _counted(limit: Limit, architecture: Architecture, *, scenario: Scenario | None, profile: ProfileConfig) -> float:
    if scenario is not None:
        memory = memory_of(architecture, scenario=scenario, profile=profile)
        return memory.total_mib if limit.quantity == "memory_mib" else memory.weights_and_cache_mib
    if limit.quantity == "num_parameters":
        return num_parameters(architecture)
    size, num_devices = BYTES_PER_PARAMETER[profile.served_precision], profile.num_devices
    kv_bytes = kv_bytes_per_token(architecture, bytes_per_value=size, num_devices=num_devices)
    if limit.device_memory_gb is None:
        return kv_bytes
    weights_bytes = size * num_parameters(architecture, num_devices=num_devices)
    return cached_tokens(limit.device_memory_gb * GB, weights_bytes=weights_bytes, kv_bytes_per_token=kv_bytes)
