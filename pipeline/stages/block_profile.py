"""block_profile: prefill and decode time of every subblock variant, with exact weight, KV and activation memory."""

from pathlib import Path

import polars as pl

from pipeline.architecture import Architecture
from pipeline.artifacts import write_atomically
from pipeline.costs import (
    BYTES_PER_PARAMETER,
    MIB,
    attention_parameters,
    block_activation_bytes,
    embedding_parameters,
    ffn_parameters,
    kv_values_per_token,
    outer_activation_bytes,
    weight_mib,
)
from pipeline.devices import THIS_MACHINE, Device
from pipeline.hardware import describe_hardware
from pipeline.model.checkpoint import TORCH_DTYPES, read_architecture
from pipeline.puzzle.backends import profile_outside, runtime_name
from pipeline.puzzle.calibration import PHASES
from pipeline.puzzle.devices import Ranks, measure_this_machine, num_threads
from pipeline.puzzle.predictions import FIXED
from pipeline.puzzle.profiling import Profile, Samples, profile_blocks
from pipeline.puzzle.roofline import parent_times_ms, roofline_times
from pipeline.puzzle.search import ARCHITECTURE_FILE, CALIBRATION_FILE
from pipeline.puzzle.search_space import SearchSpace, resolve
from pipeline.puzzle.tables import ACTIVATIONS, MEMORY, PROFILE, SCHEMAS, write_table
from pipeline.recipe import ProfileConfig
from pipeline.stage import WORK_DIR, StageInputs, StageResult, Table
from pipeline.stages.configs import BlockProfileStage


def run(config: BlockProfileStage, inputs: StageInputs, out_dir: Path) -> StageResult:
    """Write profile, memory and activations as Parquet, calibration.json and the parent's architecture.json."""
    architecture = read_architecture(inputs["parent_checkpoint"])
    space = resolve(config.search_space, architecture)
    if config.profile.backend == "roofline":
        device = _device(config.profile)
        profile, num_repeats = _roofline(architecture, space, profile=config.profile, device=device), 0
        facts = _where(config.profile, device)
    else:
        profile = _measured(architecture, space, config=config, inputs=inputs, out_dir=out_dir)
        num_repeats = config.profile.repeats
        facts = {
            "runtime": runtime_name(config.profile),
            "dtype": config.profile.precision,
            "threads": str(config.profile.num_threads),
            "hardware": describe_hardware(),
            "residual": "of the parent"
            if profile.checked is None
            else "of a model whose layers take all variants in turn",
        }
    out_dir.mkdir(parents=True, exist_ok=True)
    times = _times(profile, num_repeats=num_repeats)
    memory = _memory(architecture, space, profile=config.profile)
    activations = _activations(architecture, space, profile=config.profile)
    write_table(out_dir, PROFILE, times)
    write_table(out_dir, MEMORY, memory)
    write_table(out_dir, ACTIVATIONS, activations)
    write_atomically(out_dir / CALIBRATION_FILE, profile.calibration.model_dump_json(indent=1).encode())
    write_atomically(out_dir / ARCHITECTURE_FILE, architecture.model_dump_json(indent=1).encode())
    return StageResult(
        metrics={
            "max_relative_residual": max(profile.residuals.values()),
            "max_drift": max(abs(drift) for drift in profile.drift.values()),
            "num_variants": len(space.distinct_attention) + len(space.distinct_ffn),
            "num_repeats": num_repeats,
        },
        facts=facts,
        tables={
            "block_times": _shown(times),
            "parent": _parent_table(profile),
            "memory": _shown(memory),
            "activations": _shown(activations),
        },
    )


def _measured(
    architecture: Architecture, space: SearchSpace, *, config: BlockProfileStage, inputs: StageInputs, out_dir: Path
) -> Profile:
    if config.profile.backend != "torch":
        return profile_outside(
            architecture, space, profile=config.profile, work_dir=out_dir / WORK_DIR, reporter=inputs.reporter
        )
    return profile_blocks(
        architecture,
        space,
        profile=config.profile,
        device=Ranks().device,
        dtype=TORCH_DTYPES[config.profile.precision],
        reporter=inputs.reporter,
    )


def _device(profile: ProfileConfig) -> Device | None:
    """Return this machine, measured, where the profile asks for it; None for a named device."""
    if profile.device != THIS_MACHINE:
        return None
    with num_threads(profile.num_threads):
        return measure_this_machine(profile.precision)


