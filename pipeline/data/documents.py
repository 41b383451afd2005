"""Documents of a source: which ones are kept, their identity, and their Parquet file in the `corpora` artifact."""

import hashlib
import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from pipeline.architecture import Frozen
from pipeline.errors import DataError

MIN_CHARACTERS = 200  # below this a text is a heading, a stub or a one-line file

SOURCES_FILE = "sources.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One text; its id is the sha1 of its UTF-8 bytes, so equal texts are one document wherever they come from."""

    document_id: str
    text: str


class SourceRecord(Frozen):
    """What a source is and how much of it was kept."""

    name: str
    domain: str
    licence: str
    origin: str
    num_documents: int
    num_characters: int


class SourceRecords(Frozen):
    """Every source of a `corpora` artifact, in the recipe's order."""

    sources: tuple[SourceRecord, ...]


def select_documents(texts: Iterable[str], *, max_documents: int) -> list[Document]:
    """Return the distinct texts of at least MIN_CHARACTERS with the smallest ids, in the order of their ids.

    The order of a hash is a fixed shuffle: it depends on no clock, no seed and no file order. Memory holds
    `max_documents` texts, however many come in.
    """
    kept: dict[str, Document] = {}
    largest: list[tuple[int, str]] = []  # a heap whose top is the largest id that is kept
    for document in _long_enough(texts):
        document_id = document.document_id
        if document_id in kept or (len(kept) == max_documents and document_id > largest[0][1]):
            continue
        kept[document_id] = document
        heapq.heappush(largest, (-int(document_id, 16), document_id))
        if len(kept) > max_documents:
            del kept[heapq.heappop(largest)[1]]
    return [kept[document_id] for document_id in sorted(kept)]


def first_documents(texts: Iterable[str], *, max_documents: int) -> list[Document]:
    """Return the first distinct texts of at least MIN_CHARACTERS, in the order of their ids.

    For sources whose texts cost a download: nothing is read beyond the last text that is kept.
    """
    kept: dict[str, Document] = {}
    for document in _long_enough(texts):
        kept.setdefault(document.document_id, document)
        if len(kept) == max_documents:
            break
    return [kept[document_id] for document_id in sorted(kept)]


def is_validation_document(document_id: str) -> bool:
    """Tell whether a document is only ever validation, in every mixture; all others are only ever training.

    One in sixteen is. Its eighth hex digit decides, since the first ones are small in what `select_documents` keeps.
    """
    return int(document_id[:8], 16) % 16 == 0


def _long_enough(texts: Iterable[str]) -> Iterator[Document]:
    for raw in texts:
        text = raw.strip().encode("utf-8", "replace").decode("utf-8")  # JSON can carry lone surrogates; Parquet cannot
        if len(text) >= MIN_CHARACTERS:
            document_id = hashlib.sha1(text.encode("utf-8"), usedforsecurity=False).hexdigest()
            yield Document(document_id=document_id, text=text)


def write_documents(path: Path, documents: Iterable[Document]) -> None:
    """Write documents as Parquet with the columns document_id and text."""
    documents = list(documents)
    path.parent.mkdir(parents=True, exist_ok=True)
    frame = pl.DataFrame(
        {"document_id": [item.document_id for item in documents], "text": [item.text for item in documents]},
        schema={"document_id": pl.String, "text": pl.String},
    )
    frame.write_parquet(path)


def load_documents(corpora: Path, source: str) -> list[Document]:
    """Return the documents of one source of a `corpora` artifact, in the order of their ids.

    Raises:
        DataError: when the artifact has no such source.
    """
    return read_documents(corpora / f"{source}.parquet")


def read_documents(path: Path) -> list[Document]:
    """Return the documents of one Parquet file.

    Raises:
        DataError: when there is no such file or it has other columns.
    """
    if not path.is_file():
        found = sorted(file.stem for file in path.parent.glob("*.parquet"))
        raise DataError(f"{path} is missing; {path.parent} holds {', '.join(found) or 'no documents'}")
    frame = pl.read_parquet(path)
    if frame.columns != ["document_id", "text"]:
        raise DataError(f"{path} has the columns {frame.columns}, wanted document_id and text")
    return [Document(document_id=document_id, text=text) for document_id, text in frame.iter_rows()]


def load_source_records(corpora: Path) -> dict[str, SourceRecord]:
    """Return what each source of a `corpora` artifact is, by name."""
    records = SourceRecords.model_validate_json((corpora / SOURCES_FILE).read_bytes())
    return {record.name: record for record in records.sources}
