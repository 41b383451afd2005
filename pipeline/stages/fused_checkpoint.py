"""fused_checkpoint: runs of attention-free layers joined into wide FFNs (FFN Fusion, section 3).

    python -m pipeline materialize fused_checkpoint

Where there is no run, the artifact is the child itself. Leaves out: healing, which is what kd_checkpoint does next.

Letters: B batch, T tokens, D hidden_size, V vocab_size.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.architecture import Architecture
from pipeline.data.packed import PackedTokens, load_packed
from pipeline.model.checkpoint import (
    ARCHITECTURE_FILE,
    INDEX_FILE,
    TOKENIZER_FILES,
    TensorReader,
    load_model,
    read_architecture,
    save_checkpoint,
)
from pipeline.model.fusion import FusionRun, find_runs, fuse
from pipeline.recipe import FusionConfig
from pipeline.stage import StageInputs, StageResult, Table


@dataclass(frozen=True, kw_only=True, slots=True)
class FusionError:
    """What sharing one input per run costs, on the same tokens; nothing has been trained."""

    relative_output_error: float
    kl_to_unfused_nats: float


def run(config: FusionConfig, inputs: StageInputs, out_dir: Path) -> StageResult:
    """Fuse the child's runs and measure what that changes."""
    if inputs.execution.num_threads is not None:
        torch.set_num_threads(inputs.execution.num_threads)
    child_dir = inputs["child_checkpoint"]
    architecture = read_architecture(child_dir)
    runs = find_runs(
        architecture,
        min_run_layers=config.min_run_layers,
        max_run_layers=config.max_run_layers,
        keep_last_ffn=config.keep_last_ffn,
    )
    out_dir.mkdir(parents=True, exist_ok=True)
    if not runs:
        _copy_checkpoint(child_dir, out_dir)
        return _result(architecture, architecture, runs=runs, config=config, error=None)
    fused = fuse(architecture, source=TensorReader(child_dir), runs=runs, norm_rule=config.norm_rule)
    save_checkpoint(out_dir, architecture=fused.architecture, tensors=fused.tensors, tokenizer_dir=child_dir)
    packed = load_packed(inputs["distillation_mix"], "validation").take(config.calibration_tokens)
    error = _measure(child_dir, out_dir, packed=packed, inputs=inputs)
    return _result(architecture, fused.architecture, runs=runs, config=config, error=error)


@torch.no_grad()
def _measure(child_dir: Path, fused_dir: Path, *, packed: PackedTokens, inputs: StageInputs) -> FusionError:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    child, fused = (load_model(directory, dtype=torch.float32) for directory in (child_dir, fused_dir))
    for model in (child, fused):
        model.to(device)  # pyright: ignore[reportArgumentType] (transformers wraps `to`)
    squared_difference = squared_norm = kl_nats = 0.0
    for row in range(len(packed)):  # one window at a time: two sets of logits are the largest thing in memory
        tokens_BT = packed.tokens_NT[row : row + 1].to(device)
        positions_BT = packed.position_ids_NT[row : row + 1].to(device)
        hidden_BTD, fused_BTD = (
            model.model(input_ids=tokens_BT, position_ids=positions_BT, use_cache=False).last_hidden_state
            for model in (child, fused)
        )
        squared_difference += float((fused_BTD - hidden_BTD).double().square().sum())
        squared_norm += float(hidden_BTD.double().square().sum())
        log_p_BTV = child.lm_head(hidden_BTD).log_softmax(dim=-1)
        log_q_BTV = fused.lm_head(fused_BTD).log_softmax(dim=-1)
        kl_nats += float((log_p_BTV.exp() * (log_p_BTV - log_q_BTV)).sum())
        inputs.reporter.step(row + 1, len(packed), what="windows compared")
    return FusionError(
        relative_output_error=(squared_difference / squared_norm) ** 0.5,
        kl_to_unfused_nats=kl_nats / packed.num_tokens,
    )


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


def _result(
    before: Architecture,
    after: Architecture,
    *,
    runs: Sequence[FusionRun],
    config: FusionConfig,
    error: FusionError | None,
) -> StageResult:
    kept = ", the last FFN of a run staying as it is" if config.keep_last_ffn else ""
    reason = (
        f"joined by rule {config.norm_rule}{kept}"
        if runs
        else f"the child itself: no run of attention-free layers has {config.min_run_layers} FFNs to join{kept}"
    )
    rows = []
    for fused_run in runs:
        widths = [before.blocks[layer].ffn.intermediate_size or 0 for layer in fused_run.ffn_layers]
        rows.append(
            (
                f"{fused_run.layers[0]}-{fused_run.layers[-1]}",
                len(widths),
                " + ".join(map(str, widths)),
                sum(widths),
            )
        )
    return StageResult(
        metrics={
            "num_runs": len(runs),
            "num_fused_layers": sum(len(fused_run.ffn_layers) for fused_run in runs),
            "num_layers_before": before.num_hidden_layers,
            "num_layers_after": after.num_hidden_layers,
            "relative_output_error": 0.0 if error is None else error.relative_output_error,
            "kl_to_unfused_nats": 0.0 if error is None else error.kl_to_unfused_nats,
        },
        facts={"outcome": reason},
        tables={"runs": Table.of(("layers", "num_ffns", "intermediate_sizes", "fused_intermediate_size"), rows)},
    )
