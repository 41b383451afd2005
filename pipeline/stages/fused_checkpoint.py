"""fused_checkpoint: runs of attention-free layers joined into wide FFNs (FFN Fusion, section 3).

    python -m pipeline materialize fused_checkpoint

The dependency matrix chooses the runs; one that alone costs more than `max_run_kl` stays unfused. Where none is left,
the artifact is the child itself. Leaves out: healing, which is what kd_checkpoint does next, and comparison with other
ways to save the same time, which is fusion_report's.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.architecture import Architecture
from pipeline.costs import BYTES_PER_PARAMETER
from pipeline.data.packed import load_packed
from pipeline.evaluation.closeness import Closeness, Reference, compare
from pipeline.model.checkpoint import (
    ARCHITECTURE_FILE,
    INDEX_FILE,
    TOKENIZER_FILES,
    TORCH_DTYPES,
    TensorReader,
    load_model,
    model_from_tensors,
    read_architecture,
    save_checkpoint,
)
from pipeline.model.fusion import fuse
from pipeline.model.fusion_runs import FusionRun, RunRules, find_runs, max_dependency
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.puzzle.devices import Ranks, num_threads, place
from pipeline.puzzle.limits import GB
from pipeline.puzzle.tables import DEPENDENCIES, read_table
from pipeline.recipe import FusionConfig
from pipeline.stage import StageInputs, StageResult, Table
from pipeline.stages.configs import FusedStage


def run(config: FusedStage, inputs: StageInputs, out_dir: Path) -> StageResult:
    """Measure every candidate run alone, fuse those that cost little, and measure what all of them change together."""
    with num_threads(inputs.execution.num_threads):
        return _fuse(config, inputs, out_dir)


def run_rules(config: FusedStage) -> RunRules:
    """Return what the recipe asks of a run, the memory of one device as a number of parameters."""
    fusion = config.fusion
    device_bytes = fusion.max_ffn_gb_per_device * GB * config.num_devices
    return RunRules(
        min_run_layers=fusion.min_run_layers,
        max_run_layers=fusion.max_run_layers,
        max_dependency=fusion.max_dependency,
        max_parameters=device_bytes / BYTES_PER_PARAMETER[config.served_precision],
        keep_last_ffn=fusion.keep_last_ffn,
    )


def _fuse(config: FusedStage, inputs: StageInputs, out_dir: Path) -> StageResult:
    fusion, child_dir = config.fusion, inputs["child_checkpoint"]
    dtype, device = TORCH_DTYPES[fusion.precision], Ranks().device
    architecture = read_architecture(child_dir)
    rows = read_table(inputs["dependency_matrix"], DEPENDENCIES).rows()
    dependencies = {(removed, layer): distance for removed, layer, distance in rows}
    candidates = find_runs(architecture, dependencies=dependencies, rules=run_rules(config))
    alone: dict[FusionRun, Closeness] = {}
    together: Closeness | None = None
    runs: list[FusionRun] = []
    out_dir.mkdir(parents=True, exist_ok=True)
    if candidates:
        source = TensorReader(child_dir)
        packed = load_packed(inputs["distillation_mix"], "validation").take(fusion.calibration_tokens)
        child = Reference.of(place(load_model(child_dir, dtype=dtype), device), packed)

        def closeness(model: HeterogeneousLlamaForCausalLM) -> Closeness:
            return compare(place(model, device), packed, [child]).to_references[0]

        for done, candidate in enumerate(candidates, start=1):
            one = fuse(architecture, source=source, runs=[candidate], norm_rule=fusion.norm_rule)
            alone[candidate] = closeness(model_from_tensors(one.architecture, one.tensors, dtype=dtype))
            inputs.reporter.step(done, len(candidates), what="candidate runs", kl=alone[candidate].kl_nats.value)
        runs = [candidate for candidate in candidates if alone[candidate].kl_nats.value <= fusion.max_run_kl]
        if runs:
            fused = fuse(architecture, source=source, runs=runs, norm_rule=fusion.norm_rule)
            save_checkpoint(out_dir, architecture=fused.architecture, tensors=fused.tensors, tokenizer_dir=child_dir)
            together = closeness(load_model(out_dir, dtype=dtype))
    if not runs:
        _copy_checkpoint(child_dir, out_dir)
    return StageResult(
        metrics={
            "num_runs": len(runs),
            "num_runs_left_out": len(alone) - len(runs),
            "num_fused_layers": sum(len(fused_run.ffn_layers) for fused_run in runs),
            "num_layers_before": architecture.num_hidden_layers,
            "num_layers_after": read_architecture(out_dir).num_hidden_layers,
            "relative_output_error": 0.0 if together is None else together.relative_output_error,
            "kl_to_unfused_nats": 0.0 if together is None else together.kl_nats.value,
        },
        facts={"outcome": _outcome(fusion, num_candidates=len(candidates), num_runs=len(runs))},
        tables={"runs": _run_table(architecture, alone, runs=runs, dependencies=dependencies)},
    )


def _outcome(fusion: FusionConfig, *, num_candidates: int, num_runs: int) -> str:
    kept = ", the last FFN of a stretch staying as it is" if fusion.keep_last_ffn else ""
    if num_runs:
        return f"joined by rule {fusion.norm_rule}{kept}"
    if num_candidates:
        return (
            f"the child itself: each of {num_candidates} runs alone costs more than {fusion.max_run_kl} nats per token"
        )
    return (
        f"the child itself: no stretch of attention-free layers has {fusion.min_run_layers} FFNs to join that depend "
        f"on each other by at most {fusion.max_dependency:g} and fit {fusion.max_ffn_gb_per_device:g} GB per "
        f"device{kept}"
    )


def _run_table(
    architecture: Architecture,
    alone: Mapping[FusionRun, Closeness],
    *,
    runs: Sequence[FusionRun],
    dependencies: Mapping[tuple[int, int], float],
) -> Table:
    rows = []
    for candidate, found in alone.items():
        widths = [architecture.blocks[layer].ffn.intermediate_size or 0 for layer in candidate.ffn_layers]
        rows.append(
            (
                candidate.label,
                " + ".join(map(str, widths)),
                round(max_dependency(candidate.ffn_layers, dependencies), 4),
                round(found.kl_nats.value, 4),
                round(found.relative_output_error, 4),
                candidate in runs,
            )
        )
    columns = (
        "layers",
        "intermediate_sizes",
        "max_dependency",
        "kl_alone_nats",
        "relative_output_error_alone",
        "is_fused",
    )
    return Table.of(columns, rows)


def _copy_checkpoint(source: Path, directory: Path) -> None:
    names = [
        ARCHITECTURE_FILE,
        INDEX_FILE,
        *TOKENIZER_FILES,
        *(path.name for path in source.glob("model*.safetensors")),
    ]
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
