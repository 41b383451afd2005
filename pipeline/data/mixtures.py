"""Packed token sets made of several sources by weight, without anything that is measured.

Training and validation never share a document, nor does the training of one mixture with the validation of another:
`is_validation_document` decides by the document alone. What was drawn is checked again from its tokens, and recorded.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from pipeline.architecture import Frozen
from pipeline.data.decontamination import NgramSet
from pipeline.data.documents import Document
from pipeline.data.drawing import DrawableSource, Piece, TextPiece, draw, tokenize
from pipeline.data.packed import PackedTokens
from pipeline.data.packing import pack_documents
from pipeline.errors import DataError
from pipeline.recipe import MixtureConfig

MIXTURE_FILE = "mixture.json"

# A piece of a long document is about four windows of English, at four characters a token.
_PIECE_CHARACTERS_PER_WINDOW_TOKEN = 16

# The first of these that a vocabulary has ends a document: an instruction-tuned tokenizer's EOS often ends a turn, as
# Llama 3's <|eot_id|> does.
_END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>")


class MixtureSource(Frozen):
    """What one source gave to a mixture. Tokens count BOS and the separators; shares are of the training tokens.

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
    """Return the token that ends a document: <|endoftext|> or <|end_of_text|> where there is one, else the EOS token.

    Raises:
        DataError: when the tokenizer has none of them.
    """
    vocabulary = tokenizer.get_vocab()
    known = [vocabulary[token] for token in _END_OF_DOCUMENT if token in vocabulary]
    separator = known[0] if known else tokenizer.eos_token_id
    if not isinstance(separator, int):
        raise DataError(
            f"the tokenizer has none of {', '.join(_END_OF_DOCUMENT)} and no EOS token: documents could not be told "
            "apart"
        )
    return separator


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the BOS token where the tokenizer puts it before plain text of its own accord, else nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if isinstance(bos, int) and tokenizer("x")["input_ids"][:1] == [bos] else []


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
    opened = {
        name: DrawableSource.open(
            name, sources[name].documents, held_out_ids=held_out_ids, ngrams=ngrams, seed=config.seed
        )
        for name in weights
    }
    length = config.sequence_length
    num_tokens, num_validation = _whole_windows(config.tokens, length), _whole_windows(config.validation_tokens, length)
    num_longer = {
        more.sequence_length: _whole_windows(more.tokens, more.sequence_length) for more in config.long_context
    }
    wanted = num_tokens + num_validation + sum(num_longer.values())
    joining = _Joining(
        sources=opened,
        tokenizer=tokenizer,
        opening=opening_ids(tokenizer),
        separator=separator_id(tokenizer),
        weights=weights,
        ngrams=ngrams,
        seed=config.seed,
    )
    validation = joining.part(
        lambda source: source.validation_pieces(_PIECE_CHARACTERS_PER_WINDOW_TOKEN * length),
        num_tokens=num_validation,
        sequence_length=length,
        what="validation",
        remedy="one document in sixteen is kept for validation: lower validation_tokens, raise max_documents, or add "
        "sources",
        report=lambda done: report(done, wanted),
    )
    num_done = num_validation
    training: dict[int, _Part] = {}
    # Longest windows first: they need the long documents, of which shorter windows would leave pieces.
    for window, num_wanted in [*reversed(num_longer.items()), (length, num_tokens)]:
        used = _joined(part.document_ids for part in training.values())
        characters = _PIECE_CHARACTERS_PER_WINDOW_TOKEN * window
        training[window] = joining.part(
            lambda source, characters=characters, used=used: source.training_pieces(characters, without=used),
            num_tokens=num_wanted,
            sequence_length=window,
            what="training" if window == length else f"training part in windows of {window:,}",
            remedy="lower the tokens, raise max_documents, or add sources",
            report=lambda done, before=num_done: report(before + done, wanted),
        )
        num_done += num_wanted
    train = training.pop(length)
    return Mixture(
        train=train.packed,
        validation=validation.packed,
        long_context={window: part.packed for window, part in training.items()},
        record=MixtureRecord(
            sequence_length=config.sequence_length,
            vocab_size=len(tokenizer),
            separator=str(tokenizer.convert_ids_to_tokens(joining.separator)),
            num_tokens=num_tokens,
            num_validation_tokens=num_validation,
            num_contaminated_documents_left=len(
                _joined(part.contaminated_ids for part in (train, validation, *training.values()))
            ),
            long_context=tuple(
                LongContextRecord(
                    sequence_length=window,
                    num_tokens=part.num_tokens.total(),
                    num_documents=len(part.document_ids),
                )
                for window, part in sorted(training.items())
            ),
            sources=tuple(
                _source_record(
                    opened[name],
                    described=sources[name],
                    share_asked=weights[name] / sum(weights.values()),
                    train=train,
                    validation=validation,
                    is_exhausted=name in train.exhausted,
                )
                for name in opened
            ),
        ),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """One set of windows, the documents in it by their source, and the sources that had no more."""

    packed: PackedTokens
    num_tokens: Counter[str]
    documents: dict[str, set[str]]
    contaminated_ids: set[str]
    exhausted: frozenset[str]

    @property
    def document_ids(self) -> set[str]:
        """The documents of all sources."""
        return _joined(self.documents.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class _Joining:
    """How the documents of one mixture become windows: `opening`, then a document's tokens, then `separator`."""

    sources: Mapping[str, DrawableSource]
    tokenizer: PreTrainedTokenizerBase
    opening: list[int]
    separator: int
    weights: Mapping[str, float]
    ngrams: NgramSet
    seed: int

    def part(
        self,
        pieces_of: Callable[[DrawableSource], Iterator[TextPiece]],
        *,
        num_tokens: int,
        sequence_length: int,
        what: str,
        remedy: str,
        report: Callable[[int], None],
    ) -> _Part:
        """Draw from every source, join the pieces in a seeded order, keep exactly `num_tokens`, shuffle the windows.

        Raises:
            DataError: see pipeline.data.drawing.draw.
        """
        drawn = draw(
            {name: self._tokenized(pieces_of(source)) for name, source in self.sources.items()},
            weights=self.weights,
            num_tokens=num_tokens,
            what=what,
            remedy=remedy,
            report=report,
        )
        random.Random(f"{self.seed} order").shuffle(drawn.pieces)
        kept: list[Piece] = []
        tokens_by_source: Counter[str] = Counter()
        documents: dict[str, set[str]] = {}
        for piece in drawn.pieces:
            room = num_tokens - tokens_by_source.total()
            if room <= 0:
                break
            kept.append(replace(piece, ids=piece.ids[:room]))
            tokens_by_source[piece.source] += min(room, piece.num_tokens)
            documents.setdefault(piece.source, set()).add(piece.document_id)
        # Row r of the shuffled windows is window order[r] of the stream.
        order = torch.randperm(num_tokens // sequence_length, generator=torch.Generator().manual_seed(self.seed))
        return _Part(
            packed=pack_documents(
                (piece.ids for piece in kept),
                rows=order.argsort().tolist(),
                sequence_length=sequence_length,
                separator_id=self.separator,
            ),
            num_tokens=tokens_by_source,
            documents=documents,
            contaminated_ids={piece.document_id for piece in kept if self._is_contaminated(piece)},
            exhausted=drawn.exhausted,
        )

    def _tokenized(self, texts: Iterator[TextPiece]) -> Iterator[Piece]:
        """Yield pieces as tokens in arrays, of 4 bytes a token where a list of int takes 36."""
        for piece in tokenize(texts, tokenizer=self.tokenizer):
            # Drawing counts and cuts ids, which an array does as a list does.
            yield replace(piece, ids=np.array(self.opening + piece.ids, dtype=np.int32))

    def _is_contaminated(self, piece: Piece) -> bool:
        """Return whether the tokens, decoded again, share an n-gram with what is measured."""
        return self.ngrams.shares_ngram(str(self.tokenizer.decode(piece.ids[len(self.opening) :])))


def _joined(sets: Iterable[AbstractSet[str]]) -> set[str]:
    return set[str]().union(*sets)


def _whole_windows(num_tokens: int, sequence_length: int) -> int:
    return math.ceil(num_tokens / sequence_length) * sequence_length


def _source_record(
    source: DrawableSource,
    *,
    described: SourceDocuments,
    share_asked: float,
    train: _Part,
    validation: _Part,
    is_exhausted: bool,
) -> MixtureSource:
    return MixtureSource(
        source=source.name,
        domain=described.domain,
        licence=described.licence,
        share_asked=share_asked,
        share_got=train.num_tokens[source.name] / train.num_tokens.total(),
        num_documents=len(train.documents.get(source.name, ())),
        num_tokens=train.num_tokens[source.name],
        num_validation_documents=len(validation.documents.get(source.name, ())),
        num_validation_tokens=validation.num_tokens[source.name],
        num_held_out=source.num_held_out,
        num_checked=source.num_checked,
        num_contaminated=source.num_contaminated,
        is_exhausted=is_exhausted,
    )
