"""Making tokenizer files: byte-level BPE tokenizers built from their parts, and the ChatML template.

Reading them back is pipeline.model.checkpoint.load_tokenizer.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer
from transformers import PreTrainedTokenizerBase

# ChatML as SmolLM2 writes it, without its default system prompt: no system message means none.
CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# For parents that come without a template: role headers as text, each turn closed by the tokenizer's own end token.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# Llama 3.1's own puts a knowledge cut-off and a date before the system prompt, 3.2's even today's: a switch that is the
# whole system turn, and the same on every day, needs the headers alone (as Llama-Nemotron has them).
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA3_HEADER = "<|start_header_id|>"


@dataclass(frozen=True, kw_only=True, slots=True)
class SpecialTokens:
    """Which tokens play a part; `control` are all tokens that text never splits and decoding may skip."""

    bos: str | None
    eos: str
    pad: str | None
    unk: str | None
    control: tuple[str, ...]


def save_byte_level_bpe(
    directory: Path,
    *,
    tokens: Sequence[str],
    merges: Sequence[tuple[str, str]],
    pre_tokenizer: PreTokenizer,
    special: SpecialTokens,
    chat_template: str,
    max_tokens: int,
) -> None:
    """Write the files of a byte-level BPE tokenizer whose token ids are positions in `tokens`."""
    backend = Tokenizer(BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special.control])
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    roles = {"bos_token": special.bos, "eos_token": special.eos, "pad_token": special.pad, "unk_token": special.unk}
    write_tokenizer_config(
        directory,
        settings={name: token for name, token in roles.items() if token is not None} | {"model_max_length": max_tokens},
        chat_template=chat_template,
    )


def write_tokenizer_config(directory: Path, *, settings: Mapping[str, object], chat_template: str | None) -> None:
    """Write tokenizer_config.json and chat_template.jinja.

    The class is written under the name that transformers 4 and 5, and the servers built on them, all know.
    """
    config = {**settings, "clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    text = json.dumps(config, indent=1, sort_keys=True, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    if chat_template is not None:
        (directory / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def adds_to_the_system_prompt(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a Llama-3 chat template writes more into the system turn than the system prompt."""
    template = tokenizer.chat_template
    if not isinstance(template, str) or LLAMA3_HEADER not in template:
        return False
    messages = [{"role": "system", "content": "on"}, {"role": "user", "content": "hi"}]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False)).removeprefix(str(tokenizer.bos_token or ""))
    return not text.startswith(f"{LLAMA3_HEADER}system<|end_header_id|>\n\non<|eot_id|>")


def byte_alphabet() -> list[str]:
    """Return the 256 characters that stand for single bytes in byte-level tokenizers, sorted."""
    return sorted(ByteLevel.alphabet())


def whole_text_bytes() -> PreTokenizer:
    """Return the pre-tokenizer that only maps text to bytes."""
    return ByteLevel(add_prefix_space=False, use_regex=False)


def smollm_pre_tokenizer() -> PreTokenizer:
    """Return SmolLM's pre-tokenizer: every digit alone, then byte-level words.

    GGUF names it `smollm`; transformers 5.23 ignores that name and splits the space before a digit wrongly.
    """
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
