"""The DeciLM (nemotron-nas) v1 schema: an Architecture as its config.json, and its classes registered in transformers.

The schema is the one of NVIDIA's published checkpoints: exactly 8 keys of attention and 4 of FFN per layer. No files.
"""

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.architecture import Architecture, AttentionSpec, FFNSpec
from pipeline.errors import CheckpointError
from pipeline.model.exported_code.configuration_decilm import DeciLMConfig, ffn_width
from pipeline.model.exported_code.modeling_decilm import DeciLMForCausalLM

WIDTH_MULTIPLE = 256  # every reader rounds FFN widths up to it


def register() -> None:
    """Let AutoConfig, AutoModelForCausalLM and AutoTokenizer load exported directories without running their code."""
    AutoConfig.register(DeciLMConfig.model_type, DeciLMConfig, exist_ok=True)
    AutoModelForCausalLM.register(DeciLMConfig, DeciLMForCausalLM, exist_ok=True)


def decilm_config(architecture: Architecture, *, torch_dtype: str) -> dict[str, Any]:
    """Return the config.json of an architecture whose FFN widths are all multiples of 256.

    `rope_theta` and `rope_scaling` are both written: transformers 5 would save rope_parameters alone, and servers that
    read the older pair would silently lose llama3 scaling.
    """
    eos_ids = list(architecture.eos_token_ids)
    scaling = architecture.rope_scaling
    config = {
        "architectures": ["DeciLMForCausalLM"],
        "attention_bias": architecture.attention_bias,
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_decilm.DeciLMConfig",
            "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
        },
        "block_configs": [
            {
                "attention": _attention_block(block.attention, num_heads=architecture.num_attention_heads),
                "ffn": _ffn_block(block.ffn, hidden_size=architecture.hidden_size),
            }
            for block in architecture.blocks
        ],
        "bos_token_id": architecture.bos_token_id,
        "eos_token_id": eos_ids[0] if len(eos_ids) == 1 else (eos_ids or None),
        "hidden_act": "silu",
        "hidden_size": architecture.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": None,
        "max_position_embeddings": architecture.max_position_embeddings,
        "mlp_bias": architecture.mlp_bias,
        "model_type": DeciLMConfig.model_type,
        "num_attention_heads": architecture.num_attention_heads,
        "num_hidden_layers": architecture.num_hidden_layers,
        "num_key_value_heads": None,
        "pad_token_id": architecture.pad_token_id,
        "pretraining_tp": 1,
        "rms_norm_eps": architecture.rms_norm_eps,
        "rope_scaling": None if scaling is None else scaling.model_dump(),
        "rope_theta": architecture.rope_theta,
        "tie_word_embeddings": architecture.tie_word_embeddings,
        "torch_dtype": torch_dtype,
        "use_cache": True,
        "vocab_size": architecture.vocab_size,
    }
    if architecture.head_dim * architecture.num_attention_heads != architecture.hidden_size:
        config["head_dim"] = architecture.head_dim
    return config


def padded_width(width: int) -> int:
    """Return the next multiple of 256."""
    return width + -width % WIDTH_MULTIPLE


def ffn_multiplier(width: int, *, hidden_size: int) -> float:
    """Return the ffn_mult, of six decimals, from which every reader computes `width`.

    Rounded down, so that 2/3 ffn_mult hidden_size never exceeds the width, and the rounding up to 256 mends the rest.

    Raises:
        CheckpointError: when no six-decimal multiplier gives that width.
    """
    multiplier = (3 * width * 10**6 // (2 * hidden_size)) / 10**6
    got = ffn_width(round(multiplier, 6), hidden_size=hidden_size)
    if got != width:
        raise CheckpointError(
            f"an FFN of {width} channels at hidden_size {hidden_size} comes back as {got} from ffn_mult {multiplier}; "
            f"widths must be multiples of {WIDTH_MULTIPLE}"
        )
    return multiplier


def _attention_block(spec: AttentionSpec, *, num_heads: int) -> dict[str, Any]:
    heads = spec.num_key_value_heads
    return {
        "n_heads_in_group": None if heads is None else num_heads // heads,
        "no_op": spec.kind == "no_op",
        "num_sink_tokens": None,
        "replace_with_linear": spec.kind == "linear",
        "sparsify": None,
        "unshifted_sink": False,
        "use_prefill_window_in_sink_attention": False,
        "window_length": None,
    }


def _ffn_block(spec: FFNSpec, *, hidden_size: int) -> dict[str, Any]:
    width = spec.intermediate_size
    return {
        "ffn_mult": None if width is None else ffn_multiplier(width, hidden_size=hidden_size),
        "no_op": spec.kind == "no_op",
        "replace_with_linear": spec.kind == "linear",
        "sparsify": None,
    }
