"""Mixtures: shares, disjoint splits, decontamination that is real, and the same windows every time."""

import random
import tracemalloc
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from pipeline.data.decontamination import NgramSet, build_ngrams
from pipeline.data.documents import Document, is_validation_document, select_documents
from pipeline.data.drawing import DrawableSource, Piece, draw, split_text, tokenize
from pipeline.data.mixtures import Mixture, SourceDocuments, build_mixture, opening_ids, separator_id
from pipeline.data.packed import save_packed
from pipeline.errors import DataError
from pipeline.recipe import LongContextTokens, MixtureConfig, MixtureEntry
from tests.pipeline.data.builders import chatml_tokenizer, llama3_tokenizer, make_documents, make_tokenizer

TOKENIZER = chatml_tokenizer()
SEQUENCE_LENGTH = 64
NOTHING_MEASURED = build_ngrams([], num_words=13)


def mixture_config(weights: dict[str, float], *, tokens: int = 8000, validation: int = 1000, seed: int = 1):
    return MixtureConfig(
        sequence_length=SEQUENCE_LENGTH,
        tokens=tokens,
        validation_tokens=validation,
        long_context=(),
        entries=tuple(MixtureEntry(source=name, weight=weight) for name, weight in weights.items()),
        seed=seed,
    )


def build(
    sources: dict[str, list[Document]],
    config: MixtureConfig,
    *,
    held_out_ids: frozenset[str] = frozenset(),
    ngrams: NgramSet = NOTHING_MEASURED,
    tokenizer: PreTrainedTokenizerFast = TOKENIZER,
) -> Mixture:
    return build_mixture(
        {name: SourceDocuments(documents=items, domain="d", licence="none") for name, items in sources.items()},
        config=config,
        tokenizer=tokenizer,
        held_out_ids=held_out_ids,
        ngrams=ngrams,
        report=lambda done, total: None,
    )


def words_of(tokens_NT: torch.Tensor) -> set[str]:
    """Return the words that stand whole inside the windows; those at a window's edge may be cut."""
    found: set[str] = set()
    for row in tokens_NT.tolist():
        found.update(str(TOKENIZER.decode(row)).replace("<|endoftext|>", " ").split()[1:-1])
    return found


def documents_of(tokens_NT: torch.Tensor) -> set[str]:
    """Return the ids of the documents of SOURCES whose words stand in the windows."""
    owners = {word: item.document_id for items in SOURCES.values() for item in items for word in item.text.split()}
    return {owners[word] for word in words_of(tokens_NT) if word in owners}


SOURCES = {"a": make_documents(60, num_words=100, seed=1), "b": make_documents(60, num_words=100, seed=2)}


def test_mixture_fills_whole_windows_with_the_asked_shares():
    mixture = build(SOURCES, mixture_config({"a": 3.0, "b": 1.0}))
    assert mixture.train.tokens_NT.shape == (125, SEQUENCE_LENGTH)
    assert mixture.validation.tokens_NT.shape == (16, SEQUENCE_LENGTH)
    record = mixture.record
    assert (record.num_tokens, record.num_validation_tokens) == (8000, 1024)
    assert (record.vocab_size, record.separator) == (len(TOKENIZER), "<|endoftext|>")
    assert sum(source.num_tokens for source in record.sources) == 8000
    assert [source.share_asked for source in record.sources] == [0.75, 0.25]
    assert [source.share_got for source in record.sources] == pytest.approx([0.75, 0.25], abs=1e-3)
    assert [source.num_validation_tokens for source in record.sources] == [768, 256]


def test_mixture_tokens_per_source_agree_with_a_count_of_the_words():
    """Every word stands in one document of one source, so the windows themselves tell the shares."""
    mixture = build(SOURCES, mixture_config({"a": 3.0, "b": 1.0}))
    found = words_of(mixture.train.tokens_NT)
    from_a = {word for item in SOURCES["a"] for word in item.text.split()}
    assert len(found & from_a) / len(found) == pytest.approx(0.75, abs=0.02)


