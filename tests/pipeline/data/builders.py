"""Small tokenizers and documents for the tests of pipeline.data."""

import random
from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from pipeline.data.documents import Document, SourceRecord, SourceRecords, select_documents, write_documents
from pipeline.recipe import FileSource

CHATML_WITH_DEFAULT_SYSTEM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% if not date_string is defined %}"
    "{% set date_string = strftime_now('%d %b %Y %H:%M:%S') %}{% endif %}{{ 'Today: ' + date_string }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def make_tokenizer(
    special: list[str], *, eos: str, bos: str | None, chat_template: str | None
) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer in which every byte is a token and two line breaks are one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*special, *alphabet, "ĊĊ"]
    backend = Tokenizer(BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[("Ċ", "Ċ")]))
    # Llama 3 keeps a run of line breaks together, whatever follows.
    breaks = pre_tokenizers.Split(Regex(r"[\r\n]+|[^\r\n]+"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([breaks, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, bos_token=bos)
    tokenizer.chat_template = chat_template
    return tokenizer


def chatml_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that plays SmolLM2's: BOS is the token that starts a turn, EOS the one that ends it."""
    return make_tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        bos="<|im_start|>",
        eos="<|im_end|>",
        chat_template=CHATML_WITH_DEFAULT_SYSTEM,
    )


def llama3_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that plays Llama 3's: its EOS does not end a turn, and it puts BOS before any text itself."""
    bos = "<|begin_of_text|>"
    tokenizer = make_tokenizer(
        [bos, "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        bos=bos,
        eos="<|end_of_text|>",
        chat_template=LLAMA3,
    )
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return tokenizer


def make_documents(num_documents: int, *, num_words: int, seed: int) -> list[Document]:
    """Return documents of ten words a line, in the order of their ids; no word stands twice, under any seed."""
    numbers = iter(random.Random(seed).sample(range(10**5), k=num_documents * num_words))
    texts = (
        "\n".join(" ".join(f"w{seed:02d}{next(numbers):05d}" for _ in range(10)) for _ in range(num_words // 10))
        for _ in range(num_documents)
    )
    return select_documents(texts, max_documents=num_documents)


def write_corpora(
    directory: Path, sources: dict[str, list[Document]], *, domains: Mapping[str, str] | None = None
) -> Path:
    """Write a `corpora` artifact of these documents; the domain is `words` where `domains` names no other."""
    records = []
    for name, documents in sources.items():
        write_documents(directory / f"{name}.parquet", documents)
        records.append(
            SourceRecord(
                name=name,
                domain=(domains or {}).get(name, "words"),
                licence="none",
                origin="test",
                num_documents=len(documents),
                num_characters=sum(len(item.text) for item in documents),
            )
        )
    contents = SourceRecords(sources=tuple(records))
    (directory / "sources.json").write_text(contents.model_dump_json(), encoding="utf-8")
    return directory


def file_source(path: Path, *, text_field: str = "text", max_documents: int = 5) -> FileSource:
    """A source of a recipe over JSONL files of one's own."""
    return FileSource(
        kind="jsonl",
        name="own",
        domain="notes",
        licence="CC-BY-4.0",
        path=str(path),
        text_field=text_field,
        max_documents=max_documents,
    )
