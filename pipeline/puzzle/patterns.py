"""What the layers of a child have in common: the patterns of `search.layers`. Pure."""

from collections.abc import Callable, Mapping, Sequence

from pipeline.architecture import NO_ATTENTION, NO_FFN, BlockSpec
from pipeline.recipe import LayerPattern

# What all layers share under each pattern that ties them; the others leave every layer its own choice.
SHARED: Mapping[LayerPattern, Callable[[BlockSpec], str]] = {
    "homogeneous": lambda block: block.key,
    "homogeneous_attention": lambda block: block.attention.key,
    "homogeneous_ffn": lambda block: block.ffn.key,
}


def is_kept_or_dropped(block: BlockSpec, *, parent: BlockSpec) -> bool:
    """Return whether a block is the parent's own, or a layer left out whole."""
    return (block.attention, block.ffn) in ((parent.attention, parent.ffn), (NO_ATTENTION, NO_FFN))


def free_choices(
    layers: Sequence[Sequence[BlockSpec]], pattern: LayerPattern, *, parent: BlockSpec
) -> list[list[list[BlockSpec]]]:
    """Return sets of layers that choose freely and which together hold every choice that the pattern allows."""
    if pattern == "depth_only":
        return [[[block for block in layer if is_kept_or_dropped(block, parent=parent)] for layer in layers]]
    shared = SHARED.get(pattern)
    if shared is None:
        return [[list(layer) for layer in layers]]
    alike = {shared(block) for block in layers[0]}.intersection(
        *({shared(block) for block in layer} for layer in layers)
    )
    return [[[block for block in layer if shared(block) == one] for layer in layers] for one in sorted(alike)]
