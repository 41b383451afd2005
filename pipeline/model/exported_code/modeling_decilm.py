"""A heterogeneous Llama in the DeciLM (nemotron-nas) format, built from transformers' own Llama modules.

Layers without attention own no slot of the KV cache and may stand anywhere.
"""

import copy
from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from .configuration_decilm import AttentionBlock, Block, DeciLMConfig, FFNBlock, ffn_width


class LinearAttention(nn.Module):
    """One matrix in place of attention."""

    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__()
        self.linear_attn = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)

    def forward(self, hidden_states: Tensor, **_: object) -> tuple[Tensor, None]:
        """Return the output and, as attention does, a place for weights."""
        return self.linear_attn(hidden_states), None


class LinearMLP(nn.Module):
    """One matrix in place of the FFN."""

    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__()
        self.linear_mlp = nn.Linear(config.hidden_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return W x."""
        return self.linear_mlp(hidden_states)


class DeciLMDecoderLayer(GradientCheckpointingLayer):
    """One layer; `cache_index` counts the layers with real attention before it."""

    def __init__(self, config: DeciLMConfig, block: Block, cache_index: int) -> None:
        super().__init__()
        self.block = block
        if not block.attention.no_op:
            self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.self_attn = _attention(config, block.attention, cache_index)
        if not block.ffn.no_op:
            self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.mlp = _ffn(config, block.ffn)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Return the layer's output."""
        if not self.block.attention.no_op:
            update, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
            hidden_states = hidden_states + update
        if not self.block.ffn.no_op:
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


class DeciLMModel(LlamaModel):
    """Embeddings, layers and final norm."""

    config_class = DeciLMConfig
    _no_split_modules = ["DeciLMDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": DeciLMDecoderLayer, "attentions": LlamaAttention}  # noqa: RUF012

    def __init__(self, config: DeciLMConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx = None
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers, cache_index = [], 0
        for block in config.block_configs or []:
            layers.append(DeciLMDecoderLayer(config, block, cache_index))
            cache_index += not (block.attention.no_op or block.attention.replace_with_linear)
        self.layers = nn.ModuleList(layers)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)  # pyright: ignore[reportArgumentType]
        self.gradient_checkpointing = False
        self.post_init()


class DeciLMForCausalLM(LlamaForCausalLM):
    """The language model."""

    config_class = DeciLMConfig
    _no_split_modules = ["DeciLMDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": DeciLMDecoderLayer, "attentions": LlamaAttention}  # noqa: RUF012

    def __init__(self, config: DeciLMConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = DeciLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def _attention(config: DeciLMConfig, block: AttentionBlock, cache_index: int) -> nn.Module:
    if block.replace_with_linear:
        return LinearAttention(config)
    if block.n_heads_in_group is None:
        raise ValueError(
            "block_configs: attention is neither no_op nor replace_with_linear, and has no n_heads_in_group"
        )
    shape: Any = copy.copy(config)
    shape.num_key_value_heads = config.num_attention_heads // block.n_heads_in_group
    attention = LlamaAttention(shape, layer_idx=cache_index)
    attention.config = config  # pyright: ignore[reportAttributeAccessIssue]  # so that the attention kernel can be changed
    return attention


def _ffn(config: DeciLMConfig, block: FFNBlock) -> nn.Module:
    if block.replace_with_linear:
        return LinearMLP(config)
    if block.ffn_mult is None:
        raise ValueError("block_configs: ffn is neither no_op nor replace_with_linear, and has no ffn_mult")
    shape: Any = copy.copy(config)
    shape.intermediate_size = ffn_width(block.ffn_mult, hidden_size=config.hidden_size)
    return LlamaMLP(shape)
