"""Drawing tokenized pieces of documents from several sources by weight, until there are enough tokens.

A source gives its documents in a seeded order, cut into pieces so that one long file cannot fill a share. Only what
comes up is checked for contamination and tokenized.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from pipeline.data.decontamination import NgramSet
from pipeline.data.documents import Document, is_validation_document
from pipeline.errors import DataError

_TOKENIZE_BATCH = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class TextPiece:
    """A stretch of one document."""

    source: str
    document_id: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A stretch of one document as tokens; `num_tokens` counts the separator that follows it."""

    source: str
    document_id: str
    ids: list[int]

    @property
    def num_tokens(self) -> int:
        """Tokens it takes up in a window."""
        return len(self.ids) + 1


@dataclass(kw_only=True, slots=True)
class DrawableSource:
    """One source of a mixture without its held-out documents; which others are clean is found out as they come up.

    Validation and training draw from documents of their own, told apart by `is_validation_document`.
    """

    name: str
    documents: list[Document]
    num_held_out: int
    ngrams: NgramSet
    seed: int
    _verdicts: dict[str, bool] = field(default_factory=dict)

    @classmethod
    def open(
        cls, name: str, documents: Sequence[Document], *, held_out_ids: AbstractSet[str], ngrams: NgramSet, seed: int
    ) -> "DrawableSource":
        """Leave the held-out documents out and put the others in a seeded order."""
        kept = [document for document in documents if document.document_id not in held_out_ids]
        random.Random(f"{seed} {name} documents").shuffle(kept)
        return cls(name=name, documents=kept, num_held_out=len(documents) - len(kept), ngrams=ngrams, seed=seed)

    @property
    def num_checked(self) -> int:
        """Documents that came up."""
        return len(self._verdicts)

    @property
    def num_contaminated(self) -> int:
        """Documents that came up and were left out."""
        return sum(not is_clean for is_clean in self._verdicts.values())

    def validation_pieces(self, max_characters: int) -> Iterator[TextPiece]:
        """Yield the first piece of each clean validation document, then each one's second piece, and so on.

        So validation sees many documents rather than much of one.
        """
        pieces_by_document = [
            (document, split_text(document.text, max_characters=max_characters))
            for document in self.documents
            if is_validation_document(document.document_id)
        ]
        while pieces_by_document:
            unfinished = []
            for document, pieces in pieces_by_document:
                if self._is_clean(document) and (text := next(pieces, None)) is not None:
                    yield TextPiece(source=self.name, document_id=document.document_id, text=text)
                    unfinished.append((document, pieces))
            pieces_by_document = unfinished

    def training_pieces(self, max_characters: int, *, without: AbstractSet[str] = frozenset()) -> Iterator[TextPiece]:
        """Yield the pieces of every clean training document but those of `without`, in a seeded order."""
        pieces = [
            (document, text)
            for document in self.documents
            if not is_validation_document(document.document_id) and document.document_id not in without
            for text in split_text(document.text, max_characters=max_characters)
        ]
        random.Random(f"{self.seed} {self.name} pieces").shuffle(pieces)
        for document, text in pieces:
            if self._is_clean(document):
                yield TextPiece(source=self.name, document_id=document.document_id, text=text)

    def _is_clean(self, document: Document) -> bool:
        verdict = self._verdicts.get(document.document_id)
        if verdict is None:
            verdict = not self.ngrams.shares_ngram(document.text)
            self._verdicts[document.document_id] = verdict
        return verdict


def split_text(text: str, *, max_characters: int) -> Iterator[str]:
    """Yield a text in pieces of at most `max_characters` that make it up, cut after a line where there is one."""
    start = 0
    while len(text) - start > max_characters:
        end = text.rfind("\n", start, start + max_characters) + 1 or start + max_characters
        yield text[start:end]
        start = end
    yield text[start:]


def tokenize(pieces: Iterator[TextPiece], *, tokenizer: PreTrainedTokenizerBase) -> Iterator[Piece]:
    """Yield pieces as tokens, reading a few ahead at a time."""
    while batch := list(itertools.islice(pieces, _TOKENIZE_BATCH)):
        # A document that spells <|im_end|> out is text about a chat format, not the end of a turn.
        encoded = tokenizer(
            [piece.text for piece in batch], add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        for piece, ids in zip(batch, encoded["input_ids"], strict=True):
            yield Piece(source=piece.source, document_id=piece.document_id, ids=ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """Pieces in the order they were drawn, and the sources that had no more."""

    pieces: list[Piece]
    exhausted: frozenset[str]


def draw(
    streams: Mapping[str, Iterator[Piece]],
    *,
    weights: Mapping[str, float],
    num_tokens: int,
    what: str,
    remedy: str,
    report: Callable[[int], None],
) -> Drawn:
    """Draw from each stream its share of `num_tokens`; what a dry one owes is shared out over the others.

    A source's last piece is cut where its share ends: in a small mixture whole pieces would bend the shares.

    Raises:
        DataError: when all of them are dry before there are enough tokens, ending in `remedy`.
    """
    pieces: list[Piece] = []
    got = dict.fromkeys(streams, 0)
    exhausted: set[str] = set()
    while (missing := num_tokens - sum(got.values())) > 0:
        running = [name for name in streams if name not in exhausted]
        if not running:
            raise DataError(
                f"the {what} part wants {num_tokens:,} tokens, its sources hold {sum(got.values()):,} in their {what} "
                f"documents without held-out and contaminated ones "
                f"({', '.join(f'{name} {count:,}' for name, count in got.items())}): {remedy}"
            )
        running_weight = sum(weights[name] for name in running)
        for name in running:
            target = got[name] + math.ceil(missing * weights[name] / running_weight)
            while (room := target - got[name]) > 0:
                piece = next(streams[name], None)
                if piece is None:
                    exhausted.add(name)
                    break
                pieces.append(replace(piece, ids=piece.ids[: max(room - 1, 1)]))
                got[name] += pieces[-1].num_tokens
            report(min(sum(got.values()), num_tokens))
    return Drawn(pieces=pieces, exhausted=frozenset(exhausted))
