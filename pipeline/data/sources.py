"""A recipe's sources as documents: embedded texts, JSONL and Parquet files, Hugging Face datasets."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.data.documents import Document, select_documents
from pipeline.data.embedded import get_embedded, read_embedded
from pipeline.errors import DataError
from pipeline.recipe import DatasetSource, EmbeddedSource, FileSource, SourceConfig


def read_source(config: SourceConfig, *, downloads: Path) -> Iterator[Document]:
    """Yield a source's documents in the order of their ids: distinct, long enough, at most `max_documents`.

    Raises:
        DataError: when the source cannot be read, naming the file, field or package.
    """
    match config:
        case EmbeddedSource():
            texts = read_embedded(config.name, downloads=downloads)
        case FileSource():
            texts = _file_texts(config)
        case DatasetSource():
            texts = _dataset_texts(config)
    yield from select_documents(texts, max_documents=config.max_documents)


def source_licence(config: SourceConfig) -> str:
    """Return the licence of a source: the registry's for embedded texts, the recipe's own words otherwise."""
    return get_embedded(config.name).licence if isinstance(config, EmbeddedSource) else config.licence


def source_origin(config: SourceConfig) -> str:
    """Return where a source comes from, in a few words."""
    match config:
        case EmbeddedSource():
            return get_embedded(config.name).origin
        case FileSource():
            return f"{config.kind} {config.path}"
        case DatasetSource():
            return f"datasets {config.path} [{config.split}]"


def _file_texts(config: FileSource) -> Iterator[str]:
    pattern = Path(config.path)
    paths = sorted(Path(pattern.anchor or ".").glob(str(pattern.relative_to(pattern.anchor))))
    if not paths:
        raise DataError(f"source {config.name}: no file matches {config.path}; correct corpora.sources in the recipe")
    for path in paths:
        yield from _jsonl_texts(path, config) if config.kind == "jsonl" else _parquet_texts(path, config)


def _jsonl_texts(path: Path, config: FileSource) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as err:
                raise DataError(f"source {config.name}: {path} line {number} is not JSON: {err}") from err
            yield _text_of(row, config, where=f"{path} line {number}")


def _parquet_texts(path: Path, config: FileSource) -> Iterator[str]:
    try:
        frame = pl.scan_parquet(path).select(config.text_field).collect()
    except (pl.exceptions.PolarsError, OSError) as err:
        raise DataError(f"source {config.name}: cannot read column {config.text_field!r} of {path}: {err}") from err
    for number, text in enumerate(frame.to_series()):
        yield _text_of({config.text_field: text}, config, where=f"{path} row {number}")


def _dataset_texts(config: DatasetSource) -> Iterator[str]:
    import datasets  # takes seconds to import, and most recipes name no dataset

    directory = Path(config.path)
    try:
        if (directory / "dataset_info.json").is_file() or (directory / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(directory))
            rows: Any = loaded[config.split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            rows = datasets.load_dataset(config.path, split=config.split)
    except (OSError, ValueError, KeyError, RuntimeError) as err:
        raise DataError(
            f"source {config.name}: cannot load dataset {config.path} [{config.split}]: {type(err).__name__}: {err}. "
            "Without a network, load it elsewhere, write it with save_to_disk, and name that directory as `path`"
        ) from err
    for number, row in enumerate(rows):
        yield _text_of(row, config, where=f"row {number}")


def _text_of(row: Any, config: FileSource | DatasetSource, *, where: str) -> str:
    if not isinstance(row, dict) or config.text_field not in row:
        found = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise DataError(f"source {config.name}: {where} has no field {config.text_field!r}; it has {found}")
    text = row[config.text_field]
    if not isinstance(text, str):
        raise DataError(f"source {config.name}: {config.text_field} in {where} is a {type(text).__name__}, not text")
    return text
