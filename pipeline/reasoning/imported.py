"""Local files in the row schema of Llama-Nemotron-Post-Training-Dataset, read as rows. JSONL and Parquet."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.errors import DataError
from pipeline.reasoning.rows import TraceRow
from pipeline.recipe import ImportedTraces

_TEXT_FIELDS = ("output", "reasoning", "system_prompt", "category", "license", "generator", "version")


def read_imported(config: ImportedTraces) -> list[TraceRow]:
    """Return the first `max_rows` rows of the files, in the order of their paths; other columns are not read.

    Raises:
        DataError: when no file matches, or a row has not the schema, naming file and row.
    """
    pattern = Path(config.path)
    paths = sorted(Path(pattern.anchor or ".").glob(str(pattern.relative_to(pattern.anchor))))
    if not paths:
        raise DataError(
            f"reasoning_traces.imports {config.name}: no file matches {config.path}; correct its path in the recipe"
        )
    rows: list[TraceRow] = []
    for path in paths:
        records = _jsonl_records(path) if config.kind == "jsonl" else _parquet_records(path)
        for where, record in records:
            if len(rows) == config.max_rows:
                return rows
            rows.append(_row(record, config, where=where))
    return rows


def _jsonl_records(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield f"{path} line {number}", json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as err:
                raise DataError(f"{path} line {number} is not JSON in UTF-8: {err}") from err


def _parquet_records(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        frame = pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as err:
        raise DataError(f"{path} is not a readable Parquet file: {err}") from err
    for number, record in enumerate(frame.iter_rows(named=True)):
        yield f"{path} row {number}", record


def _row(record: Any, config: ImportedTraces, *, where: str) -> TraceRow:
    if not isinstance(record, Mapping):
        raise DataError(f"{where} is a {type(record).__name__}, wanted an object with the columns of the row schema")
    wanted = ("input", *_TEXT_FIELDS, *((config.answer_field,) if config.answer_field else ()))
    missing = [name for name in wanted if name not in record]
    if missing:
        raise DataError(f"{where} has no {', '.join(missing)}; it has {', '.join(sorted(map(str, record)))}")
    for name in wanted[1:]:
        if not isinstance(record[name], str):
            raise DataError(f"{where}: {name} is a {type(record[name]).__name__}, wanted text")
    return TraceRow(
        input=_messages(record["input"], where=where),
        output=_clean(record["output"]),
        reasoning=_clean(record["reasoning"]),
        system_prompt=_clean(record["system_prompt"]),
        category=_clean(record["category"]),
        license=_clean(record["license"]),
        generator=_clean(record["generator"]),
        version=_clean(record["version"]),
        source=config.name,
        task=_clean(record["category"]),
        truth=config.truth,
        reference=record[config.answer_field] if config.answer_field else None,
    )


def _messages(value: Any, *, where: str) -> tuple[tuple[str, str], ...]:
    """The published sets hold a list of messages; early versions held the user's words alone."""
    if isinstance(value, str):
        return (("user", _clean(value)),)
    messages = list(value) if isinstance(value, list | tuple) else []
    if not messages or not all(
        isinstance(message, Mapping)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in messages
    ):
        raise DataError(f"{where}: input is {value!r:.80}, wanted a list of messages with role and content")
    return tuple((message["role"], _clean(message["content"])) for message in messages)


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")  # JSON can carry lone surrogates; Parquet cannot