def test_mixture_splits_share_no_document():
    mixture = build(SOURCES, mixture_config({"a": 1.0, "b": 1.0}))
    train, validation = (documents_of(split.tokens_NT) for split in (mixture.train, mixture.validation))
    assert len(train) > 5
    assert len(validation) > 1
    assert not train & validation


def test_longer_windows_are_packed_from_documents_of_their_own():
    plain = mixture_config({"a": 1.0, "b": 1.0}, tokens=6000)
    longer = (LongContextTokens(sequence_length=128, tokens=2000), LongContextTokens(sequence_length=512, tokens=3000))
    mixture = build(SOURCES, plain.model_copy(update={"long_context": longer}))
    assert {length: packed.tokens_NT.shape for length, packed in mixture.long_context.items()} == {
        128: (16, 128),
        512: (6, 512),
    }
    parts = [mixture.train, mixture.validation, *mixture.long_context.values()]
    owners = [documents_of(part.tokens_NT) for part in parts]
    assert all(owners)
    assert len(set.union(*owners)) == sum(map(len, owners))
    assert [(one.sequence_length, one.num_tokens) for one in mixture.record.long_context] == [(128, 2048), (512, 3072)]
    again = build(SOURCES, plain.model_copy(update={"long_context": longer}))
    assert torch.equal(again.long_context[512].tokens_NT, mixture.long_context[512].tokens_NT)


def test_mixtures_of_different_seeds_and_weights_never_train_on_each_others_validation():
    distillation = build(SOURCES, mixture_config({"a": 1.0, "b": 1.0}, tokens=30_000))
    pretraining = build(SOURCES, mixture_config({"a": 3.0, "b": 1.0}, tokens=30_000, seed=2))
    for mixture, other in ((distillation, pretraining), (pretraining, distillation)):
        validation = documents_of(mixture.validation.tokens_NT)
        assert len(validation) > 1
        assert not validation & documents_of(other.train.tokens_NT)
        assert all(int(document_id[7], 16) == 0 for document_id in validation)
    trained = documents_of(distillation.train.tokens_NT) | documents_of(pretraining.train.tokens_NT)
    assert len(trained) > 40
    assert all(int(document_id[7], 16) != 0 for document_id in trained)


def test_mixture_of_too_few_validation_documents_says_how_many_tokens_there_are():
    message = r"validation part wants 99,968 tokens, .* hold [1-9][0-9,]+ in their validation .*lower validation_tokens"
    with pytest.raises(DataError, match=message):
        build(SOURCES, mixture_config({"a": 1.0, "b": 1.0}, validation=99_968))


def test_mixture_validation_goes_on_with_later_pieces_of_its_documents():
    documents = make_documents(40, num_words=400, seed=3)
    only = next(item for item in documents if is_validation_document(item.document_id))
    others = [item for item in documents if not is_validation_document(item.document_id)]
    num_tokens = len(only.text) // SEQUENCE_LENGTH * SEQUENCE_LENGTH
    assert num_tokens > 3 * 16 * SEQUENCE_LENGTH  # a piece is 16 windows of single bytes
    mixture = build({"a": [only, *others]}, mixture_config({"a": 1.0}, validation=num_tokens))
    assert words_of(mixture.validation.tokens_NT) & {word for item in others for word in item.text.split()} == set()
    assert mixture.record.sources[0].num_validation_documents == 1


def test_mixture_is_the_same_every_time_and_another_under_another_seed():
    config = mixture_config({"a": 1.0, "b": 1.0})
    first, again = build(SOURCES, config), build(SOURCES, config)
    assert torch.equal(first.train.tokens_NT, again.train.tokens_NT)
    assert torch.equal(first.validation.tokens_NT, again.validation.tokens_NT)
    assert first.record == again.record
    other = build(SOURCES, mixture_config({"a": 1.0, "b": 1.0}, seed=2))
    assert not torch.equal(first.train.tokens_NT, other.train.tokens_NT)


def test_mixture_prefix_is_a_fair_mix():
    mixture = build(SOURCES, mixture_config({"a": 1.0, "b": 1.0}, tokens=16000))
    from_a = {word for item in SOURCES["a"] for word in item.text.split()}
    found = words_of(mixture.train.take(4000).tokens_NT)
    assert 0.25 < len(found & from_a) / len(found) < 0.75


