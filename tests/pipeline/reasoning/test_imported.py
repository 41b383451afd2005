"""Sets in the published row schema: what is read of them, and what is refused, by file and row."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from pydantic import ValidationError

from pipeline.errors import DataError
from pipeline.reasoning.imported import read_imported
from pipeline.recipe import ImportedTraces

RECORD: dict[str, Any] = {
    "input": [{"role": "user", "content": "What is 2 + 3?"}],
    "output": "<think>\n2 + 3 = 5\n</think>\n\n5",
    "reasoning": "on",
    "system_prompt": "detailed thinking on",
    "category": "math",
    "license": "cc-by-4.0",
    "generator": "DeepSeek-R1",
    "used_in_training": ["Nano", "Super"],
    "version": "v1",
}


def _config(path: Path, **changes: Any) -> ImportedTraces:
    values = {"name": "set", "kind": path.suffix[1:], "path": str(path), "truth": "trusted", "answer_field": None}
    return ImportedTraces.model_validate({**values, "max_rows": 100, **changes})


def _write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_read_imported_jsonl_and_parquet_hold_the_same_rows(tmp_path: Path):
    records = [RECORD, {**RECORD, "input": "Early versions held text.", "reasoning": "off", "system_prompt": ""}]
    from_jsonl = read_imported(_config(_write(tmp_path / "rows.jsonl", *records)))
    first, second = from_jsonl
    assert (first.input, first.output, first.mode) == ((("user", "What is 2 + 3?"),), RECORD["output"], "on")
    assert (first.category, first.license, first.generator, first.version) == ("math", "cc-by-4.0", "DeepSeek-R1", "v1")
    assert (second.input, second.mode) == ((("user", "Early versions held text."),), "none")

    pl.DataFrame([RECORD]).write_parquet(tmp_path / "rows.parquet")
    assert read_imported(_config(tmp_path / "rows.parquet")) == [first]


def test_read_imported_globs_in_order_up_to_max_rows(tmp_path: Path):
    for name in ("b", "a"):
        _write(tmp_path / f"{name}.jsonl", *({**RECORD, "generator": f"{name}{number}"} for number in range(3)))
    rows = read_imported(_config(tmp_path / "*.jsonl", max_rows=4))
    assert [row.generator for row in rows] == ["a0", "a1", "a2", "b0"]


def test_read_imported_reference_answers(tmp_path: Path):
    path = _write(tmp_path / "rows.jsonl", {**RECORD, "expected_answer": "5"})
    (row,) = read_imported(_config(path, truth="reference", answer_field="expected_answer"))
    assert (row.truth, row.reference) == ("reference", "5")
    with pytest.raises(DataError, match="line 1 has no gold"):
        read_imported(_config(path, truth="reference", answer_field="gold"))
    with pytest.raises(ValidationError, match="only reference has one"):
        _config(path, truth="reference")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({key: value for key, value in RECORD.items() if key != "license"}, "line 2 has no license"),
        ({**RECORD, "output": None}, "output is a NoneType, wanted text"),
        ({**RECORD, "input": [{"role": "user"}]}, "wanted a list of messages"),
        ({**RECORD, "input": []}, "wanted a list of messages"),
        ([1], "line 2 is a list"),
    ],
)
def test_read_imported_broken_rows_are_named(tmp_path: Path, record: Any, message: str):
    with pytest.raises(DataError, match=message):
        read_imported(_config(_write(tmp_path / "rows.jsonl", RECORD, record)))


def test_read_imported_broken_files_are_named(tmp_path: Path):
    with pytest.raises(DataError, match="no file matches"):
        read_imported(_config(tmp_path / "none.jsonl"))
    (tmp_path / "bad.jsonl").write_bytes(b'{"input": \xff}\n')
    with pytest.raises(DataError, match="line 1 is not JSON in UTF-8"):
        read_imported(_config(tmp_path / "bad.jsonl"))
    (tmp_path / "bad.parquet").write_bytes(b"no")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        read_imported(_config(tmp_path / "bad.parquet"))
