"""Packed token sets made of several sources by weight, without anything that is measured.

Training and validation never share a document, nor does the training of one mixture with the validation of another:
`is_validation_document` decides by the document alone. What was drawn is checked again from its tokens, and recorded.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from pipeline.architecture import Frozen
from pipeline.data.decontamination import NgramSet
from pipeline.data.documents import Document
from pipeline.data.drawing import DrawableSource, Drawn, Piece, draw, tokenize
from pipeline.data.packed import PackedTokens
from pipeline.data.packing import pack_documents
from pipeline.errors import DataError
from pipeline.recipe import MixtureConfig

MIXTURE_FILE = "mixture.json"

# A piece of a long document is about four windows of English, at four characters a token.
_PIECE_CHARACTERS_PER_WINDOW_TOKEN = 16


class MixtureSource(Frozen):
    """What one source gave to a mixture. Tokens count the separators; shares are of the training tokens.

    `num_checked` documents were looked at, `num_contaminated` of them were left out.
    """

    source: str
    domain: str
    licence: str
    share_asked: float
    share_got: float
    num_documents: int
    num_tokens: int
    num_validation_documents: int
    num_validation_tokens: int
    num_held_out: int
    num_checked: int
    num_contaminated: int
    is_exhausted: bool


class LongContextRecord(Frozen):
    """One further training set, of longer windows; no document of it is in a set of shorter ones."""

    sequence_length: int
    num_tokens: int
    num_documents: int


class MixtureRecord(Frozen):
    """What a packed set is made of; the content of MIXTURE_FILE. Sources are counted in the first training set.

    The file leaves out an empty `long_context`: a mixture without one keeps the bytes it had before there were any.
    """

    sequence_length: int
    vocab_size: int
    separator: str
    num_tokens: int
    num_validation_tokens: int
    num_contaminated_documents_left: int
    long_context: tuple[LongContextRecord, ...] = ()
    sources: tuple[MixtureSource, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceDocuments:
    """A source that a mixture may draw from."""

    documents: Sequence[Document]
    domain: str
    licence: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """Training and validation windows, further training windows by their length, and what they are made of."""

    train: PackedTokens
    validation: PackedTokens
    long_context: dict[int, PackedTokens]
    record: MixtureRecord


def separator_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that ends a document: <|endoftext|> where the vocabulary has it, else the EOS token.

    (An instruction-tuned tokenizer's EOS often ends a turn, not a document.)

    Raises:
        DataError: when the tokenizer has neither.
    """
    end_of_text = tokenizer.get_vocab().get("<|endoftext|>", tokenizer.eos_token_id)
    if not isinstance(end_of_text, int):
        raise DataError("the tokenizer has neither <|endoftext|> nor an EOS token: documents could not be told apart")
    return end_of_text