def test_mixture_leaves_out_held_out_and_contaminated_documents():
    held_out, copied = SOURCES["a"][:5], SOURCES["b"][0]
    start = random.Random(1).randrange(50)
    quote = " ".join(copied.text.split()[start : start + 13])
    dirty = select_documents([f"{item.text}\n{quote.upper()}!" for item in SOURCES["a"][5:15]], max_documents=99)
    clean = SOURCES["a"][15:]
    num_tokens = sum(len(item.text) for item in clean if not is_validation_document(item.document_id))
    mixture = build(
        {"a": [*held_out, *clean, *dirty]},
        mixture_config({"a": 1.0}, tokens=num_tokens - SEQUENCE_LENGTH, validation=500),  # so every document comes up
        held_out_ids=frozenset(item.document_id for item in held_out),
        ngrams=build_ngrams([copied.text, *(item.text for item in held_out)], num_words=13),
    )
    (source,) = mixture.record.sources
    assert source.num_held_out == 5
    assert source.num_contaminated == 10
    assert mixture.record.num_contaminated_documents_left == 0
    unseen = {word for item in [*held_out, *dirty] for word in item.text.split()}
    assert not words_of(mixture.train.tokens_NT) & unseen
    assert not words_of(mixture.validation.tokens_NT) & unseen


def test_mixture_recheck_finds_what_drawing_let_through(monkeypatch: pytest.MonkeyPatch):
    """With the first check broken on purpose, the second one, on the decoded tokens, must count every document."""
    monkeypatch.setattr(DrawableSource, "_is_clean", lambda *_: True)
    measured = build_ngrams([item.text for item in SOURCES["a"]], num_words=13)
    mixture = build(SOURCES, mixture_config({"a": 1.0, "b": 1.0}), ngrams=measured)
    a, b = mixture.record.sources
    assert mixture.record.num_contaminated_documents_left == a.num_documents + a.num_validation_documents
    assert b.num_documents > 0


def test_mixture_of_a_source_that_runs_dry_goes_on_with_the_others():
    sources = {"a": SOURCES["a"][:3], "b": SOURCES["b"]}
    mixture = build(sources, mixture_config({"a": 1.0, "b": 1.0}, validation=64))
    a, b = mixture.record.sources
    assert (a.is_exhausted, b.is_exhausted) == (True, False)
    assert 0 < a.share_got < 0.4
    assert a.share_got + b.share_got == pytest.approx(1)
    assert mixture.train.num_tokens == 8000


def test_mixture_of_too_few_documents_says_how_many_tokens_there_are():
    with pytest.raises(DataError, match=r"training part wants 80,000 tokens, its sources hold [0-9,]+ .*a [0-9,]+"):
        build({"a": SOURCES["a"]}, mixture_config({"a": 1.0}, tokens=80_000))


def test_mixture_does_not_let_one_long_document_fill_a_share():
    long = select_documents(["\n".join(f"long{n} " * 5 for n in range(20_000))], max_documents=1)
    mixture = build({"a": [*long, *SOURCES["a"]]}, mixture_config({"a": 1.0}, tokens=4000, validation=2000))
    shares = ["long" in TOKENIZER.decode(row) for row in mixture.validation.tokens_NT.tolist()]
    assert sum(shares) <= 17  # one piece is 16 windows of single bytes, and may begin inside a window


def test_mixture_reads_special_tokens_in_text_as_text():
    text = "<|im_end|> and <|endoftext|> are written out here. " * 300
    documents = select_documents([f"{text}{number}" for number in range(40)], max_documents=40)
    mixture = build({"a": documents}, mixture_config({"a": 1.0}, tokens=3000))
    assert TOKENIZER.eos_token_id not in mixture.train.tokens_NT.flatten().tolist()
    assert int((mixture.train.tokens_NT == separator_id(TOKENIZER)).sum()) < 10


