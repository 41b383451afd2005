"""Which variants each layer of a parent may become. Pure: options in, specs out; no weights, no files.

A space lists attention and FFN options; every layer's candidates are their product. Options are put in one order (the
parent's own, then by falling size, linear, no-op), so the order of a recipe's list never changes a result.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from pipeline.architecture import (
    LINEAR_ATTENTION,
    LINEAR_FFN,
    NO_ATTENTION,
    NO_FFN,
    Architecture,
    AttentionSpec,
    BlockSpec,
    FFNSpec,
    gqa,
    swiglu,
)
from pipeline.errors import RecipeError
from pipeline.recipe import AttentionOption, Backend, FFNOption, Pin, SearchSpaceConfig

PORTABLE_WIDTH_MULTIPLE = 256
NARROW_WIDTH_MULTIPLE = 8

_Item = TypeVar("_Item")


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerOptions:
    """What one layer may become; the parent's own variants come first wherever they are allowed."""

    attention: tuple[AttentionSpec, ...]
    ffn: tuple[FFNSpec, ...]
    blocks: tuple[BlockSpec, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSpace:
    """The candidates of every layer of one parent."""

    parent: BlockSpec
    layers: tuple[LayerOptions, ...]

    @property
    def distinct_attention(self) -> tuple[AttentionSpec, ...]:
        """Every attention variant of any layer, once."""
        return _ordered_attention(
            [self.parent.attention, *(spec for options in self.layers for spec in options.attention)],
            parent=self.parent.attention,
        )

    @property
    def distinct_ffn(self) -> tuple[FFNSpec, ...]:
        """Every FFN variant of any layer, once."""
        return _ordered_ffn(
            [self.parent.ffn, *(spec for options in self.layers for spec in options.ffn)], parent=self.parent.ffn
        )

    @property
    def num_candidates(self) -> int:
        """Composed blocks over all layers, those equal to the parent's left out."""
        return sum(
            (block.attention, block.ffn) != (self.parent.attention, self.parent.ffn)
            for options in self.layers
            for block in options.blocks
        )


def resolve(search_space: SearchSpaceConfig, architecture: Architecture) -> SearchSpace:
    """Return the variants and composed blocks of each layer of this parent.

    With `portable`, layer 0 keeps real attention, the last layer keeps an FFN, and no block has attention without an
    FFN: llama.cpp computes that block wrongly and loads neither of the other two.

    Raises:
        RecipeError: when an option does not fit the parent, or a layer is left without any candidate.
    """
    parent = architecture.homogeneous_block()
    num_layers = architecture.num_hidden_layers
    attention: list[Sequence[AttentionOption]] = [search_space.attention] * num_layers
    ffn: list[Sequence[FFNOption]] = [search_space.ffn] * num_layers
    for override in search_space.overrides:
        for layer in override.layers:
            if not 0 <= layer < num_layers:
                raise RecipeError(
                    f"search_space.overrides names layer {layer}; the parent has layers 0 to {num_layers - 1}"
                )
            attention[layer] = attention[layer] if override.attention is None else override.attention
            ffn[layer] = ffn[layer] if override.ffn is None else override.ffn
    layers = [
        _layer_options(
            layer=layer,
            is_last=layer == num_layers - 1,
            attention=[resolve_attention(option, parent=parent.attention) for option in attention[layer]],
            ffn=[resolve_ffn(option, parent=parent.ffn) for option in ffn[layer]],
            parent=parent,
            portable=search_space.portable,
        )
        for layer in range(num_layers)
    ]
    return SearchSpace(parent=parent, layers=tuple(layers))


def dropped(layer: int) -> BlockSpec:
    """Return what is left of a layer that is left out."""
    return BlockSpec(attention=NO_ATTENTION, ffn=NO_FFN, parent_layers=(layer,))


def pinned_blocks(space: SearchSpace, pins: Sequence[Pin]) -> list[list[BlockSpec]]:
    """Return the blocks that a target's pins leave each layer of a space; see `pinned`."""
    return pinned([options.blocks for options in space.layers], pins, parent=space.parent, block_of=lambda block: block)


def pinned(
    layers: Sequence[Sequence[_Item]],
    pins: Sequence[Pin],
    *,
    parent: BlockSpec,
    block_of: Callable[[_Item], BlockSpec],
    are: str = "",
) -> list[list[_Item]]:
    """Return what a target's pins leave of the blocks of each layer, or of whatever else `block_of` finds blocks in.

    Raises:
        RecipeError: when a pin names a layer that the parent does not have, or leaves one without a block; `are` says
            what its blocks are besides.
    """
    left = [list(candidates) for candidates in layers]
    for pin in pins:
        attention = None if pin.attention is None else resolve_attention(pin.attention, parent=parent.attention)
        ffn = None if pin.ffn is None else resolve_ffn(pin.ffn, parent=parent.ffn)
        for layer in pin.layers:
            if not 0 <= layer < len(left):
                raise RecipeError(f"a pin names layer {layer}; the parent has layers 0 to {len(left) - 1}")
            left[layer] = [
                one
                for one in left[layer]
                if attention in (None, block_of(one).attention) and ffn in (None, block_of(one).ffn)
            ]
            if not left[layer]:
                raise RecipeError(
                    f"the pins of layer {layer} (attention {pin.attention}, ffn {pin.ffn}) leave none of its "
                    f"{are}blocks {[block_of(one).key for one in layers[layer]]}: add the option to search_space"
                )
    return left


def resolve_attention(option: AttentionOption, *, parent: AttentionSpec) -> AttentionSpec:
    """Return the attention an option stands for; a share is the most key/value heads that it leaves and that divide.

    Raises:
        RecipeError: when its key/value heads do not divide the parent's.
    """
    if option == "parent":
        return parent
    if option == "linear":
        return LINEAR_ATTENTION
    if option == "no_op":
        return NO_ATTENTION
    heads = parent.num_key_value_heads
    assert heads is not None
    if isinstance(option, float):
        return gqa(
            max(count for count in range(1, heads + 1) if heads % count == 0 and count <= max(1, option * heads))
        )
    if heads % option:
        raise RecipeError(
            f"attention option {option} key/value heads does not divide the parent's {heads}: heads are averaged in "
            f"equal groups; choose one of {[count for count in range(1, heads + 1) if heads % count == 0]}"
        )
    return gqa(option)


def resolve_ffn(option: FFNOption, *, parent: FFNSpec) -> FFNSpec:
    """Return the FFN an option stands for.

    A share of the width is rounded down to a multiple of 256, or of 8 where less than 256 is left: what kernels like
    and, from 256 on, what stock runtimes load.

    Raises:
        RecipeError: when it is wider than the parent's.
    """
    if option == "parent":
        return parent
    if option == "linear":
        return LINEAR_FFN
    if option == "no_op":
        return NO_FFN
    width = parent.intermediate_size
    assert width is not None
    if isinstance(option, float):
        exact = option * width
        multiple = PORTABLE_WIDTH_MULTIPLE if exact >= PORTABLE_WIDTH_MULTIPLE else NARROW_WIDTH_MULTIPLE
        # A share that is a multiple in decimals may lie a rounding error below it: 0.58 of 12,800 is 7,424.
        return swiglu(max(1, int(exact / multiple + 1e-9)) * multiple)
    if option > width:
        raise RecipeError(f"ffn option {option} is wider than the parent's intermediate_size of {width}; choose less")
    return swiglu(option)


def attention_from_key(key: str) -> AttentionSpec:
    """Return the attention whose `key` this is."""
    return gqa(int(key[2:])) if key.startswith("kv") else AttentionSpec.model_validate({"kind": key})


def ffn_from_key(key: str) -> FFNSpec:
    """Return the FFN whose `key` this is."""
    return swiglu(int(key[3:])) if key.startswith("ffn") else FFNSpec.model_validate({"kind": key})


def require_timeable(space: SearchSpace, *, backend: Backend | Literal["roofline"]) -> None:
    """Refuse variants that a runtime does not have: llama.cpp no linear FFN, vLLM neither that nor linear attention.

    Raises:
        RecipeError: naming the variant.
    """
    found = []
    if backend in ("llama_cpp", "vllm"):
        found += [("ffn", spec) for spec in space.distinct_ffn if spec == LINEAR_FFN]
    if backend == "vllm":
        found += [("attention", spec) for spec in space.distinct_attention if spec == LINEAR_ATTENTION]
    if found:
        name = {"llama_cpp": "llama.cpp", "vllm": "vLLM"}[backend]
        raise RecipeError(
            f"search_space.{found[0][0]} lists 'linear', which {name} does not have: take it out, or set "
            "block_profile.backend: torch"
        )


def _layer_options(
    *,
    layer: int,
    is_last: bool,
    attention: Sequence[AttentionSpec],
    ffn: Sequence[FFNSpec],
    parent: BlockSpec,
    portable: bool,
) -> LayerOptions:
    attention = _ordered_attention(attention, parent=parent.attention)
    ffn = _ordered_ffn(ffn, parent=parent.ffn)
    if portable:
        for spec in (*attention, *ffn):
            _require_portable(spec, layer=layer)
    blocks = tuple(
        BlockSpec(attention=one, ffn=other, parent_layers=(layer,))
        for one in attention
        for other in ffn
        if not portable or _is_portable_block(one, other, is_first=layer == 0, is_last=is_last)
    )
    if not blocks:
        raise RecipeError(
            f"search_space leaves layer {layer} without a portable block: attention {[spec.key for spec in attention]} "
            f"with ffn {[spec.key for spec in ffn]}; add 'parent' there or set portable: false"
        )
    return LayerOptions(
        attention=tuple(spec for spec in attention if any(block.attention == spec for block in blocks)),
        ffn=tuple(spec for spec in ffn if any(block.ffn == spec for block in blocks)),
        blocks=blocks,
    )


def _require_portable(spec: AttentionSpec | FFNSpec, *, layer: int) -> None:
    if spec.kind == "linear":
        raise RecipeError(
            f"layer {layer} lists a linear subblock, which stock runtimes do not load; remove 'linear' from the search "
            "space or set portable: false"
        )
    if isinstance(spec, FFNSpec) and spec.intermediate_size and spec.intermediate_size % PORTABLE_WIDTH_MULTIPLE:
        raise RecipeError(
            f"layer {layer} lists an FFN of width {spec.intermediate_size}, not a multiple of "
            f"{PORTABLE_WIDTH_MULTIPLE}; choose such widths or set portable: false"
        )


def _is_portable_block(attention: AttentionSpec, ffn: FFNSpec, *, is_first: bool, is_last: bool) -> bool:
    if is_first and attention.kind != "gqa":
        return False
    if is_last and ffn.kind == "no_op":
        return False
    return attention.kind == "no_op" or ffn.kind != "no_op"


def attention_rank(spec: AttentionSpec) -> tuple[int, int]:
    """Return what orders attention from the largest: by falling number of key/value heads, then linear, then none."""
    return ("gqa", "linear", "no_op").index(spec.kind), -(spec.num_key_value_heads or 0)


def ffn_rank(spec: FFNSpec) -> tuple[int, int]:
    """Return what orders FFNs from the largest: by falling width, then linear, then none."""
    return ("swiglu", "linear", "no_op").index(spec.kind), -(spec.intermediate_size or 0)


def _ordered_attention(specs: Sequence[AttentionSpec], *, parent: AttentionSpec) -> tuple[AttentionSpec, ...]:
    distinct = {spec.key: spec for spec in specs}.values()
    return tuple(sorted(distinct, key=lambda one: (one != parent, attention_rank(one))))


def _ordered_ffn(specs: Sequence[FFNSpec], *, parent: FFNSpec) -> tuple[FFNSpec, ...]:
    distinct = {spec.key: spec for spec in specs}.values()
    return tuple(sorted(distinct, key=lambda one: (one != parent, ffn_rank(one))))
