"""What the UI shows of an artifact: numbers, short texts, tables and pictures, as Dagster metadata."""

import base64
import math
from collections.abc import Sequence

import dagster as dg

from pipeline.artifacts import Artifact
from pipeline.execution import Outcome
from pipeline.stage import VIEW_DIR, Number, Table

MAX_FIGURE_BYTES = 256 * 1024  # an event is read whole whenever its asset's page opens
MAX_TABLE_ROWS = 200

Cell = str | int | float | bool | None


def outcome_metadata(outcome: Outcome) -> dict[str, dg.MetadataValue]:
    """Return the metadata of one materialization: what happened, then what the stage reported."""
    artifact = outcome.artifact
    result = artifact.record.result
    return {
        "how": dg.MetadataValue.text(outcome.how),
        "path": dg.MetadataValue.path(str(artifact.path)),
        "fingerprint": dg.MetadataValue.text(artifact.manifest.fingerprint),
        "wall_s": dg.MetadataValue.float(artifact.record.wall_s),
        **{name: _number(value) for name, value in result.metrics.items()},
        **{name: dg.MetadataValue.text(value) for name, value in result.facts.items()},
        **{_table_name(name, table): _table(table) for name, table in result.tables.items()},
        **{name: dg.MetadataValue.md(value) for name, value in result.markdown.items()},
        **{name: _figure(artifact, name=name, relative=relative) for name, relative in result.figures.items()},
    }


def _number(value: Number) -> dg.MetadataValue:
    if isinstance(value, int):
        return dg.MetadataValue.int(value)
    # JSON has no NaN: the UI's queries would fail on the whole event.
    return dg.MetadataValue.float(value) if math.isfinite(value) else dg.MetadataValue.text(str(value))


def _table_name(name: str, table: Table) -> str:
    num_rows = len(table.rows)
    return name if num_rows <= MAX_TABLE_ROWS else f"{name} (first {MAX_TABLE_ROWS} of {num_rows} rows)"


def _table(table: Table) -> dg.TableMetadataValue:
    rows = table.rows[:MAX_TABLE_ROWS]
    columns = [
        dg.TableColumn(name, type=_column_type([row[index] for row in rows]))
        for index, name in enumerate(table.columns)
    ]
    records = [
        dg.TableRecord({name: _cell(cell) for name, cell in zip(table.columns, row, strict=True)}) for row in rows
    ]
    return dg.TableMetadataValue(records=records, schema=dg.TableSchema(columns))


def _cell(cell: Cell) -> Cell:
    return str(cell) if isinstance(cell, float) and not math.isfinite(cell) else cell


def _column_type(cells: Sequence[Cell]) -> str:
    kinds = {type(_cell(cell)) for cell in cells if cell is not None}
    if kinds == {bool}:
        return "bool"
    if kinds == {int}:
        return "int"
    return "float" if kinds and kinds <= {int, float} else "string"


def _figure(artifact: Artifact, *, name: str, relative: str) -> dg.MetadataValue:
    path = artifact.path / VIEW_DIR / relative
    size_bytes = path.stat().st_size
    if size_bytes > MAX_FIGURE_BYTES:
        return dg.MetadataValue.md(f"{name} has {size_bytes:,} bytes, too many to show here: open `{path}`")
    encoded = base64.b64encode(path.read_bytes()).decode("ascii")
    return dg.MetadataValue.md(f"![{name}](data:image/svg+xml;base64,{encoded})")