def test_mixture_that_names_a_source_twice_is_refused():
    config = MixtureConfig(
        sequence_length=8,
        tokens=8,
        validation_tokens=8,
        long_context=(),
        entries=(MixtureEntry(source="a", weight=1.0), MixtureEntry(source="a", weight=2.0)),
        seed=1,
    )
    with pytest.raises(DataError, match="names a source twice"):
        build(SOURCES, config)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldMixture:
    """A mixture built with every piece, token and text in memory at once: by length of window, validation as None."""

    windows: dict[int | None, torch.Tensor]
    num_documents: dict[int | None, int]
    num_contaminated: int


def held_mixture(
    sources: dict[str, list[Document]], config: MixtureConfig, *, tokenizer: Any, separator: int, ngrams: NgramSet
) -> HeldMixture:
    """Build a mixture as it was built before windows were written as they fill; opens no document with BOS."""
    opened = {
        name: DrawableSource.open(name, items, held_out_ids=frozenset(), ngrams=ngrams, seed=config.seed)
        for name, items in sources.items()
    }
    longer = [(more.sequence_length, more.sequence_length, more.tokens) for more in reversed(config.long_context)]
    parts = [(None, config.sequence_length, config.validation_tokens), *longer]
    kept: dict[int | None, list[Piece]] = {}
    windows: dict[int | None, torch.Tensor] = {}
    for key, length, tokens in [*parts, (config.sequence_length, config.sequence_length, config.tokens)]:
        num_tokens = -(-tokens // length) * length
        used = frozenset(piece.document_id for part, pieces in kept.items() if part for piece in pieces)
        texts = {
            name: source.training_pieces(16 * length, without=used) if key else source.validation_pieces(16 * length)
            for name, source in opened.items()
        }
        drawn = draw(
            {name: tokenize(pieces, tokenizer=tokenizer) for name, pieces in texts.items()},
            weights={entry.source: entry.weight for entry in config.entries},
            num_tokens=num_tokens,
            what="",
            remedy="",
            report=lambda _: None,
        )
        pieces = list(drawn.pieces)
        random.Random(f"{config.seed} order").shuffle(pieces)
        stream: list[int] = []
        kept[key] = []
        for piece in pieces:
            if len(stream) < num_tokens:
                kept[key].append(replace(piece, ids=piece.ids[: num_tokens - len(stream)]))
                stream += [*piece.ids, separator]
        stream_NT = torch.tensor(stream[:num_tokens]).reshape(-1, length)
        order = torch.randperm(len(stream_NT), generator=torch.Generator().manual_seed(config.seed))
        windows[key] = stream_NT[order]
    everything = [piece for pieces in kept.values() for piece in pieces]
    decoded = tokenizer.batch_decode([piece.ids for piece in everything])
    dirty = {piece.document_id for piece, text in zip(everything, decoded, strict=True) if ngrams.shares_ngram(text)}
    num_documents = {key: len({piece.document_id for piece in pieces}) for key, pieces in kept.items()}
    return HeldMixture(windows=windows, num_documents=num_documents, num_contaminated=len(dirty))


@pytest.mark.parametrize("seed", [1, 2])
def test_mixture_files_are_those_of_one_built_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int):
    plain = mixture_config({"a": 3.0, "b": 1.0}, tokens=20_000, seed=seed)
    longer = (LongContextTokens(sequence_length=128, tokens=2000), LongContextTokens(sequence_length=512, tokens=3000))
    config = plain.model_copy(update={"long_context": longer})
    measured = build_ngrams([item.text for item in SOURCES["a"][::2]], num_words=13)
    monkeypatch.setattr(DrawableSource, "_is_clean", lambda *_: True)
    mixture = build(SOURCES, config, ngrams=measured)
    wanted = held_mixture(SOURCES, config, tokenizer=TOKENIZER, separator=0, ngrams=measured)
    found = {None: mixture.validation, SEQUENCE_LENGTH: mixture.train, **mixture.long_context}
    assert found.keys() == wanted.windows.keys()
    for key, tokens_NT in wanted.windows.items():
        positions_NT = torch.arange(tokens_NT.shape[1]).expand(tokens_NT.shape)
        tensors = {"tokens": tokens_NT, "labels": tokens_NT.clone(), "position_ids": positions_NT}
        save_file({name: one.to(torch.int32).contiguous() for name, one in tensors.items()}, tmp_path / "wanted")
        written = save_packed(tmp_path, f"train-{key}", found[key])
        assert written.read_bytes() == (tmp_path / "wanted").read_bytes()
    record = mixture.record
    assert record.num_contaminated_documents_left == wanted.num_contaminated > 5
    assert [one.num_documents for one in record.long_context] == [wanted.num_documents[128], wanted.num_documents[512]]
    assert sum(one.num_documents for one in record.sources) == wanted.num_documents[SEQUENCE_LENGTH]
    assert sum(one.num_validation_documents for one in record.sources) == wanted.num_documents[None]


