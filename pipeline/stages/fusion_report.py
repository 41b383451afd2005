"""fusion_report: what fusion cost the child, beside the other ways to save the same time, and what healing gave back.

Both norm rules whichever the recipe chooses, the runs in reverse order, FFNs deleted to the same latency, and the fused
child after distillation, all on the same held-out windows (FFN Fusion, sections 4 and 5).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.artifacts import write_atomically
from pipeline.data.packed import PackedTokens, load_packed
from pipeline.evaluation.arrangements import (
    NORM_RULES,
    Arrangement,
    arranged,
    deletion_order,
    fused,
    identity_error,
    measure_arrangements,
    num_deleted_at_equal_latency,
    reverse,
    unchanged,
    without,
)
from pipeline.evaluation.closeness import Comparison, Reference, compare
from pipeline.hardware import describe_hardware
from pipeline.model.checkpoint import TORCH_DTYPES, load_model, read_architecture
from pipeline.model.fusion_runs import FusionRun, runs_between
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.puzzle.devices import Ranks, num_threads, place
from pipeline.puzzle.measure import Measurements, measure_models
from pipeline.recipe import Scenario
from pipeline.stage import Number, StageInputs, StageResult, Table
from pipeline.stages.configs import FusionReportStage

REPORT = "fusion.json"
AFTER_KD = "fused, after distillation"
# One user, as the paper times it; a short context, since attention is the same in all that are compared.
SINGLE_USER = Scenario(name="single-user", batch_size=1, prompt_tokens=16, generation_tokens=8)


def run(config: FusionReportStage, inputs: StageInputs, out_dir: Path) -> StageResult:
    """Write fusion.json: every arrangement's figures; none for a child without a run."""
    runs = runs_between(read_architecture(inputs["child_checkpoint"]), read_architecture(inputs["fused_checkpoint"]))
    out_dir.mkdir(parents=True, exist_ok=True)
    if not runs:
        write_atomically(out_dir / REPORT, b"[]\n")
        outcome = "nothing to compare: no run of this child was fused"
        return StageResult(metrics={"num_runs": 0, "max_identity_error": 0.0}, facts={"outcome": outcome})
    device = Ranks().device
    packed = load_packed(inputs["distillation_mix"], "validation").take(config.fusion.calibration_tokens)

    def load(asset: str) -> HeterogeneousLlamaForCausalLM:
        return place(load_model(inputs[asset], dtype=TORCH_DTYPES[config.fusion.precision]), device)

    child = load("child_checkpoint")
    measurements = _time(child, runs, config=config, inputs=inputs)
    with num_threads(inputs.execution.num_threads):
        references = [Reference.of(child, packed), Reference.of(load("parent_checkpoint"), packed)]
        num_deleted = _num_deleted(measurements, num_ffns=sum(len(one.ffn_layers) for one in runs))
        arrangements = _arrangements(child, runs, packed, references[0], num_deleted=num_deleted, inputs=inputs)
        found = dict(
            zip(
                (one.name for one in arrangements),
                measure_arrangements(child, arrangements, packed, references),
                strict=True,
            )
        )
        errors = [identity_error(child, one, packed, norm_rule=rule) for one in runs for rule in NORM_RULES]
        found[AFTER_KD] = compare(load("kd_checkpoint"), packed, references)
    rows = [_row(name, one) for name, one in found.items()]
    write_atomically(out_dir / REPORT, (json.dumps(rows, indent=1) + "\n").encode())
    speedup = measurements.speedup("fused", SINGLE_USER.name, "decode", over="child")
    return StageResult(
        metrics={
            "num_runs": len(runs),
            "num_fused_layers": sum(len(one.ffn_layers) for one in runs),
            "max_identity_error": max(errors),
            "num_deleted_at_equal_latency": num_deleted,
            "decode_speedup": speedup.median,
            "decode_speedup_low": speedup.low,
            "decode_speedup_high": speedup.high,
            "num_rounds": speedup.num_samples,
            "num_tokens": packed.num_tokens,
            **_costs(found, config=config, num_deleted=num_deleted),
        },
        facts={
            "hardware": describe_hardware(),
            "interval": f"{100 * speedup.coverage:.1f}% by order statistics",
        },
        tables={
            "arrangements": Table.of(tuple(rows[0]), [tuple(row.values()) for row in rows]),
            "latency": _latency_table(measurements),
        },
    )


