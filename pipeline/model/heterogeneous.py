"""A Llama whose layers differ: each has its own key/value heads and FFN width, or lacks either subblock.

Built from the modules of transformers' own Llama, so that the architecture in which all layers are equal computes bit
for bit what LlamaForCausalLM computes. Weights come from pipeline.model.checkpoint; nothing here touches files.

Letters: B batch, T tokens, D hidden_size.
"""

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.masking_utils import create_causal_mask
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

from pipeline.architecture import NO_ATTENTION, NO_FFN, Architecture, AttentionSpec, BlockSpec, FFNSpec


class HeterogeneousLlamaConfig(PreTrainedConfig):
    """An Architecture in the form that transformers' modules and `generate` read."""

    model_type = "refit-llama"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers declares it a plain list)

    def __init__(self, *, architecture: Architecture | dict[str, Any] | None = None, **kwargs: Any) -> None:
        # transformers builds a config without arguments to find out what differs from the defaults.
        if architecture is not None:
            architecture = Architecture.model_validate(architecture)
            self._set_sizes(architecture)
            eos_ids = list(architecture.eos_token_ids)
            kwargs |= {
                "tie_word_embeddings": architecture.tie_word_embeddings,
                "bos_token_id": architecture.bos_token_id,
                "eos_token_id": (eos_ids[0] if len(eos_ids) == 1 else eos_ids) if eos_ids else None,
                "pad_token_id": architecture.pad_token_id,
            }
        self.architecture = architecture
        kwargs.setdefault("attn_implementation", "sdpa")
        super().__init__(**kwargs)

    def _set_sizes(self, architecture: Architecture) -> None:
        self.vocab_size = architecture.vocab_size
        self.hidden_size = architecture.hidden_size
        self.num_hidden_layers = architecture.num_hidden_layers
        self.num_attention_heads = architecture.num_attention_heads
        self.head_dim = architecture.head_dim
        self.max_position_embeddings = architecture.max_position_embeddings
        self.rms_norm_eps = architecture.rms_norm_eps
        self.attention_bias = architecture.attention_bias
        self.mlp_bias = architecture.mlp_bias
        self.rope_parameters = rope_parameters(architecture)
        self.hidden_act = "silu"
        self.attention_dropout = 0.0
        self.initializer_range = 0.02
        self.use_cache = True

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, the architecture included."""
        plain = super().to_dict()
        plain["architecture"] = self.architecture.to_json() if self.architecture is not None else None
        return plain


def rope_parameters(architecture: Architecture) -> dict[str, Any]:
    """Return the rotary settings as transformers 5 spells them."""
    scaling = architecture.rope_scaling
    return {
        **(scaling.model_dump() if scaling is not None else {"rope_type": "default"}),
        "rope_theta": architecture.rope_theta,
    }


class LinearAttention(nn.Module):
    """One matrix in place of attention: every token sees itself alone."""

    def __init__(self, config: HeterogeneousLlamaConfig) -> None:
        super().__init__()
        self.linear_attn = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)

    def forward(self, hidden_states: Tensor, **_: object) -> tuple[Tensor, None]:
        """Return the output and, as attention does, a place for weights."""
        return self.linear_attn(hidden_states), None


class LinearMLP(nn.Module):
    """One matrix in place of the gated FFN."""

    def __init__(self, config: HeterogeneousLlamaConfig) -> None:
        super().__init__()
        self.linear_mlp = nn.Linear(config.hidden_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Return W x."""
        return self.linear_mlp(hidden_BTD)


