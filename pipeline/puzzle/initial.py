"""Modules of variants: with the weights surgery cuts from the parent, with the library's, or with given ones."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.architecture import Architecture
from pipeline.artifacts import ArtifactStore
from pipeline.model.checkpoint import TensorReader
from pipeline.model.heterogeneous import HeterogeneousDecoderLayer, build_layer
from pipeline.model.surgery import initial_attention, initial_ffn
from pipeline.puzzle.block_keys import BlockKey, trainable_keys
from pipeline.puzzle.composition import LayerVariants, LoadVariants
from pipeline.puzzle.importance import Importance
from pipeline.puzzle.library import LibraryIndex, load_block
from pipeline.puzzle.search_space import SearchSpace


def build_variant(
    key: BlockKey,
    architecture: Architecture,
    parent_tensors: TensorReader,
    importance: Importance,
    *,
    dtype: torch.dtype,
) -> HeterogeneousDecoderLayer:
    """Return a variant as block distillation finds it: cut from the parent by surgery, in float32, then cast."""
    parent, block = architecture.homogeneous_block(), key.block
    # In float32, so that pooled heads and products of matrices are not rounded to a bf16 checkpoint's grain.
    tensors = {
        name: tensor.float() for name, tensor in parent_tensors.read_prefix(f"model.layers.{key.layer}.").items()
    }
    attention = initial_attention(
        tensors,
        architecture=architecture,
        parent_spec=parent.attention,
        spec=block.attention,
        head_order_K=importance.head_order(key.layer),
    )
    ffn = initial_ffn(
        tensors,
        architecture=architecture,
        parent_spec=parent.ffn,
        spec=block.ffn,
        channel_order_F=importance.channel_order[key.layer],
    )
    return module_with(key, architecture, attention | ffn, dtype=dtype)


def module_with(
    key: BlockKey, architecture: Architecture, tensors: Mapping[str, Tensor], *, dtype: torch.dtype
) -> HeterogeneousDecoderLayer:
    """Return a variant's module holding these tensors."""
    module = build_layer(architecture, key.block, dtype=dtype)
    module.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, strict=True)
    return module


def library_variants(
    architecture: Architecture,
    *,
    index: LibraryIndex,
    store: ArtifactStore,
    dtype: torch.dtype,
    device: torch.device,
) -> LoadVariants:
    """Return what gives the library's modules of one layer."""

    def load(layer: int) -> LayerVariants:
        return {
            (key.subblock, key.variant): module_with(key, architecture, load_block(store, index, key), dtype=dtype).to(
                device
            )
            for key in index.keys_of(layer)
        }

    return load


def untrained_variants(
    space: SearchSpace,
    architecture: Architecture,
    *,
    parent_tensors: TensorReader,
    importance: Importance,
    dtype: torch.dtype,
    device: torch.device,
) -> LoadVariants:
    """Return what gives one layer's modules as surgery cuts them, before any distillation."""

    def load(layer: int) -> LayerVariants:
        return {
            (key.subblock, key.variant): build_variant(key, architecture, parent_tensors, importance, dtype=dtype).to(
                device
            )
            for key in trainable_keys(space)
            if key.layer == layer
        }

    return load
