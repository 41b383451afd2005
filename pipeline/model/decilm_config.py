"""The DeciLM (nemotron-nas) v1 schema: an Architecture as a config.json, and back. Imports no torch, no transformers.

The schema is the one of NVIDIA's published checkpoints: exactly 8 keys of attention and 4 of FFN per layer.
"""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

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
from pipeline.errors import CheckpointError
from pipeline.model.hf_config import (
    HARMLESS_KEYS,
    read_rope,
    read_special_tokens,
    require_known_keys,
    require_tokens_in_vocabulary,
    shared_config,
)

MODEL_TYPE = "nemotron-nas"
CLASS_NAME = "DeciLMForCausalLM"
WIDTH_MULTIPLE = 256  # every reader rounds FFN widths up to it

# Values of block keys under which a layer is what Architecture can say.
_PLAIN_ATTENTION = {
    "num_sink_tokens": None,
    "sparsify": None,
    "unshifted_sink": False,
    "use_prefill_window_in_sink_attention": False,
    "window_length": None,
}
_PLAIN_FFN = {"sparsify": None}
_ATTENTION_KEYS = {"n_heads_in_group", "no_op", "replace_with_linear", *_PLAIN_ATTENTION}
_FFN_KEYS = {"ffn_mult", "no_op", "replace_with_linear", *_PLAIN_FFN}
# The sizes stand in block_configs; the code that auto_map names is never run.
_IGNORED = HARMLESS_KEYS | {"architectures", "auto_map", "intermediate_size", "num_key_value_heads"}
_READ = {
    "attention_bias",
    "block_configs",
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "max_position_embeddings",
    "mlp_bias",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "pad_token_id",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "vocab_size",
}


def decilm_config(architecture: Architecture, *, torch_dtype: str) -> dict[str, Any]:
    """Return the config.json of an architecture whose FFN widths are all multiples of 256."""
    own = {
        "architectures": [CLASS_NAME],
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
        "intermediate_size": None,
        "model_type": MODEL_TYPE,
        "num_key_value_heads": None,
    }
    config = dict(sorted((shared_config(architecture, torch_dtype=torch_dtype) | own).items()))
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
    got = width_from_multiplier(multiplier, hidden_size=hidden_size)
    if got != width:
        raise CheckpointError(
            f"an FFN of {width} channels at hidden_size {hidden_size} comes back as {got} from ffn_mult {multiplier}; "
            f"widths must be multiples of {WIDTH_MULTIPLE}"
        )
    return multiplier


def decilm_architecture(config: dict[str, Any], *, token_ids: dict[str, Any], path: Path) -> Architecture:
    """Return what a DeciLM v1 config.json says, with further token ids from its generation_config.json.

    Layer i does the work of parent layer i.

    Layers without attention and FFN, which published files keep as placeholders, are layers here too.

    Raises:
        CheckpointError: for another model type, quantisation, a block with sinks, windows or sparsity, or a key that
            is not known; it names `path`.
    """
    if config.get("model_type") != MODEL_TYPE:
        raise CheckpointError(f"{path} describes model_type {config.get('model_type')!r}; wanted {MODEL_TYPE!r}")
    require_known_keys(config, known=_READ | _IGNORED, path=path)
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{path} has hidden_act {config['hidden_act']!r}; FFNs are gated by silu")
    blocks = config.get("block_configs")
    if not isinstance(blocks, list) or not blocks or config.get("num_hidden_layers", len(blocks)) != len(blocks):
        got = len(blocks) if isinstance(blocks, list) else type(blocks).__name__
        raise CheckpointError(
            f"{path}: block_configs is {got}; wanted a list of num_hidden_layers = {config.get('num_hidden_layers')}"
        )
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if not isinstance(heads, int) or not isinstance(hidden, int) or heads < 1 or hidden < 1:
        raise CheckpointError(f"{path}: num_attention_heads is {heads!r}, hidden_size {hidden!r}; wanted two counts")
    theta, scaling = read_rope(config, path=path)
    try:
        architecture = Architecture(
            vocab_size=config.get("vocab_size", 0),
            hidden_size=hidden,
            num_attention_heads=heads,
            head_dim=config.get("head_dim") or hidden // heads,
            max_position_embeddings=config.get("max_position_embeddings", 2048),
            rms_norm_eps=config.get("rms_norm_eps", 1e-5),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            attention_bias=config.get("attention_bias", False),
            mlp_bias=config.get("mlp_bias", False),
            **read_special_tokens(config, token_ids=token_ids),
            blocks=tuple(
                _read_block(block, layer=layer, num_heads=heads, hidden_size=hidden, path=path)
                for layer, block in enumerate(blocks)
            ),
        )
    except ValidationError as err:
        raise CheckpointError(f"{path} does not describe a model that can be built: {err}") from err
    require_tokens_in_vocabulary(architecture, path=path)
    return architecture