class ExactRotaryEmbedding(LlamaRotaryEmbedding):
    """Rotary embedding whose frequencies keep fp32 when the model is converted.

    `model.to(bfloat16)` and DeepSpeed's bf16 mode convert buffers too; frequencies of 8 bits turn distant positions by
    the wrong angle.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = {name: buffer for name, buffer in self.named_buffers() if buffer.dtype == torch.float32}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self


class HeterogeneousDecoderLayer(GradientCheckpointingLayer):
    """One layer: x + attention(norm(x)), then x + ffn(norm(x)); a no-op subblock has no modules and adds nothing.

    A single subblock is a layer whose other subblock is a no-op: same code, same tensor names.
    `cache_index` counts the layers with real attention before this one, so that attention-free layers own no slot of
    the KV cache and slot 0 always holds the true sequence length, wherever they stand.
    """

    def __init__(self, config: HeterogeneousLlamaConfig, *, block: BlockSpec, cache_index: int) -> None:
        super().__init__()
        self.block = block
        if block.attention.kind != "no_op":
            self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.self_attn = _attention(config, block.attention, cache_index=cache_index)
        if block.ffn.kind != "no_op":
            self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.mlp = _ffn(config, block.ffn)

    def attend(self, hidden_BTD: Tensor, *, unit_BTD: Tensor | None = None, **attention_kwargs: Any) -> Tensor:
        """Return x + attention(norm(x)); `attention_kwargs` are those of `attention_inputs`.

        `unit_BTD` is `unit_rms` of x where that is there already, as for many blocks on the same x.
        """
        if self.block.attention.kind == "no_op":
            return hidden_BTD
        normed_BTD = _normed(self.input_layernorm, hidden_BTD, unit_BTD)
        update_BTD, _ = self.self_attn(hidden_states=normed_BTD, **attention_kwargs)
        return hidden_BTD + update_BTD

    def feed_forward(self, hidden_BTD: Tensor, *, unit_BTD: Tensor | None = None) -> Tensor:
        """Return x + ffn(norm(x)); `unit_BTD` as for `attend`."""
        if self.block.ffn.kind == "no_op":
            return hidden_BTD
        return hidden_BTD + self.mlp(_normed(self.post_attention_layernorm, hidden_BTD, unit_BTD))

    def forward(self, hidden_BTD: Tensor, **attention_kwargs: Any) -> Tensor:
        """Return the layer's output."""
        return self.feed_forward(self.attend(hidden_BTD, **attention_kwargs))


def unit_rms(hidden_BTD: Tensor, *, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps), which a norm multiplies by its weight; the bits of LlamaRMSNorm's."""
    exact_BTD = hidden_BTD.float()
    return (exact_BTD * torch.rsqrt(exact_BTD.square().mean(dim=-1, keepdim=True) + eps)).to(hidden_BTD.dtype)


def _normed(norm: LlamaRMSNorm, hidden_BTD: Tensor, unit_BTD: Tensor | None) -> Tensor:
    return norm(hidden_BTD) if unit_BTD is None else norm.weight * unit_BTD


def _attention(config: HeterogeneousLlamaConfig, spec: AttentionSpec, *, cache_index: int) -> nn.Module:
    if spec.kind == "linear":
        return LinearAttention(config)
    shape: Any = copy.copy(config)
    shape.num_key_value_heads = spec.num_key_value_heads
    attention = LlamaAttention(shape, layer_idx=cache_index)
    # What is read after construction (the attention implementation) is the model's, and may be changed on the model.
    attention.config = config  # pyright: ignore[reportAttributeAccessIssue]
    return attention


def _ffn(config: HeterogeneousLlamaConfig, spec: FFNSpec) -> nn.Module:
    if spec.kind == "linear":
        return LinearMLP(config)
    shape: Any = copy.copy(config)
    shape.intermediate_size = spec.intermediate_size
    return LlamaMLP(shape)


class HeterogeneousLlamaModel(LlamaModel):
    """Embeddings, layers and final norm; the forward pass is LlamaModel's own."""

    config_class = HeterogeneousLlamaConfig
    _no_split_modules = ["HeterogeneousDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": HeterogeneousDecoderLayer, "attentions": LlamaAttention}  # noqa: RUF012

    def __init__(self, config: HeterogeneousLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)  # LlamaModel's would build equal layers first
        assert config.architecture is not None
        # No padding_idx: it would zero the gradient of that embedding, and checkpoints use their end token as padding.
        self.padding_idx = None
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers, cache_index = [], 0
        for block in config.architecture.blocks:
            layers.append(HeterogeneousDecoderLayer(config, block=block, cache_index=cache_index))
            cache_index += block.attention.kind == "gqa"
        self.layers = nn.ModuleList(layers)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = ExactRotaryEmbedding(config)  # pyright: ignore[reportArgumentType]
        self.gradient_checkpointing = False
        self.post_init()


