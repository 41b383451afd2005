"""Models put together in memory: each layer any mix of the parent's subblocks and the library's, no checkpoint written.

What scores one block and what scores whole models both run layers through here, a few windows at a time.

Letters: B rows, T tokens, D hidden_size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pipeline.architecture import BlockSpec
from pipeline.data.packed import PackedTokens
from pipeline.model.heterogeneous import HeterogeneousDecoderLayer, HeterogeneousLlamaForCausalLM, attention_inputs
from pipeline.recipe import Subblock

# Windows are batched up to this many tokens: enough that Python's share vanishes, few enough to stay in cache.
MAX_BATCH_TOKENS = 2048

LayerVariants = Mapping[tuple[Subblock, str], HeterogeneousDecoderLayer]
LoadVariants = Callable[[int], LayerVariants]


@dataclass(frozen=True, kw_only=True, slots=True)
class ComposedLayer:
    """The modules of one layer's two halves; None adds nothing."""

    attention: HeterogeneousDecoderLayer | None
    ffn: HeterogeneousDecoderLayer | None

    def attend(self, hidden_BTD: Tensor, **attention_kwargs: Any) -> Tensor:
        """Return x + attention(norm(x))."""
        return hidden_BTD if self.attention is None else self.attention.attend(hidden_BTD, **attention_kwargs)

    def feed_forward(self, hidden_BTD: Tensor) -> Tensor:
        """Return x + ffn(norm(x))."""
        return hidden_BTD if self.ffn is None else self.ffn.feed_forward(hidden_BTD)

    def __call__(self, hidden_BTD: Tensor, **attention_kwargs: Any) -> Tensor:
        """Return the layer's output."""
        return self.feed_forward(self.attend(hidden_BTD, **attention_kwargs))


def compose(
    model: HeterogeneousLlamaForCausalLM, layer: int, block: BlockSpec, variants: LayerVariants
) -> ComposedLayer:
    """Return one layer as `block` has it: the pair trained as one where there is one, else half by half.

    A half is from the parent `model` where the parent's own is asked, else a variant's.
    """
    if pair := variants.get(("pair", block.key)):
        return ComposedLayer(attention=pair, ffn=pair)
    own: Any = model.model.layers[layer]
    parent = own.block
    return ComposedLayer(
        attention=None
        if block.attention.kind == "no_op"
        else own
        if block.attention == parent.attention
        else variants["attention", block.attention.key],
        ffn=None if block.ffn.kind == "no_op" else own if block.ffn == parent.ffn else variants["ffn", block.ffn.key],
    )


def embed(model: HeterogeneousLlamaForCausalLM, packed: PackedTokens, rows: slice = slice(None)) -> Tensor:
    """Return the hidden states that reach layer 0, (B, T, D), of all windows or of some."""
    return model.model.embed_tokens(packed.tokens_NT[rows].to(next(model.parameters()).device))


def run_group(
    model: HeterogeneousLlamaForCausalLM,
    layers: Sequence[ComposedLayer],
    hidden_BTD: Tensor,
    packed: PackedTokens,
    rows: slice,
) -> Tensor:
    """Return the hidden states behind these layers for some windows of `packed`, which fit one batch."""
    kwargs = attention_kwargs(model, hidden_BTD, packed.position_ids_NT[rows])
    for layer in layers:
        hidden_BTD = layer(hidden_BTD, **kwargs)
    return hidden_BTD


def attention_kwargs(
    model: HeterogeneousLlamaForCausalLM, hidden_BTD: Tensor, position_ids_BT: Tensor
) -> dict[str, Any]:
    """Return what the attention of any layer takes for these rows."""
    return attention_inputs(
        model,
        batch_size=hidden_BTD.shape[0],
        num_tokens=hidden_BTD.shape[1],
        device=hidden_BTD.device,
        dtype=hidden_BTD.dtype,
        position_ids_BT=position_ids_BT.to(hidden_BTD.device),
    )


def window_groups(packed: PackedTokens) -> list[slice]:
    """Return groups of windows that fit one batch."""
    size = max(1, MAX_BATCH_TOKENS // packed.sequence_length)
    return [slice(start, min(start + size, len(packed))) for start in range(0, len(packed), size)]
