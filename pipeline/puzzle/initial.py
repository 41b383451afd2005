"""Modules of one variant: with the weights surgery cuts from the parent, or with given ones."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.architecture import Architecture, AttentionSpec
from pipeline.model.checkpoint import TensorReader
from pipeline.model.heterogeneous import HeterogeneousDecoderLayer, build_subblock_attention, build_subblock_ffn
from pipeline.model.surgery import initial_attention, initial_ffn
from pipeline.puzzle.importance import Importance
from pipeline.puzzle.library import BlockKey


def build_variant(
    key: BlockKey,
    architecture: Architecture,
    parent_tensors: TensorReader,
    importance: Importance,
    *,
    dtype: torch.dtype,
) -> HeterogeneousDecoderLayer:
    """Return a variant as block distillation finds it: cut from the parent by surgery, in float32, then cast."""
    parent = architecture.homogeneous_block()
    prefix = f"model.layers.{key.layer}."
    # In float32, so that pooled heads and products of matrices are not rounded to a bf16 checkpoint's grain.
    tensors = {name: tensor.float() for name, tensor in parent_tensors.read_prefix(prefix).items()}
    spec = key.spec
    if isinstance(spec, AttentionSpec):
        initial = initial_attention(tensors, architecture=architecture, parent_spec=parent.attention, spec=spec)
    else:
        initial = initial_ffn(
            tensors,
            architecture=architecture,
            parent_spec=parent.ffn,
            spec=spec,
            channel_order_F=importance.channel_order(key.layer),
        )
    return module_with(key, architecture, initial, dtype=dtype)


def module_with(
    key: BlockKey, architecture: Architecture, tensors: Mapping[str, Tensor], *, dtype: torch.dtype
) -> HeterogeneousDecoderLayer:
    """Return a variant's module holding these tensors."""
    spec = key.spec
    if isinstance(spec, AttentionSpec):
        module = build_subblock_attention(architecture, spec, dtype=dtype)
    else:
        module = build_subblock_ffn(architecture, spec, dtype=dtype)
    module.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, strict=True)
    return module