def _time(
    child: HeterogeneousLlamaForCausalLM,
    runs: Sequence[FusionRun],
    *,
    config: FusionReportStage,
    inputs: StageInputs,
) -> Measurements:
    """Measure single-user decoding of the child, of it fused, and of it without the runs' FFNs."""
    num_layers = child.architecture.num_hidden_layers
    layers = [layer for one in runs for layer in one.ffn_layers]
    models = {
        "child": child,
        "fused": arranged(child, fused(num_layers, runs, norm_rule=config.fusion.norm_rule)),
        "without": arranged(child, without(num_layers, layers)),
    }
    return measure_models(
        models,
        [SINGLE_USER],
        measurement=config.measurement,
        threads=config.num_threads,
        reporter=inputs.reporter,
    )


def _num_deleted(measurements: Measurements, *, num_ffns: int) -> int:
    child_ms, fused_ms, without_ms = (
        measurements.median_ms(name, SINGLE_USER.name, "decode") for name in ("child", "fused", "without")
    )
    return num_deleted_at_equal_latency(child_ms=child_ms, fused_ms=fused_ms, without_ms=without_ms, num_ffns=num_ffns)


def _arrangements(
    child: HeterogeneousLlamaForCausalLM,
    runs: Sequence[FusionRun],
    packed: PackedTokens,
    reference: Reference,
    *,
    num_deleted: int,
    inputs: StageInputs,
) -> list[Arrangement]:
    """Return all that is compared: deletions of one FFN, to equal latency, and of as many layers as fusion saves."""
    num_layers = child.architecture.num_hidden_layers
    num_ffns = sum(len(one.ffn_layers) for one in runs)
    alone: dict[int, float] = {}
    for layer, kl in deletion_order(child, runs, packed, reference):
        alone[layer] = kl
        inputs.reporter.step(len(alone), num_ffns, what="FFNs deleted alone", kl=kl)
    harmless_first = sorted(alone, key=lambda layer: alone[layer])
    counts = sorted({1, num_deleted, num_ffns - len(runs)} - {0})
    return [
        unchanged(num_layers),
        *(fused(num_layers, runs, norm_rule=rule) for rule in NORM_RULES),
        reverse(num_layers, runs),
        *(without(num_layers, harmless_first[:count]) for count in counts),
    ]


def _costs(found: Mapping[str, Comparison], *, config: FusionReportStage, num_deleted: int) -> dict[str, Number]:
    """Return KL to the unfused child by arrangement, and KL to the parent before and after distillation."""

    def to_child(name: str) -> float:
        return found[name].to_references[0].kl_nats.value

    def to_parent(name: str) -> float:
        return found[name].to_references[1].kl_nats.value

    deleted = next(name for name in found if name.startswith(f"{max(1, num_deleted)} FFN"))
    return {
        "kl_fold_each_nats": to_child("fused, fold_each"),
        "kl_last_nats": to_child("fused, last"),
        "kl_reversed_nats": to_child("runs in reverse order"),
        "kl_deleted_nats": to_child(deleted),
        "kl_to_parent_child_nats": to_parent("child"),
        "kl_to_parent_fused_nats": to_parent(f"fused, {config.fusion.norm_rule}"),
        "kl_to_parent_after_kd_nats": to_parent(AFTER_KD),
    }


def _row(name: str, found: Comparison) -> dict[str, str | int | float]:
    child, parent = found.to_references
    return {
        "model": name,
        "kl_to_child_nats": round(child.kl_nats.value, 5),
        "kl_to_child_low_nats": round(child.kl_nats.low, 5),
        "kl_to_child_high_nats": round(child.kl_nats.high, 5),
        "relative_output_error": round(child.relative_output_error, 5),
        "kl_to_parent_nats": round(parent.kl_nats.value, 5),
        "perplexity": round(found.perplexity.value, 3),
        "num_windows": found.perplexity.num_samples,
        "num_tokens": found.num_tokens,
    }


def _latency_table(measurements: Measurements) -> Table:
    rows = []
    for name in ("child", "fused", "without"):
        speed = measurements.tokens_per_second(name, SINGLE_USER, "decode")
        milliseconds = measurements.median_ms(name, SINGLE_USER.name, "decode")
        rows.append((name, round(milliseconds, 4), round(speed.median, 2), round(speed.low, 2), round(speed.high, 2)))
    return Table.of(
        ("model", "decode_ms", "tokens_per_second", "tokens_per_second_low", "tokens_per_second_high"), rows
    )