def build_mixture(
    sources: Mapping[str, SourceDocuments],
    *,
    config: MixtureConfig,
    tokenizer: PreTrainedTokenizerBase,
    held_out_ids: AbstractSet[str],
    ngrams: NgramSet,
    report: Callable[[int, int], None],
) -> Mixture:
    """Draw, tokenize and pack a mixture; equal arguments give equal windows.

    A source that runs dry is reported and the others fill its place. Windows are shuffled, so that any prefix of them
    is a fair mix. `report` is called with the tokens drawn so far and the tokens wanted.

    Raises:
        DataError: when all sources together hold too few tokens, saying how many there are.
    """
    weights = {entry.source: entry.weight for entry in config.entries}
    if len(weights) != len(config.entries):
        raise DataError(f"a mixture names a source twice: {sorted(entry.source for entry in config.entries)}")
    drawn = {
        name: DrawableSource.open(
            name, sources[name].documents, held_out_ids=held_out_ids, ngrams=ngrams, seed=config.seed
        )
        for name in weights
    }
    length = config.sequence_length
    max_characters = _PIECE_CHARACTERS_PER_WINDOW_TOKEN * length
    num_tokens, num_validation = _whole_windows(config.tokens, length), _whole_windows(config.validation_tokens, length)
    num_longer = {
        more.sequence_length: _whole_windows(more.tokens, more.sequence_length) for more in config.long_context
    }
    wanted = num_tokens + num_validation + sum(num_longer.values())
    separator = separator_id(tokenizer)
    validation = draw(
        {
            name: tokenize(source.validation_pieces(max_characters), tokenizer=tokenizer)
            for name, source in drawn.items()
        },
        weights=weights,
        num_tokens=num_validation,
        what="validation",
        remedy="one document in sixteen is kept for validation: lower validation_tokens, raise max_documents, or add "
        "sources",
        report=lambda done: report(done, wanted),
    )
    num_done = num_validation
    longer: dict[int, _Packed] = {}
    training: Drawn | None = None
    # Longest windows first: they need the long documents, of which shorter windows would leave pieces.
    for window, num_wanted in [*reversed(num_longer.items()), (length, num_tokens)]:
        used = frozenset(piece.document_id for packed in longer.values() for piece in packed.pieces)
        training = draw(
            {
                name: tokenize(
                    source.training_pieces(_PIECE_CHARACTERS_PER_WINDOW_TOKEN * window, without=used),
                    tokenizer=tokenizer,
                )
                for name, source in drawn.items()
            },
            weights=weights,
            num_tokens=num_wanted,
            what="training" if window == length else f"training part in windows of {window:,}",
            remedy="lower the tokens, raise max_documents, or add sources",
            report=lambda done, before=num_done: report(before + done, wanted),
        )
        num_done += num_wanted
        if window != length:
            longer[window] = _pack(
                training, num_tokens=num_wanted, sequence_length=window, seed=config.seed, separator=separator
            )
    assert training is not None
    train = _pack(training, num_tokens=num_tokens, sequence_length=length, seed=config.seed, separator=separator)
    held_back = _pack(
        validation, num_tokens=num_validation, sequence_length=length, seed=config.seed, separator=separator
    )
    return Mixture(
        train=train.packed,
        validation=held_back.packed,
        long_context={window: packed.packed for window, packed in longer.items()},
        record=MixtureRecord(
            sequence_length=config.sequence_length,
            vocab_size=len(tokenizer),
            separator=str(tokenizer.convert_ids_to_tokens(separator)),
            num_tokens=num_tokens,
            num_validation_tokens=num_validation,
            num_contaminated_documents_left=_count_contaminated(
                [piece for packed in (train, held_back, *longer.values()) for piece in packed.pieces],
                tokenizer=tokenizer,
                ngrams=ngrams,
            ),
            long_context=tuple(
                LongContextRecord(
                    sequence_length=window,
                    num_tokens=packed.num_tokens.total(),
                    num_documents=len({piece.document_id for piece in packed.pieces}),
                )
                for window, packed in sorted(longer.items())
            ),
            sources=tuple(
                _source_record(
                    drawn[name],
                    described=sources[name],
                    share_asked=weights[name] / sum(weights.values()),
                    train=train,
                    validation=held_back,
                    is_exhausted=name in training.exhausted,
                )
                for name in drawn
            ),
        ),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Packed:
    packed: PackedTokens
    pieces: list[Piece]
    num_tokens: Counter[str]


def _pack(drawn: Drawn, *, num_tokens: int, sequence_length: int, seed: int, separator: int) -> _Packed:
    """Join the pieces in a seeded order, keep exactly `num_tokens`, and shuffle the windows."""
    pieces = list(drawn.pieces)
    random.Random(f"{seed} order").shuffle(pieces)
    kept: list[Piece] = []
    tokens_by_source: Counter[str] = Counter()
    for piece in pieces:
        room = num_tokens - tokens_by_source.total()
        if room <= 0:
            break
        kept.append(Piece(source=piece.source, document_id=piece.document_id, ids=piece.ids[:room]))
        tokens_by_source[piece.source] += min(room, piece.num_tokens)
    packed = pack_documents(
        (piece.ids for piece in kept), sequence_length=sequence_length, separator_id=separator
    ).take(num_tokens)
    order = torch.randperm(len(packed), generator=torch.Generator().manual_seed(seed))
    shuffled = PackedTokens(
        tokens_NT=packed.tokens_NT[order],
        labels_NT=packed.labels_NT[order],
        position_ids_NT=packed.position_ids_NT[order],
    )
    return _Packed(packed=shuffled, pieces=kept, num_tokens=tokens_by_source)


def _whole_windows(num_tokens: int, sequence_length: int) -> int:
    return math.ceil(num_tokens / sequence_length) * sequence_length


def _count_contaminated(pieces: Sequence[Piece], *, tokenizer: PreTrainedTokenizerBase, ngrams: NgramSet) -> int:
    """Count the documents whose tokens, decoded again, share an n-gram with what is measured."""
    texts = tokenizer.batch_decode([piece.ids for piece in pieces])
    return len({piece.document_id for piece, text in zip(pieces, texts, strict=True) if ngrams.shares_ngram(text)})


def _source_record(
    source: DrawableSource,
    *,
    described: SourceDocuments,
    share_asked: float,
    train: _Packed,
    validation: _Packed,
    is_exhausted: bool,
) -> MixtureSource:
    return MixtureSource(
        source=source.name,
        domain=described.domain,
        licence=described.licence,
        share_asked=share_asked,
        share_got=train.num_tokens[source.name] / train.num_tokens.total(),
        num_documents=_num_documents(train, source.name),
        num_tokens=train.num_tokens[source.name],
        num_validation_documents=_num_documents(validation, source.name),
        num_validation_tokens=validation.num_tokens[source.name],
        num_held_out=source.num_held_out,
        num_checked=source.num_checked,
        num_contaminated=source.num_contaminated,
        is_exhausted=is_exhausted,
    )


def _num_documents(packed: _Packed, source: str) -> int:
    return len({piece.document_id for piece in packed.pieces if piece.source == source})
