"""A checkpoint's tokenizer as GGUF metadata, where llama.cpp has its pre-tokenizer under a name. Reads files only.

llama.cpp splits text by rules that it keeps under names; a file names one. Which rule a tokenizer.json follows is told
from its pre-tokenizer, compared whole: a tokenizer that splits in any other way is refused, never approximated.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer

from pipeline.errors import CheckpointError
from pipeline.model.hf_config import read_json_object

# Llama 3: the words, numbers of up to three digits, and spaces of its published tokenizer.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_BYTES = {"type": "ByteLevel", "add_prefix_space": False}
_RULES: dict[str, dict[str, Any]] = {
    "gpt-2": {**_BYTES, "use_regex": True},
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, {**_BYTES, "use_regex": True}],
    },
    "llama-bpe": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": _LLAMA3_WORDS}, "behavior": "Isolated", "invert": False},
            {**_BYTES, "use_regex": False},
        ],
    },
}
# Where no two bytes are ever merged, how text was split before makes no difference.
_WITHOUT_MERGES = "gpt-2"
# llama.cpp refuses a file without merges. No UTF-8 text has this byte, so this merge never happens.
_NO_MERGE = "\u00ff \u00ff"


def tokenizer_obstacle(directory: Path) -> str | None:
    """Return why the tokenizer of a checkpoint cannot be written into a GGUF file; None when it can."""
    try:
        _rule_name(directory)
    except CheckpointError as err:
        return str(err)
    return None


def add_tokenizer(writer: GGUFWriter, directory: Path, *, vocab_size: int, end_token_ids: Sequence[int]) -> None:
    """Write tokens, merges, special tokens and the chat template of a checkpoint; ids without a token become unused.

    Of `end_token_ids`, with which the model ends an answer, two are named besides the tokenizer's EOS: llama.cpp ends
    at any of the three.

    Raises:
        CheckpointError: when llama.cpp has no rule by which this tokenizer splits text.
    """
    rule = _rule_name(directory)
    described = read_json_object(directory / "tokenizer.json")
    backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    kinds = [TokenType.UNUSED] * vocab_size
    for token, index in described["model"]["vocab"].items():
        tokens[index], kinds[index] = token, TokenType.NORMAL
    for added in described.get("added_tokens", []):
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]], kinds[added["id"]] = added["content"], kind
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([_spaced(merge) for merge in described["model"]["merges"]] or [_NO_MERGE])

    config = read_json_object(directory / "tokenizer_config.json")
    special = {role: _token_id(config.get(f"{role}_token"), backend) for role in ("bos", "eos", "pad", "unk")}
    for role, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("pad", writer.add_pad_token_id),
        ("unk", writer.add_unk_token_id),
    ):
        token_id = special[role]
        if token_id is not None:
            add(token_id)
    others = [token_id for token_id in end_token_ids if token_id != special["eos"]]
    for token_id, add in zip(others, (writer.add_eot_token_id, writer.add_eom_token_id), strict=False):
        add(token_id)
    bos_id = special["bos"]
    writer.add_add_bos_token(bos_id is not None and backend.encode("a").ids[0] == bos_id)
    template = directory / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text(encoding="utf-8"))


def _rule_name(directory: Path) -> str:
    """Return the name under which llama.cpp knows how the tokenizer splits text."""
    path = directory / "tokenizer.json"
    described = read_json_object(path)
    model, normalizer = described.get("model"), described.get("normalizer")
    if not isinstance(model, dict) or model.get("type") != "BPE" or model.get("byte_fallback") or normalizer:
        raise CheckpointError(f"{path}: only byte-level BPE without a normalizer can be written into GGUF")
    found = _without_offsets(described.get("pre_tokenizer"))
    if not model.get("merges") and found in ({**_BYTES, "use_regex": False}, _RULES["gpt-2"]):
        return _WITHOUT_MERGES
    for name, rule in _RULES.items():
        if found == rule:
            return name
    raise CheckpointError(
        f"{path}: llama.cpp's names for pre-tokenizers that are known here ({', '.join(_RULES)}) do not cover "
        f"{json.dumps(found)[:120]}"
    )


def _without_offsets(rule: Any) -> Any:
    """Return a pre-tokenizer without `trim_offsets`, which says where tokens stood and changes none."""
    if isinstance(rule, dict):
        return {key: _without_offsets(value) for key, value in rule.items() if key != "trim_offsets"}
    return [_without_offsets(item) for item in rule] if isinstance(rule, list) else rule


def _spaced(merge: str | list[str]) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)


def _token_id(token: Any, backend: Tokenizer) -> int | None:
    text = token.get("content") if isinstance(token, dict) else token
    return backend.token_to_id(text) if isinstance(text, str) else None
