"""What a library is made of, by name: variants of a layer's two subblocks, and pairs trained as one. No torch."""

from dataclasses import dataclass
from typing import Literal

from pipeline.architecture import NO_ATTENTION, NO_FFN, BlockSpec
from pipeline.puzzle.search_space import SearchSpace, attention_from_key, ffn_from_key, resolve_attention, resolve_ffn
from pipeline.recipe import BlockLibraryConfig, CoupledSpace, Subblock


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class BlockKey:
    """One variant of one layer's attention or FFN, or one pair of both (`kv1+ffn256`)."""

    layer: int
    subblock: Subblock
    variant: str

    @property
    def block(self) -> BlockSpec:
        """What the variant is: a layer whose other subblock, where it has none of its own, is a no-op."""
        attention, ffn = {
            "attention": (self.variant, NO_FFN.key),
            "ffn": (NO_ATTENTION.key, self.variant),
            "pair": self.variant.partition("+")[::2],
        }[self.subblock]
        return BlockSpec(attention=attention_from_key(attention), ffn=ffn_from_key(ffn), parent_layers=(self.layer,))

    def __str__(self) -> str:
        return f"layer {self.layer} {self.subblock} {self.variant}"


def single_keys(space: SearchSpace) -> tuple[BlockKey, ...]:
    """Return every variant of the space, the parent's own and no-ops included."""
    found: list[BlockKey] = []
    for layer, options in enumerate(space.layers):
        found += [BlockKey(layer=layer, subblock="attention", variant=spec.key) for spec in options.attention]
        found += [BlockKey(layer=layer, subblock="ffn", variant=spec.key) for spec in options.ffn]
    return tuple(found)


def trainable_keys(space: SearchSpace) -> tuple[BlockKey, ...]:
    """Return every variant of the space that has weights of its own: neither the parent's nor a no-op."""
    return tuple(key for key in single_keys(space) if why_untrained(key, space) is None)


def pair_keys(space: SearchSpace, coupled_space: CoupledSpace | None) -> tuple[BlockKey, ...]:
    """Return every pair of the space with something to train; with a coupled space, those of its options alone.

    The parent's own subblock is trained in company: beside no attention it can learn to make up for it.
    """
    attention = ffn = None
    if coupled_space is not None:
        attention = [resolve_attention(option, parent=space.parent.attention) for option in coupled_space.attention]
        ffn = [resolve_ffn(option, parent=space.parent.ffn) for option in coupled_space.ffn]
    keys = (
        BlockKey(layer=layer, subblock="pair", variant=block.key)
        for layer, options in enumerate(space.layers)
        for block in options.blocks
        if (attention is None or block.attention in attention) and (ffn is None or block.ffn in ffn)
    )
    return tuple(key for key in keys if why_untrained(key, space) is None)


def library_keys(space: SearchSpace, settings: BlockLibraryConfig) -> tuple[BlockKey, ...]:
    """Return everything that the library trains."""
    singles = trainable_keys(space) if settings.mode != "coupled" else ()
    pairs = pair_keys(space, settings.coupled_space) if settings.mode != "decoupled" else ()
    return (*singles, *pairs)


def why_untrained(key: BlockKey, space: SearchSpace) -> Literal["parent", "no_op"] | None:
    """Return why a variant has no weights of its own; None for one that is trained."""
    block, parent = key.block, space.parent
    own = [spec for spec in (block.attention, block.ffn) if spec.kind != "no_op"]
    if not own:
        return "no_op"
    if key.subblock == "pair":
        return "parent" if own == [parent.attention, parent.ffn] else None
    return "parent" if own[0] in (parent.attention, parent.ffn) else None
