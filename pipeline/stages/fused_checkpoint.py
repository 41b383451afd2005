"""fused_checkpoint: runs of attention-free layers joined into wide FFNs (FFN Fusion, section 3).

    python -m pipeline materialize fused_checkpoint

A run that alone costs more than `max_run_kl` stays unfused; where none is left, the artifact is the child itself.
Leaves out: healing, which is what kd_checkpoint does next.

Letters: B batch, T tokens, D hidden_size, V vocab_size.
"""

import shutil
from collections.abc import Mapping, Sequence
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
    model_from_tensors,
    read_architecture,
    save_checkpoint,
)
from pipeline.model.fusion import FusionRun, find_runs, fuse
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.recipe import FusionConfig
from pipeline.stage import StageInputs, StageResult, Table
from pipeline.training.distributed import use_threads


@dataclass(frozen=True, kw_only=True, slots=True)
class FusionError:
    """What sharing one input per run costs, on the same tokens; nothing has been trained."""

    relative_output_error: float
    kl_to_unfused_nats: float


def run(config: FusionConfig, inputs: StageInputs, out_dir: Path) -> StageResult:
    """Measure every candidate run alone, fuse those that cost little, and measure what all of them change together."""
    use_threads(inputs.execution.num_threads)
    child_dir = inputs["child_checkpoint"]
    architecture = read_architecture(child_dir)
    candidates = find_runs(
        architecture,
        min_run_layers=config.min_run_layers,
        max_run_layers=config.max_run_layers,
        keep_last_ffn=config.keep_last_ffn,
    )
    out_dir.mkdir(parents=True, exist_ok=True)
    if not candidates:
        _copy_checkpoint(child_dir, out_dir)
        return _result(architecture, architecture, runs=[], alone={}, config=config, error=None)
    source = TensorReader(child_dir)
    comparison = _Comparison(
        load_model(child_dir, dtype=torch.float32),
        packed=load_packed(inputs["distillation_mix"], "validation").take(config.calibration_tokens),
    )
    alone: dict[FusionRun, FusionError] = {}
    for done, candidate in enumerate(candidates, start=1):
        one = fuse(architecture, source=source, runs=[candidate], norm_rule=config.norm_rule)
        alone[candidate] = comparison.error_of(model_from_tensors(one.architecture, one.tensors, dtype=torch.float32))
        inputs.reporter.step(done, len(candidates), what="candidate runs", kl=alone[candidate].kl_to_unfused_nats)
    runs = [candidate for candidate in candidates if alone[candidate].kl_to_unfused_nats <= config.max_run_kl]
    if not runs:
        _copy_checkpoint(child_dir, out_dir)
        return _result(architecture, architecture, runs=[], alone=alone, config=config, error=None)
    fused = fuse(architecture, source=source, runs=runs, norm_rule=config.norm_rule)
    save_checkpoint(out_dir, architecture=fused.architecture, tensors=fused.tensors, tokenizer_dir=child_dir)
    error = comparison.error_of(load_model(out_dir, dtype=torch.float32))
    return _result(architecture, fused.architecture, runs=runs, alone=alone, config=config, error=error)


class _Comparison:
    """The unfused child on fixed windows, against which fused models are measured."""

    def __init__(self, child: HeterogeneousLlamaForCausalLM, *, packed: PackedTokens) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._child = child.to(self._device)  # pyright: ignore[reportArgumentType] (transformers wraps `to`)
        self._packed = packed

    @torch.no_grad()
    def error_of(self, fused: HeterogeneousLlamaForCausalLM) -> FusionError:
        """Return how far a fused model's output lies from the child's."""
        fused.to(self._device)  # pyright: ignore[reportArgumentType]
        squared_difference = squared_norm = kl_nats = 0.0
        for row in range(len(self._packed)):  # one window at a time: two sets of logits are the largest thing in memory
            tokens_BT = self._packed.tokens_NT[row : row + 1].to(self._device)
            positions_BT = self._packed.position_ids_NT[row : row + 1].to(self._device)
            hidden_BTD, fused_BTD = (
                model.model(input_ids=tokens_BT, position_ids=positions_BT, use_cache=False).last_hidden_state
                for model in (self._child, fused)
            )
            squared_difference += float((fused_BTD - hidden_BTD).double().square().sum())
            squared_norm += float(hidden_BTD.double().square().sum())
            log_p_BTV = self._child.lm_head(hidden_BTD).log_softmax(dim=-1)
            log_q_BTV = fused.lm_head(fused_BTD).log_softmax(dim=-1)
            kl_nats += float((log_p_BTV.exp() * (log_p_BTV - log_q_BTV)).sum())
        return FusionError(
            relative_output_error=(squared_difference / squared_norm) ** 0.5,
            kl_to_unfused_nats=kl_nats / self._packed.num_tokens,
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
    alone: Mapping[FusionRun, FusionError],
    config: FusionConfig,
    error: FusionError | None,
) -> StageResult:
    kept = ", the last FFN of a stretch staying as it is" if config.keep_last_ffn else ""
    if runs:
        reason = f"joined by rule {config.norm_rule}{kept}"
    elif alone:
        reason = f"the child itself: each of {len(alone)} runs alone costs more than {config.max_run_kl} nats per token"
    else:
        reason = f"the child itself: no stretch of attention-free layers has {config.min_run_layers} FFNs to join{kept}"
    rows = []
    for candidate, found in alone.items():
        widths = [before.blocks[layer].ffn.intermediate_size or 0 for layer in candidate.ffn_layers]
        rows.append(
            (
                f"{candidate.layers[0]}-{candidate.layers[-1]}",
                " + ".join(map(str, widths)),
                round(found.kl_to_unfused_nats, 4),
                round(found.relative_output_error, 4),
                candidate in runs,
            )
        )
    return StageResult(
        metrics={
            "num_runs": len(runs),
            "num_runs_left_out": len(alone) - len(runs),
            "num_fused_layers": sum(len(fused_run.ffn_layers) for fused_run in runs),
            "num_layers_before": before.num_hidden_layers,
            "num_layers_after": after.num_hidden_layers,
            "relative_output_error": 0.0 if error is None else error.relative_output_error,
            "kl_to_unfused_nats": 0.0 if error is None else error.kl_to_unfused_nats,
        },
        facts={"outcome": reason},
        tables={
            "runs": Table.of(
                ("layers", "intermediate_sizes", "kl_alone_nats", "relative_output_error_alone", "is_fused"), rows
            )
        },
    )
