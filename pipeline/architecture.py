"""What a model is: the shape shared by all its layers and one BlockSpec per layer. No torch, no files.

An Architecture describes parents and children alike; a parent is the architecture in which every block is equal.
Sizes are spelled as in Hugging Face configurations.
"""

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.errors import CheckpointError


class Frozen(BaseModel):
    """A value that crosses a process or a disk: immutable, and no key is ever ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class AttentionSpec(Frozen):
    """The attention subblock of one layer.

    `gqa` is grouped-query attention with `num_key_value_heads`; `linear` is one hidden_size x hidden_size matrix;
    `no_op` leaves the residual stream untouched, and the subblock's norm goes with it.
    """

    kind: Literal["gqa", "linear", "no_op"]
    num_key_value_heads: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _heads_belong_to_gqa(self) -> Self:
        if (self.kind == "gqa") != (self.num_key_value_heads is not None):
            raise ValueError(f"num_key_value_heads is {self.num_key_value_heads} for kind {self.kind!r}")
        return self

    @property
    def key(self) -> str:
        """A short, stable name: kv3, linear, no_op."""
        return f"kv{self.num_key_value_heads}" if self.kind == "gqa" else self.kind


class FFNSpec(Frozen):
    """The FFN subblock of one layer: gated `swiglu` of `intermediate_size`, one `linear` matrix, or `no_op`."""

    kind: Literal["swiglu", "linear", "no_op"]
    intermediate_size: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _width_belongs_to_swiglu(self) -> Self:
        if (self.kind == "swiglu") != (self.intermediate_size is not None):
            raise ValueError(f"intermediate_size is {self.intermediate_size} for kind {self.kind!r}")
        return self

    @property
    def key(self) -> str:
        """A short, stable name: ffn1536, linear, no_op."""
        return f"ffn{self.intermediate_size}" if self.kind == "swiglu" else self.kind


def gqa(num_key_value_heads: int) -> AttentionSpec:
    """Return grouped-query attention with that many key/value heads."""
    return AttentionSpec(kind="gqa", num_key_value_heads=num_key_value_heads)


def swiglu(intermediate_size: int) -> FFNSpec:
    """Return a gated FFN of that width."""
    return FFNSpec(kind="swiglu", intermediate_size=intermediate_size)


NO_ATTENTION = AttentionSpec(kind="no_op")
LINEAR_ATTENTION = AttentionSpec(kind="linear")
NO_FFN = FFNSpec(kind="no_op")
LINEAR_FFN = FFNSpec(kind="linear")


class BlockSpec(Frozen):
    """One transformer layer, and the consecutive parent layers whose work it does.

    `parent_layers` changes no computation: the block's output stands where the output of the last of them stood, which
    is what distillation compares and what the report draws. A fused block names every layer it joined.
    """

    attention: AttentionSpec
    ffn: FFNSpec
    parent_layers: tuple[int, ...] = Field(min_length=1)

    @property
    def key(self) -> str:
        """The two subblocks' names: kv3+ffn1536."""
        return f"{self.attention.key}+{self.ffn.key}"


class RopeScaling(Frozen):
    """The llama3 rule for rotary frequencies beyond the pre-training context."""

    rope_type: Literal["llama3"]
    factor: float = Field(gt=0)
    low_freq_factor: float = Field(gt=0)
    high_freq_factor: float = Field(gt=0)
    original_max_position_embeddings: int = Field(ge=1)


class Architecture(Frozen):
    """A Llama in which every layer may differ in its key/value heads, its FFN width, or lack either subblock."""

    vocab_size: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    head_dim: int = Field(ge=2)
    max_position_embeddings: int = Field(ge=1)
    rms_norm_eps: float = Field(gt=0)
    rope_theta: float = Field(gt=0)
    rope_scaling: RopeScaling | None
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    blocks: tuple[BlockSpec, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        for layer, block in enumerate(self.blocks):
            heads = block.attention.num_key_value_heads
            if heads is not None and self.num_attention_heads % heads:
                raise ValueError(
                    f"layer {layer} has {heads} key/value heads, which does not divide {self.num_attention_heads} "
                    "attention heads"
                )
        return self

    @property
    def num_hidden_layers(self) -> int:
        """The number of layers, attention-free and identity layers included."""
        return len(self.blocks)

    def with_blocks(self, blocks: Sequence[BlockSpec]) -> Self:
        """Return the same model shape around other blocks."""
        return type(self).model_validate({**self.model_dump(), "blocks": [block.model_dump() for block in blocks]})

    def homogeneous_block(self) -> BlockSpec:
        """Return the block that every layer of this parent is.

        Raises:
            CheckpointError: if the layers differ, as they do in a child, or lack a real attention or FFN.
        """
        first = self.blocks[0]
        for layer, block in enumerate(self.blocks):
            if (block.attention, block.ffn) != (first.attention, first.ffn):
                raise CheckpointError(
                    f"layer {layer} is {block.key} while layer 0 is {first.key}: a parent must have equal layers; "
                    "give the original Llama checkpoint as the parent"
                )
        if (first.attention.kind, first.ffn.kind) != ("gqa", "swiglu"):
            raise CheckpointError(
                f"every layer is {first.key}: a parent has grouped-query attention and a gated FFN in every layer"
            )
        return first

    def to_json(self) -> dict[str, Any]:
        """Return the plain JSON form written to architecture.json."""
        return self.model_dump(mode="json")
