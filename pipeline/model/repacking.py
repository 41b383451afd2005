"""The same function in fewer, more common layers: what an export changes so that stock runtimes take it. No files.

A model is a sequence of residual subblocks x + f(x), and a layer is at most one attention followed by at most one FFN:

    re-packing        the sequence is refilled into layers from the front; layers without subblocks disappear
    first attention   x + 0: an attention of one key/value head, its weights zero, where layer 0 has none
    padding           FFN channels whose gate, up and down weights are zero, up to the next multiple of 256

The sum over subblocks and its order stay, so re-packing and the first attention leave every logit bit for bit what it
was. Padding adds zeros to sums, which a matmul may then split differently: equal up to rounding.

Letters: D hidden_size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.architecture import NO_ATTENTION, NO_FFN, Architecture, BlockSpec, gqa, swiglu
from pipeline.model.checkpoint import TensorReader
from pipeline.model.decilm_config import padded_width
from pipeline.model.shards import checkpoint_shapes

_ATTENTION_MODULES = ("input_layernorm", "self_attn")


@dataclass(frozen=True, slots=True)
class Sources:
    """The checkpoint's layers that gave a layer its attention and its FFN; None where it has none of its own."""

    attention: int | None
    ffn: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Repacking:
    """A re-packed architecture, and for each of its layers where the subblocks came from."""

    architecture: Architecture
    sources: tuple[Sources, ...]


def repack(architecture: Architecture) -> Repacking:
    """Return the architecture with its subblocks refilled into as few layers as hold them in their order.

    A layer that disappears leaves its parent layers to the one before it, whose output now stands where its own stood;
    at the front, to the one behind it. A model without any subblock keeps one empty layer.
    """
    packed: list[tuple[Sources, list[int]]] = []
    leading: list[int] = []
    for layer, block in enumerate(architecture.blocks):
        has_attention, has_ffn = block.attention != NO_ATTENTION, block.ffn != NO_FFN
        if has_attention or (has_ffn and (not packed or packed[-1][0].ffn is not None)):
            sources = Sources(layer if has_attention else None, layer if has_ffn else None)
            packed.append((sources, [*leading, *block.parent_layers]))
            leading = []
            continue
        if has_ffn:
            packed[-1] = Sources(packed[-1][0].attention, layer), packed[-1][1]
        (packed[-1][1] if packed else leading).extend(block.parent_layers)
    if not packed:
        packed = [(Sources(None, None), leading)]
    blocks = [
        BlockSpec(
            attention=NO_ATTENTION if sources.attention is None else architecture.blocks[sources.attention].attention,
            ffn=NO_FFN if sources.ffn is None else architecture.blocks[sources.ffn].ffn,
            parent_layers=tuple(parent_layers),
        )
        for sources, parent_layers in packed
    ]
    return Repacking(architecture=architecture.with_blocks(blocks), sources=tuple(sources for sources, _ in packed))


def with_first_attention(architecture: Architecture) -> Architecture:
    """Return the architecture with one key/value head in layer 0 where that has no attention."""
    first, *others = architecture.blocks
    if first.attention != NO_ATTENTION:
        return architecture
    return architecture.with_blocks([first.model_copy(update={"attention": gqa(1)}), *others])


def padded(architecture: Architecture) -> Architecture:
    """Return the architecture with every FFN width raised to a multiple of 256."""
    blocks: list[BlockSpec] = []
    for block in architecture.blocks:
        width = block.ffn.intermediate_size
        ffn = block.ffn if width is None else swiglu(padded_width(width))
        blocks.append(block.model_copy(update={"ffn": ffn}))
    return architecture.with_blocks(blocks)


def portable(architecture: Architecture) -> Repacking:
    """Return the architecture re-packed, with attention in layer 0, and padded."""
    repacked = repack(architecture)
    return Repacking(architecture=padded(with_first_attention(repacked.architecture)), sources=repacked.sources)


class RepackedTensors:
    """The tensors of a re-packed checkpoint, each read, padded or made up when it is asked for."""

    def __init__(self, reader: TensorReader, repacking: Repacking) -> None:
        self._reader = reader
        self._sources: Sequence[Sources] = repacking.sources
        self._shapes = checkpoint_shapes(repacking.architecture)
        self.dtype: torch.dtype = reader.dtype("model.embed_tokens.weight")

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor's name, sorted."""
        return tuple(sorted(self._shapes))

    def read(self, name: str) -> Tensor:
        """Return one tensor in memory of its own."""
        shape = self._shapes[name]
        if not name.startswith("model.layers."):
            return self._reader.read(name)
        layer, _, relative = name.removeprefix("model.layers.").partition(".")
        sources = self._sources[int(layer)]
        is_attention = relative.startswith(_ATTENTION_MODULES)
        source = sources.attention if is_attention else sources.ffn
        if source is None:
            # The weight of the norm may be anything that keeps the zeros behind it zero.
            return torch.zeros(shape, dtype=self.dtype)
        return _zero_padded(self._reader.read(f"model.layers.{source}.{relative}"), shape)


def _zero_padded(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    missing = [wanted - got for wanted, got in zip(shape, tensor.shape, strict=True)]
    assert min(missing) >= 0, "padding never takes anything away"
    if not any(missing):
        return tensor
    return nn.functional.pad(tensor, [size for extra in reversed(missing) for size in (0, extra)])
