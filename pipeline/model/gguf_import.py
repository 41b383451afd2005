"""A parent from a GGUF file of the llama architecture: dequantised to fp32, tokenizer and chat template rebuilt.

Read with the `gguf` package alone: about five times faster than transformers' GGUF loader, whose tokenizer is wrong for
SmolLM's pre-tokenizer and whose models cannot be saved as they are.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from torch import Tensor

from pipeline.architecture import Architecture, BlockSpec, gqa, swiglu
from pipeline.errors import CheckpointError
from pipeline.model.checkpoint import save_checkpoint
from pipeline.model.tokenizer_files import SpecialTokens, save_byte_level_bpe, smollm_pre_tokenizer

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_CONTROL_TOKEN = 3  # gguf's token types: 1 normal, 3 control


def import_gguf(gguf_path: Path, *, out_dir: Path) -> Architecture:
    """Write the file's model as an fp32 checkpoint and return what it is.

    Raises:
        CheckpointError: when the file is not GGUF, is cut off, or holds what this reader cannot represent exactly.
    """
    try:
        reader = GGUFReader(gguf_path)
    except (ValueError, IndexError, KeyError, OSError) as err:
        raise CheckpointError(f"{gguf_path} is not a whole GGUF file ({err}): fetch it again") from err
    metadata = _Metadata(reader, path=gguf_path)
    architecture = _architecture(metadata, tensor_names={tensor.name for tensor in reader.tensors})
    save_checkpoint(
        out_dir,
        architecture=architecture,
        tensors=_tensors(reader, architecture, path=gguf_path),
        tokenizer_dir=None,
    )
    _save_tokenizer(metadata, out_dir=out_dir, max_tokens=architecture.max_position_embeddings)
    return architecture


class _Metadata:
    """The key/value section of a GGUF file, with errors that name the key."""

    def __init__(self, reader: GGUFReader, *, path: Path) -> None:
        self._fields = reader.fields
        self.path = path

    def get(self, key: str, default: Any = None) -> Any:
        field = self._fields.get(key)
        return default if field is None else field.contents()

    def require(self, key: str, kind: type | tuple[type, ...]) -> Any:
        value = self.get(key)
        if not isinstance(value, kind):
            raise CheckpointError(f"{self.path}: {key} is {str(value)[:60]}, which this reader cannot use")
        return value

    def keys(self) -> list[str]:
        return list(self._fields)


def _architecture(metadata: _Metadata, *, tensor_names: set[str]) -> Architecture:
    family = metadata.get("general.architecture")
    if family != "llama":
        raise CheckpointError(f"{metadata.path} holds a {family!r} model; a parent must be of the llama architecture")
    unknown = [key for key in metadata.keys() if key.startswith(("llama.expert", "llama.rope.scaling"))]  # noqa: SIM118
    if unknown or "rope_freqs.weight" in tensor_names:
        raise CheckpointError(
            f"{metadata.path} has {', '.join(unknown) or 'rope_freqs.weight'}: experts and scaled rotary frequencies "
            "are not read from GGUF; give the Hugging Face checkpoint as the parent"
        )
    hidden = metadata.require("llama.embedding_length", int)
    heads = metadata.require("llama.attention.head_count", int)
    key_value_heads = metadata.require("llama.attention.head_count_kv", int)
    head_dim = metadata.get("llama.attention.key_length", hidden // heads)
    rotated = metadata.get("llama.rope.dimension_count", head_dim)
    if rotated != head_dim or metadata.get("llama.attention.value_length", head_dim) != head_dim:
        raise CheckpointError(
            f"{metadata.path} rotates {rotated} of {head_dim} dimensions per head or has values of another size; "
            "a parent rotates whole heads of one size"
        )
    block = {"attention": gqa(key_value_heads), "ffn": swiglu(metadata.require("llama.feed_forward_length", int))}
    num_layers = metadata.require("llama.block_count", int)
    return Architecture(
        vocab_size=len(metadata.require("tokenizer.ggml.tokens", list)),
        hidden_size=hidden,
        num_attention_heads=heads,
        head_dim=head_dim,
        max_position_embeddings=metadata.require("llama.context_length", int),
        rms_norm_eps=_six_digits(metadata.require("llama.attention.layer_norm_rms_epsilon", float)),
        rope_theta=metadata.get("llama.rope.freq_base", 10_000.0),
        rope_scaling=None,
        tie_word_embeddings="output.weight" not in tensor_names,
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=(metadata.require("tokenizer.ggml.eos_token_id", int),),
        pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
        blocks=tuple(BlockSpec(**block, parent_layers=(layer,)) for layer in range(num_layers)),
    )


def _six_digits(value: float) -> float:
    # GGUF stores float32: 1e-5 comes back as 9.99999974e-06.
    return float(f"{value:.6g}")


def _tensors(reader: GGUFReader, architecture: Architecture, *, path: Path) -> Iterator[tuple[str, Tensor]]:
    for tensor in reader.tensors:
        name = _hf_name(tensor.name)
        if name is None:
            raise CheckpointError(f"{path}: tensor {tensor.name} is not part of a plain Llama")
        shape = [int(size) for size in reversed(tensor.shape)]
        try:
            values = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        except (NotImplementedError, ValueError) as err:
            raise CheckpointError(f"{path}: tensor {tensor.name} cannot be dequantised ({err})") from err
        if name.endswith("q_proj.weight"):
            values = _half_split(values, num_heads=architecture.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            values = _half_split(values, num_heads=values.shape[0] // architecture.head_dim)
        yield name, torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32).copy())


def _half_split(projection: np.ndarray, *, num_heads: int) -> np.ndarray:
    """Undo llama.cpp's interleaving of rotary pairs: Hugging Face keeps the two halves of a head apart."""
    num_rows, num_columns = projection.shape
    pairs = projection.reshape(num_heads, num_rows // num_heads // 2, 2, num_columns)
    return pairs.swapaxes(1, 2).reshape(num_rows, num_columns)


def _hf_name(name: str) -> str | None:
    if name in _OUTER:
        return _OUTER[name]
    prefix, _, rest = name.partition(".")
    layer, _, relative = rest.partition(".")
    if prefix != "blk" or not layer.isdigit() or relative not in _IN_LAYER:
        return None
    return f"model.layers.{layer}.{_IN_LAYER[relative]}"


def _save_tokenizer(metadata: _Metadata, *, out_dir: Path, max_tokens: int) -> None:
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", False)
    if (model, pre, adds_bos) != ("gpt2", "smollm", False):
        raise CheckpointError(
            f"{metadata.path} has tokenizer {model!r} with pre-tokenizer {pre!r}, add_bos_token {adds_bos}; only "
            "'gpt2' with 'smollm' and no BOS is known to be rebuilt exactly: give the Hugging Face checkpoint instead"
        )
    template = metadata.get("tokenizer.chat_template")
    if template is None:
        raise CheckpointError(f"{metadata.path} has no chat template; a parent needs one to be taught reasoning")
    tokens = metadata.require("tokenizer.ggml.tokens", list)
    kinds = metadata.require("tokenizer.ggml.token_type", list)

    def role(name: str) -> str | None:
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return None if index is None else tokens[index]

    eos = role("eos")
    assert eos is not None, "checked when the architecture was read"
    save_byte_level_bpe(
        out_dir,
        tokens=tokens,
        merges=[_merge(merge) for merge in metadata.require("tokenizer.ggml.merges", list)],
        pre_tokenizer=smollm_pre_tokenizer(),
        special=SpecialTokens(
            bos=role("bos"),
            eos=eos,
            pad=role("padding"),
            unk=role("unknown"),
            control=tuple(token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN),
        ),
        chat_template=template,
        max_tokens=max_tokens,
    )


def _merge(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right
