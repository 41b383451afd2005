"""speed_report: parent, child and final checkpoint measured in turn, and what their weights and caches hold.

The final checkpoint is held to the target's limits: it is what leaves the pipeline, and fusion changed the child. The
limits are measured in the profile's runtime; the same models are timed beside it in every other that the recipe lists,
and in each at several depths.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pipeline.artifacts import write_atomically
from pipeline.costs import BYTES_PER_PARAMETER, MIB, kv_bytes_per_token, num_parameters, weight_mib
from pipeline.errors import RecipeError
from pipeline.hardware import describe_hardware
from pipeline.model.checkpoint import TORCH_DTYPES, load_model
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.puzzle.backends import RUNTIME_NAMES, measure_in, runtime_name
from pipeline.puzzle.batches import settled_limits, settled_profile
from pipeline.puzzle.calibration import PHASES
from pipeline.puzzle.devices import Ranks, place
from pipeline.puzzle.limits import memory_of
from pipeline.puzzle.measure import Measurements
from pipeline.puzzle.predictions import headline_scenario
from pipeline.puzzle.search import read_solution
from pipeline.puzzle.verification import MeasuredLimit, check_model
from pipeline.recipe import Backend, Scenario
from pipeline.stage import WORK_DIR, Number, StageInputs, StageResult, Table
from pipeline.stages.configs import SpeedStage

MODELS = {"parent": "parent_checkpoint", "child": "child_checkpoint", "final": "rl_checkpoint"}
GIB = 2**30


def run(config: SpeedStage, inputs: StageInputs, out_dir: Path) -> StageResult:
    """Write speed.json: every median with its interval, the memory of each model, and the limits of the target."""
    dtype, device = TORCH_DTYPES[config.profile.precision], Ranks().device
    models = {name: place(load_model(inputs[asset], dtype=dtype), device) for name, asset in MODELS.items()}
    _require_context(models["parent"], config=config)
    solution = read_solution(inputs["child_checkpoint"])
    limits = settled_limits(config.limits, config.profile, [one.limit for one in solution.limits])
    config = config.model_copy(update={"limits": limits, "profile": settled_profile(config.profile, limits)})
    scenarios = (*config.profile.scenarios, *config.speed.depth_scenarios)
    by_backend: dict[Backend, Measurements] = {
        backend: measure_in(
            backend,
            models,
            profile=config.profile,
            scenarios=scenarios,
            measurement=config.speed.measurement,
            work_dir=out_dir / WORK_DIR,
            reporter=inputs.reporter,
        )
        for backend in config.speed.backends
    }
    measurements = by_backend[config.profile.measured_in]
    speed_rows = [
        row for backend, found in by_backend.items() for row in _speed_rows(found, backend=backend, scenarios=scenarios)
    ]
    cache_rows = [row for backend, found in by_backend.items() for row in _cache_rows(found, backend=backend)]
    memory_rows = [_memory_row(name, model, config=config) for name, model in models.items()]
    checked = check_model(
        config.limits,
        measurements,
        model="final",
        architecture=models["final"].architecture,
        parent=models["parent"].architecture,
        profile=config.profile,
        tolerance=config.speed_tolerance,
    )
    out_dir.mkdir(parents=True, exist_ok=True)
    report = {
        "backend_of_limits": config.profile.measured_in,
        "speed": speed_rows,
        "cache": cache_rows,
        "memory": memory_rows,
        "limits": [asdict(limit) for limit in checked],
    }
    write_atomically(out_dir / "speed.json", (json.dumps(report, indent=1) + "\n").encode())
    metrics: dict[str, Number] = {
        "num_rounds": config.speed.rounds,
        "num_limits": len(checked),
        "num_missed_limits": sum(not limit.is_met for limit in checked),
        "num_limits_within_tolerance": sum(limit.needs_tolerance for limit in checked),
        "speed_tolerance": config.speed_tolerance,
    }
    headline = {phase: headline_scenario(config.limits, f"{phase}_speed", profile=config.profile) for phase in PHASES}
    coverage = measurements.speedup("final", headline["decode"], "decode", over="parent").coverage
    for phase in PHASES:
        interval = measurements.speedup("final", headline[phase], phase, over="parent")
        metrics |= {
            f"{phase}_speedup": interval.median,
            f"{phase}_speedup_low": interval.low,
            f"{phase}_speedup_high": interval.high,
        }
    for row in memory_rows:
        metrics[f"{row['model']}_weights_mib"] = row["weights_mib"]
        metrics[f"{row['model']}_cached_tokens"] = row["cached_tokens_that_fit"]
    return StageResult(
        metrics=metrics,
        facts={
            "runtime": runtime_name(config.profile),
            "measured in": "; ".join(RUNTIME_NAMES[backend] for backend in config.speed.backends),
            "dtype": config.profile.precision,
            "threads": str(config.profile.num_threads),
            "hardware": describe_hardware(),
            "interval": f"{100 * coverage:.1f}% by order statistics",
            "peak memory": _peak_memory(device),
        },
        tables={
            "speed": _table(speed_rows),
            "cache": _table(cache_rows),
            "memory": _table(memory_rows),
            "limits": _limit_table(checked),
        },
    )


def _require_context(parent: HeterogeneousLlamaForCausalLM, *, config: SpeedStage) -> None:
    """Refuse depths behind which the parent cannot decode."""
    positions = parent.architecture.max_position_embeddings
    for scenario in config.speed.depth_scenarios:
        needed = scenario.prompt_tokens + scenario.generation_tokens
        if needed > positions:
            raise RecipeError(
                f"speed_report.depths has {scenario.prompt_tokens:,}: with {scenario.generation_tokens} decode steps "
                f"{needed:,} positions, and the parent has {positions:,}; take it out"
            )


def _speed_rows(measurements: Measurements, *, backend: Backend, scenarios: Sequence[Scenario]) -> list[dict[str, Any]]:
    rows = []
    for scenario in scenarios:
        for phase in PHASES:
            for model in MODELS:
                speed = measurements.tokens_per_second(model, scenario, phase)
                ratio = measurements.speedup(model, scenario.name, phase, over="parent")
                rows.append(
                    {
                        "backend": backend,
                        "scenario": scenario.name,
                        "phase": phase,
                        "model": model,
                        "tokens_per_second": round(speed.median, 3),
                        "tokens_per_second_low": round(speed.low, 3),
                        "tokens_per_second_high": round(speed.high, 3),
                        "speedup": round(ratio.median, 4),
                        "speedup_low": round(ratio.low, 4),
                        "speedup_high": round(ratio.high, 4),
                        "coverage": round(ratio.coverage, 4),
                        "num_rounds": ratio.num_samples,
                    }
                )
    return rows


def _cache_rows(measurements: Measurements, *, backend: Backend) -> list[dict[str, Any]]:
    """Return what a token takes in each model's cache as that runtime lays it out."""
    parent_bytes = measurements.kv_bytes_per_token["parent"]
    return [
        {
            "backend": backend,
            "model": model,
            "kv_bytes_per_token": kv_bytes,
            "cached_tokens_per_gib": int(GIB // kv_bytes) if kv_bytes else -1,
            "times_the_parents": round(parent_bytes / kv_bytes, 4) if kv_bytes else -1,
        }
        for model, kv_bytes in measurements.kv_bytes_per_token.items()
    ]


def _memory_row(name: str, model: HeterogeneousLlamaForCausalLM, *, config: SpeedStage) -> dict[str, Any]:
    """Return what one model holds, and how many cached tokens fit the device.

    `cached_tokens_that_fit` counts weights alone, as published figures do; in a scenario the activations of its prefill
    take their place as well.
    """
    size, num_devices = BYTES_PER_PARAMETER[config.profile.served_precision], config.profile.num_devices
    kv_bytes = kv_bytes_per_token(model.architecture, bytes_per_value=size, num_devices=num_devices)
    weights = weight_mib(num_parameters(model.architecture, num_devices=num_devices), bytes_per_parameter=size)
    free_bytes = config.speed.device_memory_gib * GIB - weights * MIB

    def that_fit(available_bytes: float) -> int:
        # Without attention nothing is cached, and any number of tokens fits.
        return max(0, int(available_bytes // kv_bytes)) if kv_bytes else -1

    scenarios: dict[str, Any] = {}
    for scenario in config.profile.scenarios:
        memory = memory_of(model.architecture, scenario=scenario, profile=config.profile)
        scenarios |= {
            f"{scenario.name}_weights_and_cache_mib": round(memory.weights_and_cache_mib, 2),
            f"{scenario.name}_activations_mib": round(memory.activation_bytes / MIB, 2),
            f"{scenario.name}_memory_mib": round(memory.total_mib, 2),
            f"{scenario.name}_cached_tokens_that_fit": that_fit(free_bytes - memory.activation_bytes),
        }
    return {
        "model": name,
        "num_parameters": num_parameters(model.architecture),
        "weights_mib": round(weights, 3),
        "kv_bytes_per_token": kv_bytes,
        "cached_tokens_per_gib": that_fit(GIB),
        "cached_tokens_that_fit": that_fit(free_bytes),
        **scenarios,
    }


def _peak_memory(device: torch.device) -> str:
    if device.type != "cuda":
        return "not separable by model on a CPU; weights, caches and activations are counted"
    return f"{torch.cuda.max_memory_allocated(device) / MIB:,.0f} MiB with all models loaded"


def _limit_table(limits: tuple[MeasuredLimit, ...]) -> Table:
    return Table.of(
        ("limit", "bound", "measured", "is_met", "only_within_tolerance"),
        [(limit.name, limit.bound, round(limit.measured, 4), limit.is_met, limit.needs_tolerance) for limit in limits],
    )


def _table(rows: list[dict[str, Any]]) -> Table:
    return Table.of(tuple(rows[0]), [tuple(row.values()) for row in rows])
