"""A recipe's sources as documents: embedded texts, JSONL and Parquet files, Hugging Face datasets."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.data.documents import Document, first_documents, select_documents
from pipeline.data.embedded import get_embedded, read_embedded
from pipeline.errors import DataError
from pipeline.recipe import DatasetSource, EmbeddedSource, FileSource, SourceConfig


def read_source(config: SourceConfig, *, downloads: Path) -> Iterator[Document]:
    """Yield a source's documents in the order of their ids: distinct, long enough, at most `max_documents`.

    Those with the smallest ids are kept; of a hub dataset, which is streamed, the first ones.

    Raises:
        DataError: when the source cannot be read, naming the file, field or package.
    """
    match config:
        case EmbeddedSource():
            texts = read_embedded(config.name, downloads=downloads)
        case FileSource():
            texts = _file_texts(config)
        case DatasetSource(revision=None):
            texts = _saved_dataset_texts(config)
        case DatasetSource():
            texts = _hub_dataset_texts(config, cache_dir=downloads / "datasets")
            yield from first_documents(texts, max_documents=config.max_documents)
            return
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
            subset = f" {config.config_name}" if config.config_name else ""
            commit = f" at {config.revision[:12]}" if config.revision else ""
            return f"datasets {config.path}{subset} [{config.split}]{commit}"


def _file_texts(config: FileSource) -> Iterator[str]:
    pattern = Path(config.path)
    paths = sorted(Path(pattern.anchor or ".").glob(str(pattern.relative_to(pattern.anchor))))
    if not paths:
        raise DataError(f"source {config.name}: no file matches {config.path}; correct corpora.sources in the recipe")
    for path in paths:
        yield from _jsonl_texts(path, config) if config.kind == "jsonl" else _parquet_texts(path, config)


def _jsonl_texts(path: Path, config: FileSource) -> Iterator[str]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as err:
                raise DataError(f"source {config.name}: {path} line {number} is not UTF-8: {err}") from err
            except (ValueError, RecursionError) as err:
                raise DataError(f"source {config.name}: {path} line {number} is not JSON: {err}") from err
            yield _text_of(row, config, where=f"{path} line {number}")


def _parquet_texts(path: Path, config: FileSource) -> Iterator[str]:
    try:
        frame = pl.scan_parquet(path).select(config.text_field).collect()
    except (pl.exceptions.PolarsError, OSError) as err:
        raise DataError(f"source {config.name}: cannot read column {config.text_field!r} of {path}: {err}") from err
    for number, text in enumerate(frame.to_series()):
        yield _text_of({config.text_field: text}, config, where=f"{path} row {number}")


def _saved_dataset_texts(config: DatasetSource) -> Iterator[str]:
    import datasets  # takes seconds to import, and most recipes name no dataset

    directory = Path(config.path)
    if not any((directory / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        raise DataError(
            f"source {config.name}: revision is null, and {config.path} is no directory written by save_to_disk: give "
            "a hub dataset's commit, 40 hex digits, as `revision`, or correct `path` in corpora.sources"
        )
    if config.config_name is not None:
        raise DataError(
            f"source {config.name}: config_name is {config.config_name!r}, and {config.path} is a directory, which has "
            "none: set config_name to null"
        )
    try:
        loaded = datasets.load_from_disk(config.path)
        rows: Any = loaded[config.split] if isinstance(loaded, datasets.DatasetDict) else loaded
    except (OSError, ValueError, KeyError, RuntimeError) as err:
        raise DataError(
            f"source {config.name}: cannot load {config.path} [{config.split}]: {type(err).__name__}: {err}: correct "
            "`path` and `split` in corpora.sources, or write the dataset with save_to_disk again"
        ) from err
    for number, row in enumerate(rows):
        yield _text_of(row, config, where=f"row {number}")


def _hub_dataset_texts(config: DatasetSource, *, cache_dir: Path) -> Iterator[str]:
    """Stream the texts: only what is asked for is downloaded."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    if Path(config.path).is_dir():
        raise DataError(
            f"source {config.name}: revision is {config.revision}, and {config.path} is a directory, which has no "
            "commits: set revision to null"
        )
    try:
        rows = datasets.load_dataset(
            config.path,
            name=config.config_name,
            split=config.split,
            revision=config.revision,
            cache_dir=str(cache_dir),
            streaming=True,
        )
        for number, row in enumerate(rows):
            yield _text_of(row, config, where=f"row {number}")
    except (OSError, ValueError, KeyError, RuntimeError, HfHubHTTPError) as err:
        raise DataError(
            f"source {config.name}: cannot read dataset {config.path} [{config.split}] at {config.revision}: "
            f"{type(err).__name__}: {err}. Without a network, load it elsewhere, write it with save_to_disk, and name "
            "that directory as `path`, with `revision` and `config_name` null"
        ) from err


def _text_of(row: Any, config: FileSource | DatasetSource, *, where: str) -> str:
    if not isinstance(row, dict) or config.text_field not in row:
        found = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise DataError(f"source {config.name}: {where} has no field {config.text_field!r}; it has {found}")
    text = row[config.text_field]
    if not isinstance(text, str):
        raise DataError(f"source {config.name}: {config.text_field} in {where} is a {type(text).__name__}, not text")
    return text