def _roofline(
    architecture: Architecture, space: SearchSpace, *, profile: ProfileConfig, device: Device | None
) -> Profile:
    """Return what the device's rates give; the parent takes the sum of its blocks."""
    times_ms = roofline_times(architecture, space, profile=profile, device=device)
    sum_ms = parent_times_ms(architecture, times_ms)
    return Profile(
        samples={key: Samples(times_ms=(value,)) for key, value in times_ms.items()},
        parent={key: Samples(times_ms=(value,)) for key, value in sum_ms.items()},
        sum_ms=sum_ms,
    )


def _where(profile: ProfileConfig, device: Device | None) -> dict[str, str]:
    num_devices = profile.num_devices
    if device is not None:
        assert device.kernel_s is not None
        return {
            "runtime": "roofline of this machine",
            "dtype": profile.served_precision,
            "threads": str(profile.num_threads),
            "hardware": describe_hardware(),
            "matmul peak": f"{device.peak_flops_per_s / 1e9:,.4g} GFLOP/s",
            "bandwidth": f"{device.bandwidth_bytes_per_s / 1e9:,.4g} GB/s",
            "empty kernel": f"{device.kernel_s * 1e6:.3g} us",
        }
    return {
        "runtime": f"roofline of {profile.device}",
        "dtype": profile.served_precision,
        "devices": str(num_devices),
        "hardware": f"none: closed form from the data sheet of {num_devices} x {profile.device}",
    }


def _times(profile: Profile, *, num_repeats: int) -> pl.DataFrame:
    rows = [(*key, samples.median_ms, samples.spread_ms, num_repeats) for key, samples in profile.samples.items()]
    return pl.DataFrame(rows, schema=SCHEMAS[PROFILE], orient="row")


def _memory(architecture: Architecture, space: SearchSpace, *, profile: ProfileConfig) -> pl.DataFrame:
    size, num_devices = BYTES_PER_PARAMETER[profile.served_precision], profile.num_devices
    outside = embedding_parameters(architecture)
    counted: list[tuple[str, str, int, int, int]] = []
    for spec in space.distinct_attention:
        parameters = attention_parameters(architecture, spec)
        held = attention_parameters(architecture, spec, num_devices=num_devices)
        kv_values = kv_values_per_token(architecture, spec, num_devices=num_devices)
        counted.append(("attention", spec.key, parameters, held, kv_values))
    for spec in space.distinct_ffn:
        parameters = ffn_parameters(architecture, spec)
        counted.append(("ffn", spec.key, parameters, parameters, 0))
    counted.append((FIXED, FIXED, outside, outside, 0))
    rows = [
        (part, variant, parameters, weight_mib(held, bytes_per_parameter=size), size * kv_values)
        for part, variant, parameters, held, kv_values in counted
    ]
    return pl.DataFrame(rows, schema=SCHEMAS[MEMORY], orient="row")


def _activations(architecture: Architecture, space: SearchSpace, *, profile: ProfileConfig) -> pl.DataFrame:
    blocks = {block.key: block for options in space.layers for block in (*options.blocks, space.parent)}
    rows: list[tuple[str, str, str, float]] = []
    for scenario in profile.scenarios:
        prefill = {
            "batch_size": scenario.batch_size,
            "prompt_tokens": scenario.prompt_tokens,
            "bytes_per_value": BYTES_PER_PARAMETER[profile.served_precision],
            "num_devices": profile.num_devices,
        }
        for block in blocks.values():
            held = block_activation_bytes(architecture, block, **prefill)
            rows.append((scenario.name, block.attention.key, block.ffn.key, held / MIB))
        rows.append((scenario.name, FIXED, FIXED, outer_activation_bytes(architecture, **prefill) / MIB))
    return pl.DataFrame(rows, schema=SCHEMAS[ACTIVATIONS], orient="row")


def _parent_table(profile: Profile) -> Table:
    """Return the sum of blocks beside the measured parent, and how much the machine drifted in the sitting."""
    rows = []
    for (scenario, phase), samples in profile.parent.items():
        assert phase in PHASES
        key = (scenario, phase)
        rows.append(
            (
                scenario,
                phase,
                round(profile.sum_ms[key], 3),
                round(samples.median_ms, 3),
                round(samples.spread_ms, 3),
                round(profile.residuals[key], 4),
                round(profile.drift[key], 4),
            )
        )
    columns = ("scenario", "phase", "sum_of_blocks_ms", "measured_ms", "spread_ms", "relative_residual", "drift")
    return Table.of(columns, rows)


def _shown(frame: pl.DataFrame) -> Table:
    rounded = [
        tuple(round(value, 4) if isinstance(value, float) else value for value in row) for row in frame.iter_rows()
    ]
    return Table.of(frame.columns, rounded)