def width_from_multiplier(ffn_mult: float, *, hidden_size: int) -> int:
    """Return 2/3 ffn_mult hidden_size, rounded up to a multiple of 256, as every reader of the format does."""
    return padded_width(int(2 * ffn_mult * hidden_size / 3))


def _read_block(block: Any, *, layer: int, num_heads: int, hidden_size: int, path: Path) -> BlockSpec:
    at = f"{path}: block_configs[{layer}]"
    if not isinstance(block, dict) or set(block) != {"attention", "ffn"}:
        raise CheckpointError(f"{at} must have attention and ffn, and nothing else")
    attention = _read_part(block["attention"], keys=_ATTENTION_KEYS, plain=_PLAIN_ATTENTION, at=f"{at}.attention")
    ffn = _read_part(block["ffn"], keys=_FFN_KEYS, plain=_PLAIN_FFN, at=f"{at}.ffn")
    return BlockSpec(
        attention=_read_attention(attention, num_heads=num_heads, at=f"{at}.attention"),
        ffn=_read_ffn(ffn, hidden_size=hidden_size, at=f"{at}.ffn"),
        parent_layers=(layer,),
    )


def _read_part(part: Any, *, keys: set[str], plain: dict[str, Any], at: str) -> dict[str, Any]:
    if not isinstance(part, dict):
        raise CheckpointError(f"{at} is a {type(part).__name__}, not an object")
    unknown, missing = sorted(set(part) - keys), sorted(keys - set(part))
    if unknown:
        raise CheckpointError(f"{at} has keys that are not known: {', '.join(unknown)}")
    if missing:
        raise CheckpointError(f"{at} lacks {', '.join(missing)}; wanted all {len(keys)} keys of the v1 schema")
    for key in ("no_op", "replace_with_linear"):
        if not isinstance(part[key], bool):
            raise CheckpointError(f"{at}.{key} is {part[key]!r}; wanted true or false")
    changed = [key for key, value in plain.items() if part[key] != value]
    if changed:
        raise CheckpointError(f"{at} has {changed[0]} = {part[changed[0]]!r}, which is not supported")
    if part["no_op"] and part["replace_with_linear"]:
        raise CheckpointError(f"{at} is both no_op and replace_with_linear")
    return part


def _read_attention(part: dict[str, Any], *, num_heads: int, at: str) -> AttentionSpec:
    if part["no_op"]:
        return NO_ATTENTION
    if part["replace_with_linear"]:
        return LINEAR_ATTENTION
    group = part["n_heads_in_group"]
    if isinstance(group, bool) or not isinstance(group, int) or group < 1 or num_heads % group:
        raise CheckpointError(f"{at}.n_heads_in_group is {group!r}; wanted a divisor of {num_heads} attention heads")
    return gqa(num_heads // group)


def _read_ffn(part: dict[str, Any], *, hidden_size: int, at: str) -> FFNSpec:
    if part["no_op"]:
        return NO_FFN
    if part["replace_with_linear"]:
        return LINEAR_FFN
    multiplier = part["ffn_mult"]
    if isinstance(multiplier, bool) or not isinstance(multiplier, int | float) or not 0 < multiplier < 10**6:
        raise CheckpointError(f"{at}.ffn_mult is {multiplier!r}; wanted a number above 0")
    return swiglu(width_from_multiplier(multiplier, hidden_size=hidden_size))


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