class HeterogeneousLlamaForCausalLM(LlamaForCausalLM):
    """The language model: forward, loss and `generate` are LlamaForCausalLM's own."""

    config_class = HeterogeneousLlamaConfig
    _no_split_modules = ["HeterogeneousDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": HeterogeneousDecoderLayer, "attentions": LlamaAttention}  # noqa: RUF012

    def __init__(self, config: HeterogeneousLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = HeterogeneousLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def architecture(self) -> Architecture:
        """What this model is."""
        architecture = self.config.architecture
        assert isinstance(architecture, Architecture)
        return architecture


def empty_model(architecture: Architecture) -> HeterogeneousLlamaForCausalLM:
    """Return the model without weights: parameters on the meta device, rotary frequencies in place."""
    config = HeterogeneousLlamaConfig(architecture=architecture)
    with torch.device("meta"):
        model = HeterogeneousLlamaForCausalLM(config)
    model.model.rotary_emb = ExactRotaryEmbedding(config)  # pyright: ignore[reportArgumentType]
    return model.eval()


def build_model(
    architecture: Architecture, *, dtype: torch.dtype, seed: int, initializer_range: float = 0.02
) -> HeterogeneousLlamaForCausalLM:
    """Return a randomly initialised model: weights N(0, initializer_range^2), norms 1, biases 0."""
    model = empty_model(architecture)
    _materialize(model, dtype=dtype, generator=torch.Generator().manual_seed(seed), initializer_range=initializer_range)
    model.tie_weights()
    return model


def build_subblock_attention(
    architecture: Architecture,
    spec: AttentionSpec,
    *,
    layer_idx: int = 0,
    dtype: torch.dtype,
    seed: int = 0,
) -> HeterogeneousDecoderLayer:
    """Return one attention subblock with its norm, randomly initialised; `layer_idx` is its slot in a KV cache."""
    block = BlockSpec(attention=spec, ffn=NO_FFN, parent_layers=(0,))
    return build_layer(architecture, block, layer_idx=layer_idx, dtype=dtype, seed=seed)


def build_subblock_ffn(
    architecture: Architecture, spec: FFNSpec, *, dtype: torch.dtype, seed: int = 0
) -> HeterogeneousDecoderLayer:
    """Return one FFN subblock with its norm, randomly initialised."""
    block = BlockSpec(attention=NO_ATTENTION, ffn=spec, parent_layers=(0,))
    return build_layer(architecture, block, dtype=dtype, seed=seed)


def build_layer(
    architecture: Architecture, block: BlockSpec, *, layer_idx: int = 0, dtype: torch.dtype, seed: int = 0
) -> HeterogeneousDecoderLayer:
    """Return one layer, randomly initialised; `layer_idx` is its slot in a KV cache."""
    config = HeterogeneousLlamaConfig(architecture=architecture)
    with torch.device("meta"):
        layer = HeterogeneousDecoderLayer(config, block=block, cache_index=layer_idx)
    _materialize(layer, dtype=dtype, generator=torch.Generator().manual_seed(seed), initializer_range=0.02)
    return layer.eval()


def attention_inputs(
    model: HeterogeneousLlamaForCausalLM,
    *,
    batch_size: int,
    num_tokens: int,
    device: torch.device | str,
    dtype: torch.dtype,
    position_ids_BT: Tensor | None = None,
) -> dict[str, Any]:
    """Return what a causal full-sequence pass without cache hands to each layer's `attend`.

    Position ids that restart within a row separate packed samples: attention never crosses from one to the next.
    """
    if position_ids_BT is None:
        position_ids_BT = torch.arange(num_tokens, device=device).unsqueeze(0)
    # The mask and the rotary embedding read shape, dtype and device of the hidden states and never their values.
    hidden_BTD = torch.empty(batch_size, num_tokens, 1, device=device, dtype=dtype)
    return {
        "position_embeddings": model.model.rotary_emb(hidden_BTD, position_ids=position_ids_BT),
        "attention_mask": create_causal_mask(
            config=model.config,
            inputs_embeds=hidden_BTD,
            attention_mask=None,
            cache=None,
            position_ids=position_ids_BT,
        ),
        "position_ids": position_ids_BT,
        "cache": None,
        "use_cache": False,
    }


def _materialize(
    module: nn.Module, *, dtype: torch.dtype, generator: torch.Generator, initializer_range: float
) -> None:
    for owner in module.modules():
        for name, meta in list(owner.named_parameters(recurse=False)):
            value = torch.zeros(meta.shape, dtype=torch.float32)
            if isinstance(owner, LlamaRMSNorm):
                value.fill_(1.0)
            elif name == "weight":
                value.normal_(0.0, initializer_range, generator=generator)
            setattr(owner, name, nn.Parameter(value.to(dtype)))
