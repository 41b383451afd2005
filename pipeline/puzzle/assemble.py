"""A child checkpoint from chosen blocks: the parent's tensors and the library's, streamed into one directory."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pipeline.architecture import Architecture, BlockSpec
from pipeline.artifacts import ArtifactStore
from pipeline.errors import CheckpointError
from pipeline.model.checkpoint import TensorReader, read_architecture
from pipeline.model.shards import DTYPE_BYTES, checkpoint_shapes, plan_shards
from pipeline.model.streaming import StoredTensor, read_chunks, stored_tensors, stream_checkpoint
from pipeline.puzzle.library import LibraryIndex, block_weights

Source = tuple[StoredTensor, str]
"""Where a tensor of the child lies, and the dtype that the child holds it in."""

PREFIXES: Mapping[str, tuple[str, ...]] = {
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
    """Write the checkpoint in which layer i is `blocks[i]`, in the parent's own dtype, and return what it is.

    Every source is found and checked before the first byte is written; memory does not grow with the model.

    Raises:
        CheckpointError: when a tensor is missing, unexpected, cut off, or not of the child's shape.
        ArtifactError: when the library has no weights for a block.
    """
    parent = read_architecture(parent_dir)
    child = parent.with_blocks(blocks)
    sources = dict(_child_sources(parent, blocks, reader=TensorReader(parent_dir), index=index, store=store))
    _require_fit(sources, child)
    layout = plan_shards(child, dtype_of=lambda name: sources[name][1])
    stream_checkpoint(
        directory,
        architecture=child,
        layout=layout,
        read=lambda tensor: read_chunks(sources[tensor.name][0], dtype=tensor.dtype),
        tokenizer_dir=parent_dir,
    )
    return child


def _child_sources(
    parent: Architecture,
    blocks: Sequence[BlockSpec],
    *,
    reader: TensorReader,
    index: LibraryIndex,
    store: ArtifactStore,
) -> Iterator[tuple[str, Source]]:
    shards = {path: stored_tensors(path) for path in {reader.path(name) for name in reader.names}}
    held = {name: shards[reader.path(name)][name] for name in reader.names}
    for name, tensor in held.items():
        if not name.startswith("model.layers."):
            yield name, (tensor, tensor.dtype)
    parent_block = parent.homogeneous_block()
    for layer, block in enumerate(blocks):
        prefix = f"model.layers.{layer}."
        dtype = _stored_dtype(held, f"{prefix}input_layernorm.weight", reader=reader)
        parts = index.parts(block, layer=layer, parent=parent_block)
        for key in parts:
            tensors = stored_tensors(block_weights(store, index, key))
            yield from ((prefix + name, (tensor, dtype)) for name, tensor in tensors.items())
        taken = {key.subblock for key in parts}
        for subblock, spec in (("attention", block.attention), ("ffn", block.ffn)):
            if spec.kind != "no_op" and not taken & {subblock, "pair"}:
                wanted = tuple(prefix + start for start in PREFIXES[subblock])
                yield from ((name, (held[name], held[name].dtype)) for name in held if name.startswith(wanted))


def _stored_dtype(held: Mapping[str, StoredTensor], name: str, *, reader: TensorReader) -> str:
    """Return the dtype of a parent tensor as its file spells it; refused when missing or quantised."""
    reader.dtype(name)
    return held[name].dtype


def _require_fit(sources: Mapping[str, Source], child: Architecture) -> None:
    """Refuse sources that are not the child's tensors, before anything is written."""
    expected = checkpoint_shapes(child)
    for name, (tensor, _) in sources.items():
        if name not in expected:
            raise CheckpointError(f"{tensor.path}: tensor {name} is not part of the child's architecture")
        if tensor.shape != expected[name]:
            raise CheckpointError(
                f"{tensor.path}: tensor {name} has shape {tensor.shape}, the child's architecture asks for "
                f"{expected[name]}"
            )
        if tensor.dtype not in DTYPE_BYTES:
            raise CheckpointError(
                f"{tensor.path}: tensor {name} is stored as {tensor.dtype}; weights must be one of "
                f"{', '.join(DTYPE_BYTES)}: convert the checkpoint first"
            )
    missing = [name for name in expected if name not in sources]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of the child's {len(expected)} tensors are neither in the parent nor in the library, the "
            f"first is {missing[0]}: import the parent again"
        )