def test_mixture_is_built_in_a_few_bytes_a_token():
    """Four in the pieces drawn and four in the windows: nine in all, where lists of these small ints took 34."""
    words = [f"word{number}" for number in range(100)]
    texts = (" ".join(random.Random(seed).choices(words, k=400)) for seed in range(240))
    documents = select_documents(texts, max_documents=240)
    config = mixture_config({"a": 1.0}, tokens=400_000)
    build({"a": documents}, config.model_copy(update={"tokens": 1000}))
    tracemalloc.start()
    mixture = build({"a": documents}, config)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most / mixture.train.num_tokens < 12


def test_separator_is_end_of_text_or_else_eos():
    assert TOKENIZER.convert_ids_to_tokens(separator_id(TOKENIZER)) == "<|endoftext|>"
    instruct = llama3_tokenizer()
    instruct.eos_token = "<|eot_id|>"
    assert instruct.convert_ids_to_tokens(separator_id(instruct)) == "<|end_of_text|>"
    bare = make_tokenizer(["<s>"], bos="<s>", eos="<s>", chat_template=None)
    assert separator_id(bare) == bare.eos_token_id
    bare.eos_token = None
    with pytest.raises(DataError, match="could not be told apart"):
        separator_id(bare)


def test_documents_open_with_bos_where_the_tokenizer_puts_it_before_text():
    assert opening_ids(TOKENIZER) == []  # its BOS starts a turn
    tokenizer = llama3_tokenizer()
    tokenizer.eos_token = "<|eot_id|>"
    bos, end = tokenizer.bos_token_id, separator_id(tokenizer)
    assert opening_ids(tokenizer) == [bos]
    config = mixture_config({"a": 1.0, "b": 1.0}).model_copy(
        update={"long_context": (LongContextTokens(sequence_length=512, tokens=3000),)}
    )
    # What BOS would be decoded to is no word of the document that it opens.
    begun = [f"begin of text {' '.join(item.text.split()[:10])}" for items in SOURCES.values() for item in items]
    clean, quoted = (
        build(SOURCES, config, tokenizer=tokenizer, ngrams=ngrams)
        for ngrams in (NOTHING_MEASURED, build_ngrams(begun, num_words=13))
    )
    assert quoted.record == clean.record
    order = torch.randperm(125, generator=torch.Generator().manual_seed(config.seed))
    joined = clean.train.tokens_NT[order.argsort()].flatten().tolist()
    assert joined[0] == bos
    after_ends = [joined[place + 1] for place, token in enumerate(joined[:-1]) if token == end]
    assert len(after_ends) > 5
    assert all(token == bos for token in after_ends)
    assert joined.count(bos) == len(after_ends) + 1
    assert tokenizer.eos_token_id not in joined
    texts = {item.text for items in SOURCES.values() for item in items}
    pieces = str(tokenizer.decode(joined)).removeprefix("<|begin_of_text|>").split("<|end_of_text|><|begin_of_text|>")
    assert sum(piece in texts for piece in pieces) > 5
    assert sum(one.num_tokens for one in clean.record.sources) == 8000


@pytest.mark.parametrize("max_characters", [1, 7, 40, 10_000])
def test_text_split_is_the_text_in_pieces_no_longer_than_asked(max_characters: int):
    text = "a line\n\nanother line that is long\n" + "x" * 50 + "\n"
    pieces = list(split_text(text, max_characters=max_characters))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= max_characters for piece in pieces)
