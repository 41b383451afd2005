"""A checkpoint from a Hugging Face directory in safetensors: a plain Llama, DeciLM v1 or AnyModel. All else is refused.

What is taken over is named here; no other file of the directory is opened, copied or run.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from pipeline.architecture import Architecture
from pipeline.errors import CheckpointError
from pipeline.model.architecture_files import directory_architecture
from pipeline.model.checkpoint import TensorReader, load_tokenizer, save_checkpoint
from pipeline.model.hf_config import read_json_object
from pipeline.model.tokenizer_files import (
    LLAMA3_TEMPLATE,
    PLAIN_TEMPLATE,
    adds_to_the_system_prompt,
    write_tokenizer_config,
)

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Early Llama conversions stored the rotary frequencies, which are computed from the config.
_STORED_FREQUENCIES = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
_TOKENIZER_SETTINGS = ("model_max_length", "add_bos_token", "add_eos_token", "padding_side")


def import_checkpoint(source_dir: Path, *, out_dir: Path) -> Architecture:
    """Write a Hugging Face checkpoint as one of this pipeline, every value and dtype kept, and return what it is.

    Its config.json says whether it is a Llama, DeciLM v1 (what `export_decilm` writes) or AnyModel; layers may differ.
    Weights are read and written shard by shard. A Llama-3 chat template that adds dates to the system prompt is
    replaced by one that does not.

    Raises:
        CheckpointError: with one reason, for whatever is not a whole, safe checkpoint of these formats.
    """
    if not source_dir.is_dir():
        raise CheckpointError(f"{source_dir} is not a directory: parent.path names a Hugging Face checkpoint directory")
    architecture = directory_architecture(source_dir)
    reader = TensorReader(source_dir)
    if architecture.tie_word_embeddings:
        _require_tied_head(reader)
    out_dir.mkdir(parents=True, exist_ok=True)
    _import_tokenizer(source_dir, out_dir=out_dir, vocab_size=architecture.vocab_size)
    save_checkpoint(out_dir, architecture=architecture, tensors=_weights(reader, architecture), tokenizer_dir=None)
    return architecture


def _weights(reader: TensorReader, architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    for name in reader.names:
        if _STORED_FREQUENCIES.fullmatch(name) or (name == _HEAD and architecture.tie_word_embeddings):
            continue
        yield name, reader.read(name)


def _require_tied_head(reader: TensorReader) -> None:
    if _HEAD in reader.names and _EMBEDDING in reader.names:
        head_VD, embedding_VD = reader.read(_HEAD), reader.read(_EMBEDDING)
        if head_VD.shape != embedding_VD.shape or not torch.equal(head_VD, embedding_VD):
            raise CheckpointError(
                f"{reader.directory}: config.json says tie_word_embeddings, but {_HEAD} is there and differs from "
                f"{_EMBEDDING}: set tie_word_embeddings to false, or remove the head"
            )


def _import_tokenizer(source_dir: Path, *, out_dir: Path, vocab_size: int) -> None:
    path = source_dir / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f"{source_dir} has no tokenizer.json, and text cannot be made into tokens without it: save the fast "
            "tokenizer of this model into the directory"
        )
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as err:  # tokenizers raises plain Exception
        raise CheckpointError(f"{path} is not a tokenizer ({err})") from err
    largest = max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocab_size:
        raise CheckpointError(
            f"{path} has token {largest}, the model's vocabulary ends at {vocab_size - 1}: this tokenizer belongs to "
            "another model"
        )
    (out_dir / "tokenizer.json").write_bytes(path.read_bytes())
    config_path, map_path = source_dir / "tokenizer_config.json", source_dir / "special_tokens_map.json"
    config = read_json_object(config_path) if config_path.is_file() else {}
    special = read_json_object(map_path) if map_path.is_file() else {}
    roles = {role: _token_text(config.get(role) or special.get(role)) for role in _ROLES}
    for role, token in roles.items():
        if token is not None and backend.token_to_id(token) is None:
            raise CheckpointError(f"{config_path}: {role} is {token!r}, which tokenizer.json does not have")
    if roles["eos_token"] is None:
        raise CheckpointError(f"{config_path} names no eos_token: a model that cannot end its answer cannot be taught")
    settings = {role: token for role, token in roles.items() if token is not None}
    settings |= {key: config[key] for key in _TOKENIZER_SETTINGS if isinstance(config.get(key), bool | int | str)}
    template = _chat_template(source_dir, config)
    write_tokenizer_config(
        out_dir, settings=settings, chat_template=template if template is not None else PLAIN_TEMPLATE
    )
    if adds_to_the_system_prompt(load_tokenizer(out_dir)):
        write_tokenizer_config(out_dir, settings=settings, chat_template=LLAMA3_TEMPLATE)


def _token_text(token: Any) -> str | None:
    """Return the text of a special token, which may stand as a string or as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _chat_template(source_dir: Path, config: dict[str, Any]) -> str | None:
    path = source_dir / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several templates, each with a name
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{source_dir / 'tokenizer_config.json'}: chat_template is a {type(template).__name__}")
    return template
