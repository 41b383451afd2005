"""FFN fusion: runs of attention-free layers joined into one wide FFN (FFN Fusion, section 3). Pure.

Layers i..i+c without attention compute x_{k+1} = x_k + FFN_k(norm_k(x_k)) one after the other. Fusion feeds all of them
the run's input and adds the results (equation 5):

    f(X) = X + sum_k FFN_k(norm(X))

and that sum is one FFN (theorem 3.1): gate and up projections stacked along the channels, down projections side by
side. The stacking is exact. Sharing the input is an approximation, and so is sharing one norm scale (`last`);
`fold_each` multiplies each layer's own scale into its gate and up columns, which leaves the shared input alone.

Letters: D hidden_size, F intermediate_size.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from pipeline.architecture import NO_ATTENTION, Architecture, BlockSpec, swiglu

NormRule = Literal["fold_each", "last"]

_NORM = "post_attention_layernorm.weight"
_LAYER = "model.layers."


class TensorSource(Protocol):
    """Tensors by their full names, as pipeline.model.checkpoint.TensorReader gives them."""

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor's name."""
        ...

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class FusionRun:
    """Layers that become one: `layers` are replaced, `ffn_layers` among them have an FFN, the rest are identities."""

    layers: tuple[int, ...]
    ffn_layers: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedModel:
    """The architecture after fusion and its tensors, read and joined one layer at a time."""

    architecture: Architecture
    tensors: Iterator[tuple[str, Tensor]]


def find_runs(
    architecture: Architecture, *, min_run_layers: int, max_run_layers: int, keep_last_ffn: bool
) -> list[FusionRun]:
    """Return the runs to fuse, first layer first.

    A stretch is a longest succession of layers without attention whose FFNs are gated or absent; a linear FFN ends it.
    A stretch of more than `max_run_layers` FFNs becomes several runs, as in the paper's Ultra (section 4): each run
    reads the output of the one before it, so the longer the runs, the coarser the approximation.

    Args:
        architecture: the model.
        min_run_layers: the fewest FFNs worth joining.
        max_run_layers: the most FFNs to join into one.
        keep_last_ffn: leave the last FFN of each stretch as it is, as the paper's ablation recommends (table 5).
    """
    runs, stretch = [], []
    for layer, block in enumerate((*architecture.blocks, None)):
        if block is not None and block.attention.kind == "no_op" and block.ffn.kind != "linear":
            stretch.append(layer)
            continue
        ffn_layers = [index for index in stretch if architecture.blocks[index].ffn.kind == "swiglu"]
        if keep_last_ffn:
            ffn_layers = ffn_layers[:-1]
        for start in range(0, len(ffn_layers), max_run_layers):
            joined = ffn_layers[start : start + max_run_layers]
            if len(joined) >= min_run_layers:
                runs.append(FusionRun(layers=tuple(range(joined[0], joined[-1] + 1)), ffn_layers=tuple(joined)))
        stretch = []
    return runs


def fuse(
    architecture: Architecture, *, source: TensorSource, runs: Sequence[FusionRun], norm_rule: NormRule
) -> FusedModel:
    """Return the model with each run joined into one layer, everything else in its order."""
    run_at = {run.layers[0]: run for run in runs}
    inside = {layer for run in runs for layer in run.layers}
    blocks: list[BlockSpec] = []
    origins: list[FusionRun | int] = []
    for layer, block in enumerate(architecture.blocks):
        if layer in run_at:
            blocks.append(_joined_block(architecture, run_at[layer]))
            origins.append(run_at[layer])
        elif layer not in inside:
            blocks.append(block)
            origins.append(layer)
    return FusedModel(
        architecture=architecture.with_blocks(blocks), tensors=_tensors(source, origins=origins, norm_rule=norm_rule)
    )


def fuse_ffns(ffns: Sequence[Mapping[str, Tensor]], *, norm_rule: NormRule) -> dict[str, Tensor]:
    """Return one FFN subblock that computes the sum of several at their shared input.

    Args:
        ffns: the tensors of each FFN subblock, named relative to its layer; widths may differ.
        norm_rule: `last` takes the last layer's norm scale; `fold_each` folds each scale s into W_gate diag(s) and
            W_up diag(s) and leaves a scale of 1.
    """
    fold = norm_rule == "fold_each"
    last_norm_D = ffns[-1][_NORM]
    fused = {_NORM: torch.ones_like(last_norm_D) if fold else last_norm_D.clone()}
    for name in ("mlp.gate_proj", "mlp.up_proj"):
        weights_FD = [_scaled(ffn[f"{name}.weight"], ffn[_NORM]) if fold else ffn[f"{name}.weight"] for ffn in ffns]
        fused[f"{name}.weight"] = torch.cat(weights_FD, dim=0)
        if f"{name}.bias" in ffns[0]:
            fused[f"{name}.bias"] = torch.cat([ffn[f"{name}.bias"] for ffn in ffns], dim=0)
    fused["mlp.down_proj.weight"] = torch.cat([ffn["mlp.down_proj.weight"] for ffn in ffns], dim=1)
    if "mlp.down_proj.bias" in ffns[0]:
        biases = torch.stack([ffn["mlp.down_proj.bias"] for ffn in ffns])
        fused["mlp.down_proj.bias"] = biases.to(_precise(biases)).sum(dim=0).to(biases.dtype)
    return fused


def _joined_block(architecture: Architecture, run: FusionRun) -> BlockSpec:
    parent_layers = {parent for layer in run.layers for parent in architecture.blocks[layer].parent_layers}
    width = sum(architecture.blocks[layer].ffn.intermediate_size or 0 for layer in run.ffn_layers)
    return BlockSpec(attention=NO_ATTENTION, ffn=swiglu(width), parent_layers=tuple(sorted(parent_layers)))


def _tensors(
    source: TensorSource, *, origins: Sequence[FusionRun | int], norm_rule: NormRule
) -> Iterator[tuple[str, Tensor]]:
    of_layer: dict[int, list[str]] = {}
    for name in source.names:
        if name.startswith(_LAYER):
            layer, _, relative = name.removeprefix(_LAYER).partition(".")
            of_layer.setdefault(int(layer), []).append(relative)
        else:
            yield name, source.read(name)

    def read_layer(layer: int) -> dict[str, Tensor]:
        return {relative: source.read(f"{_LAYER}{layer}.{relative}") for relative in of_layer.get(layer, [])}

    for new_layer, origin in enumerate(origins):
        if isinstance(origin, FusionRun):
            tensors = fuse_ffns([read_layer(layer) for layer in origin.ffn_layers], norm_rule=norm_rule)
        else:
            tensors = read_layer(origin)
        for relative, tensor in tensors.items():
            yield f"{_LAYER}{new_layer}.{relative}", tensor


def _scaled(weight_FD: Tensor, scale_D: Tensor) -> Tensor:
    precise = _precise(weight_FD)
    return (weight_FD.to(precise) * scale_D.to(precise)).to(weight_FD.dtype)


def _precise(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
