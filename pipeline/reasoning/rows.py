"""Rows of reasoning data, whoever wrote them: the columns of Llama-Nemotron's set, and how a row is judged.

    input, output, reasoning, system_prompt, category, license, generator, version      as published
    source, task, truth, reference, item, is_complete                                   ours

Source of the schema: Llama-Nemotron, section 3, and the dataset's card.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import polars as pl

from pipeline.data.chat import THINKING_OFF, THINKING_ON
from pipeline.data.reasoning_items import ReasoningItem
from pipeline.errors import DataError
from pipeline.recipe import Truth

ROWS_FILE = "rows.parquet"

Mode = Literal["on", "off", "none"]

_SCHEMA = {
    "input": pl.List(pl.Struct({"role": pl.String, "content": pl.String})),
    "output": pl.String,
    "reasoning": pl.String,
    "system_prompt": pl.String,
    "category": pl.String,
    "license": pl.String,
    "generator": pl.String,
    "version": pl.String,
    "source": pl.String,
    "task": pl.String,
    "truth": pl.String,
    "reference": pl.String,
    "item": pl.String,
    "is_complete": pl.Boolean,
}


@dataclass(frozen=True, kw_only=True)
class TraceRow:
    """One conversation whose last turn is `output`.

    `input` holds (role, content) pairs. `truth` says how the output is judged: by the scorer of the task of `item`, by
    comparison with `reference`, by a vote over the prompt's outputs, or not at all. An output that was cut off is not
    `is_complete`.
    """

    input: tuple[tuple[str, str], ...]
    output: str
    reasoning: str
    system_prompt: str
    category: str
    license: str
    generator: str
    version: str
    source: str
    task: str
    truth: Truth | Literal["task"]
    reference: str | None = field(default=None)
    item: ReasoningItem | None = field(default=None)
    is_complete: bool = field(default=True)

    @cached_property
    def prompt_id(self) -> str:
        """The same for rows with the same question, whatever their mode."""
        return _digest([[role, content.strip()] for role, content in self.input])

    @cached_property
    def row_id(self) -> str:
        """The same for rows with the same conversation."""
        return _digest([self.prompt_id, self.system_prompt, self.output])

    @property
    def mode(self) -> Mode:
        """What the system prompt asks for."""
        return {THINKING_ON: "on", THINKING_OFF: "off"}.get(self.system_prompt, "none")  # pyright: ignore[reportReturnType]

    @property
    def prompt_text(self) -> str:
        """All of the prompt's words."""
        return "\n".join(content for _, content in self.input)


def write_rows(path: Path, rows: Iterable[TraceRow]) -> None:
    """Write rows as Parquet, in their order."""
    records = [
        {
            **{name: getattr(row, name) for name in _SCHEMA if name not in ("input", "item")},
            "input": [{"role": role, "content": content} for role, content in row.input],
            "item": None if row.item is None else row.item.model_dump_json(),
        }
        for row in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    pl.DataFrame(records, schema=_SCHEMA).write_parquet(path)


def read_rows(path: Path) -> list[TraceRow]:
    """Return what write_rows wrote.

    Raises:
        DataError: when the file is missing or has other columns.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing: materialize reasoning_traces")
    frame = pl.read_parquet(path)
    if frame.columns != list(_SCHEMA):
        raise DataError(f"{path} has the columns {frame.columns}, wanted {list(_SCHEMA)}")
    return [
        TraceRow(
            **{
                **record,
                "input": tuple((message["role"], message["content"]) for message in record["input"]),
                "item": None if record["item"] is None else ReasoningItem.model_validate_json(record["item"]),
            }
        )
        for record in frame.iter_rows(named=True)
    ]


def _digest(parts: Sequence[object]) -> str:
    return blake2b(json.dumps(parts, ensure_ascii=True).encode(), digest_size=8).hexdigest()
