"""A child checkpoint from chosen blocks: the parent's tensors and the library's, streamed into one directory."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pipeline.architecture import Architecture, BlockSpec
from pipeline.artifacts import ArtifactStore
from pipeline.model.checkpoint import TensorReader, read_architecture, save_checkpoint
from pipeline.puzzle.library import BlockKey, LibraryIndex, Subblock, load_block

PREFIXES: Mapping[Subblock, tuple[str, ...]] = {
    "attention": ("self_attn.", "input_layernorm."),
    "ffn": ("mlp.", "post_attention_layernorm."),
}


def assemble_child(
    directory: Path,
    blocks: Sequence[BlockSpec],
    *,
    parent_dir: Path,
    index: LibraryIndex,
    store: ArtifactStore,
) -> Architecture:
    """Write the checkpoint in which layer i is `blocks[i]`, in the parent's own dtype, and return what it is."""
    parent = read_architecture(parent_dir)
    child = parent.with_blocks(blocks)
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("model*.safetensors*"):
        old.unlink()  # an earlier child may have had more shards
    save_checkpoint(
        directory,
        architecture=child,
        tensors=_child_tensors(parent, blocks, reader=TensorReader(parent_dir), index=index, store=store),
        tokenizer_dir=parent_dir,
    )
    return child


def _child_tensors(
    parent: Architecture,
    blocks: Sequence[BlockSpec],
    *,
    reader: TensorReader,
    index: LibraryIndex,
    store: ArtifactStore,
) -> Iterator[tuple[str, Tensor]]:
    for name in reader.names:
        if not name.startswith("model.layers."):
            yield name, reader.read(name)
    parent_block = parent.homogeneous_block()
    for layer, block in enumerate(blocks):
        prefix = f"model.layers.{layer}."
        dtype = reader.dtype(f"{prefix}input_layernorm.weight")
        if block.attention == parent_block.attention:
            yield from _parent_tensors(reader, prefix, "attention")
        elif block.attention.kind != "no_op":
            key = BlockKey(layer=layer, subblock="attention", variant=block.attention.key)
            yield from _library_tensors(load_block(store, index, key), prefix, dtype)
        if block.ffn == parent_block.ffn:
            yield from _parent_tensors(reader, prefix, "ffn")
        elif block.ffn.kind != "no_op":
            key = BlockKey(layer=layer, subblock="ffn", variant=block.ffn.key)
            yield from _library_tensors(load_block(store, index, key), prefix, dtype)


def _parent_tensors(reader: TensorReader, prefix: str, subblock: Subblock) -> Iterator[tuple[str, Tensor]]:
    wanted = tuple(prefix + start for start in PREFIXES[subblock])
    for name in reader.names:
        if name.startswith(wanted):
            yield name, reader.read(name)


def _library_tensors(tensors: Mapping[str, Tensor], prefix: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in sorted(tensors.items()):
        yield prefix + name, tensor.to(dtype)
