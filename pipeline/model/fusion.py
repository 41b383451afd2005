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
from pipeline.model.fusion_runs import FusionRun

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
class ArrangedModel:
    """An architecture and its tensors, read and joined one layer at a time."""

    architecture: Architecture
    tensors: Iterator[tuple[str, Tensor]]


def fuse(
    architecture: Architecture, *, source: TensorSource, runs: Sequence[FusionRun], norm_rule: NormRule
) -> ArrangedModel:
    """Return the model with each run joined into one layer, everything else in its order."""
    run_at = {run.layers[0]: run for run in runs}
    inside = {layer for run in runs for layer in run.layers[1:]}
    order = [run_at.get(layer, layer) for layer in range(architecture.num_hidden_layers) if layer not in inside]
    return arrange(architecture, source=source, order=order, norm_rule=norm_rule)


def arrange(
    architecture: Architecture, *, source: TensorSource, order: Sequence[FusionRun | int], norm_rule: NormRule
) -> ArrangedModel:
    """Return the model whose layers are these, in this order: layers of the source, or runs of them joined."""
    blocks = [
        _joined_block(architecture, origin) if isinstance(origin, FusionRun) else architecture.blocks[origin]
        for origin in order
    ]
    return ArrangedModel(
        architecture=architecture.with_blocks(blocks), tensors=_tensors(source, origins=order, norm_rule=norm_rule)
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
