"""A Hugging Face Llama's config.json as an Architecture, and back. No weights, no tokenizer.

The file is data here: no class of transformers sees it. When it is read, every key is known or refused, since
an unknown one may change what the model computes.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.architecture import Architecture, BlockSpec, RopeScaling, gqa, swiglu
from pipeline.errors import CheckpointError

_READ = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "model_type",
    "architectures",
    "rope_interleaved",
}
# Known not to change a model's logits at inference.
HARMLESS_KEYS = {
    "_name_or_path",
    "attention_dropout",
    "attn_implementation",
    "bad_words_ids",
    "chunk_size_feed_forward",
    "dtype",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_encoder_decoder",
    "is_llama_config",
    "label2id",
    "max_length",
    "name_or_path",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "task_specific_params",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "use_bfloat16",
    "use_cache",
}


def llama_architecture(config: dict[str, Any], *, token_ids: dict[str, Any], path: Path) -> Architecture:
    """Return what a Llama's config.json says, with further token ids from its generation_config.json.

    Raises:
        CheckpointError: for anything but a plain Llama: another family, remote code, quantisation, another activation,
            another rotary rule, or a key that is not known; it names `path`.
    """
    _require_plain_llama(config, path=path)
    heads = _integer(config, "num_attention_heads", path=path)
    hidden = _integer(config, "hidden_size", path=path)
    key_value_heads = _integer(config, "num_key_value_heads", path=path, default=heads)
    block = {
        "attention": gqa(key_value_heads),
        "ffn": swiglu(_integer(config, "intermediate_size", path=path)),
    }
    num_layers = _integer(config, "num_hidden_layers", path=path)
    theta, scaling = read_rope(config, path=path)
    try:
        architecture = Architecture(
            vocab_size=_integer(config, "vocab_size", path=path),
            hidden_size=hidden,
            num_attention_heads=heads,
            head_dim=_integer(config, "head_dim", path=path, default=hidden // heads),
            max_position_embeddings=_integer(config, "max_position_embeddings", path=path, default=2048),
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            attention_bias=config.get("attention_bias", False),
            mlp_bias=config.get("mlp_bias", False),
            **read_special_tokens(config, token_ids=token_ids),
            blocks=tuple(BlockSpec(**block, parent_layers=(layer,)) for layer in range(num_layers)),
        )
    except ValidationError as err:
        raise CheckpointError(f"{path} does not describe a Llama that can be built: {err}") from err
    require_tokens_in_vocabulary(architecture, path=path)
    return architecture


def llama_config(architecture: Architecture, *, torch_dtype: str) -> dict[str, Any]:
    """Return the config.json of an architecture whose layers are all the same attention and FFN.

    Raises:
        CheckpointError: if the layers differ.
    """
    block = architecture.homogeneous_block()
    own = {
        "architectures": ["LlamaForCausalLM"],
        "head_dim": architecture.head_dim,
        "intermediate_size": block.ffn.intermediate_size,
        "model_type": "llama",
        "num_key_value_heads": block.attention.num_key_value_heads,
    }
    return dict(sorted((shared_config(architecture, torch_dtype=torch_dtype) | own).items()))


def shared_config(architecture: Architecture, *, torch_dtype: str) -> dict[str, Any]:
    """Return the keys of a config.json that do not depend on blocks; `rope_theta` and `rope_scaling` as the older pair.

    transformers 5 would save rope_parameters alone, and servers that read the pair would silently lose llama3 scaling.
    """
    eos_ids, scaling = list(architecture.eos_token_ids), architecture.rope_scaling
    return {
        "attention_bias": architecture.attention_bias,
        "attention_dropout": 0.0,
        "bos_token_id": architecture.bos_token_id,
        "eos_token_id": eos_ids[0] if len(eos_ids) == 1 else (eos_ids or None),
        "hidden_act": "silu",
        "hidden_size": architecture.hidden_size,
        "initializer_range": 0.02,
        "max_position_embeddings": architecture.max_position_embeddings,
        "mlp_bias": architecture.mlp_bias,
        "num_attention_heads": architecture.num_attention_heads,
        "num_hidden_layers": architecture.num_hidden_layers,
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


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a checkpoint that comes from elsewhere.

    Raises:
        CheckpointError: when the file is missing or is not a JSON object.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: give the directory of a whole Hugging Face checkpoint")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as err:
        raise CheckpointError(f"{path} is not JSON ({err})") from err
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def _require_plain_llama(config: dict[str, Any], *, path: Path) -> None:
    model_type, classes = config.get("model_type"), config.get("architectures")
    if model_type != "llama" or classes not in (None, ["LlamaForCausalLM"]):
        raise CheckpointError(
            f"{path} describes model_type {model_type!r}, architectures {classes}; a parent must be a llama, "
            "['LlamaForCausalLM']"
        )
    if "auto_map" in config:
        raise CheckpointError(
            f"{path} has auto_map, which asks for code of the checkpoint to be run; that is never done"
        )
    require_known_keys(config, known=_READ | HARMLESS_KEYS, path=path)
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{path} has hidden_act {config['hidden_act']!r}; a parent's FFN is gated by silu")
    if config.get("rope_interleaved"):
        raise CheckpointError(f"{path} has rope_interleaved; rotary pairs must be the two halves of a head")


def require_known_keys(config: dict[str, Any], *, known: set[str], path: Path) -> None:
    """Refuse quantised weights, and every key with a value that is not known.

    Raises:
        CheckpointError: naming the keys.
    """
    if config.get("quantization_config") is not None:
        raise CheckpointError(f"{path} has quantization_config; give the unquantised fp32, bf16 or fp16 checkpoint")
    unknown = sorted(key for key, value in config.items() if key not in known and value is not None)
    if unknown:
        raise CheckpointError(
            f"{path} has keys that are not known to leave the model's output alone: {', '.join(unknown)}; remove those "
            "that do"
        )


def read_rope(config: dict[str, Any], *, path: Path) -> tuple[float, RopeScaling | None]:
    """Return theta and the scaling rule from either spelling: rope_theta + rope_scaling, or rope_parameters.

    Raises:
        CheckpointError: when the two disagree, or for a rule that is neither the default nor llama3.
    """
    found = []
    for key in ("rope_parameters", "rope_scaling"):
        rules = config.get(key)
        if rules is None:
            continue
        if not isinstance(rules, dict):
            raise CheckpointError(f"{path}: {key} is {rules!r}, not an object")
        rules = dict(rules)
        theta = rules.pop("rope_theta", config.get("rope_theta"))
        rope_type = rules.pop("rope_type", rules.pop("type", "default"))
        rules.pop("type", None)
        found.append((theta, _scaling(rope_type, rules, path=path, key=key)))
    if len(set(found)) > 1:
        raise CheckpointError(f"{path}: rope_parameters and rope_scaling disagree: {found}")
    theta, scaling = found[0] if found else (config.get("rope_theta"), None)
    theta = 10_000.0 if theta is None else theta
    if isinstance(theta, bool) or not isinstance(theta, int | float):
        raise CheckpointError(f"{path}: rope_theta is {theta!r}, not a number")
    return float(theta), scaling


def _scaling(rope_type: object, rules: dict[str, Any], *, path: Path, key: str) -> RopeScaling | None:
    if rope_type == "default":
        if rules:
            raise CheckpointError(f"{path}: {key} has {', '.join(sorted(rules))} for rope_type 'default'")
        return None
    if rope_type != "llama3":
        raise CheckpointError(f"{path}: {key} has rope_type {rope_type!r}; 'default' and 'llama3' are supported")
    try:
        return RopeScaling(rope_type="llama3", **rules)
    except ValidationError as err:
        raise CheckpointError(f"{path}: {key} is not a llama3 rule: {err}") from err


def _integer(config: dict[str, Any], key: str, *, path: Path, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{path}: {key} is {value!r}, not a positive integer")
    return value


def read_special_tokens(config: dict[str, Any], *, token_ids: dict[str, Any]) -> dict[str, Any]:
    """Return bos_token_id, eos_token_ids and pad_token_id, from a config.json and its generation_config.json."""
    eos_ids = _token_ids(token_ids, "eos_token_id") + _token_ids(config, "eos_token_id")
    return {
        "bos_token_id": _first(_token_ids(config, "bos_token_id") or _token_ids(token_ids, "bos_token_id")),
        # Chat models often name all their end tokens in generation_config.json alone.
        "eos_token_ids": tuple(dict.fromkeys(eos_ids)),
        "pad_token_id": _first(_token_ids(config, "pad_token_id") or _token_ids(token_ids, "pad_token_id")),
    }


def require_tokens_in_vocabulary(architecture: Architecture, *, path: Path) -> None:
    """Refuse special tokens that the vocabulary does not have.

    Raises:
        CheckpointError: naming the first.
    """
    named = (architecture.bos_token_id, architecture.pad_token_id, *architecture.eos_token_ids)
    outside = [index for index in named if index is not None and index >= architecture.vocab_size]
    if outside:
        raise CheckpointError(f"{path} names token {outside[0]}, the vocabulary has {architecture.vocab_size} tokens")


def _token_ids(config: dict[str, Any], key: str) -> tuple[int, ...]:
    value = config.get(key)
    values = value if isinstance(value, list) else [value]
    # Some checkpoints write -1 for "none".
    return tuple(item for item in values if isinstance(item, int) and item >= 0)


def _first(values: tuple[int, ...]) -> int | None:
    return values[0] if values else None
