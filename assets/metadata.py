"""What the UI shows of an artifact: a summary, pictures, texts, tables, numbers and identity, as Dagster metadata.

Dagster lists entries in the order given, shows Markdown of fewer than 1,000 characters in place and longer Markdown,
hence pictures, behind a link. It plots a number over time under its key, so keys of metrics are the stage's own.
"""

import base64
import math
from collections.abc import Sequence

import dagster as dg

from assets.highlights import HIGHLIGHTS, NOTHING_FIRST, Highlight, Unit
from pipeline.artifacts import Artifact
from pipeline.execution import Outcome
from pipeline.progress import format_duration
from pipeline.stage import VIEW_DIR, Number, StageResult, Table

MAX_FIGURE_BYTES = 256 * 1024  # an event is read whole whenever its asset's page opens
MAX_TABLE_ROWS = 200
MAX_INLINE_CHARACTERS = 999
METRIC_DIGITS = 6
CELL_DIGITS = 5
MAX_SPARKLINE_POINTS = 28
SUMMARY = "at a glance"
CURVE_TABLE = "training_curve"

# Longest first: a rate is not a duration.
_UNIT_SUFFIXES = {
    "_tokens_per_second": " tokens/s",
    "tokens_per_second": "tokens/s",
    "_nats_per_token": ", nats/token",
    "_bytes_per_token": ", bytes/token",
    "_nats": ", nats/token",
    "_bytes": ", bytes",
    "_mib": ", MiB",
    "_ms": ", ms",
    "_s": ", s",
}

Cell = str | int | float | bool | None


def outcome_metadata(outcome: Outcome) -> dict[str, dg.MetadataValue]:
    """Return the metadata of one materialization, in the order people read it, identity last."""
    artifact = outcome.artifact
    result = artifact.record.result
    highlight = HIGHLIGHTS.get(artifact.manifest.asset, NOTHING_FIRST)
    return {
        SUMMARY: dg.MetadataValue.md(_summary(outcome, highlight)),
        **({"open": dg.MetadataValue.path(str(artifact.path / highlight.page))} if highlight.page else {}),
        **{f"picture: {name}": _figure(artifact, name=name, relative=path) for name, path in result.figures.items()},
        **{name: dg.MetadataValue.md(value) for name, value in result.markdown.items()},
        **{_table_name(name, table): _table(table) for name, table in result.tables.items()},
        **{name: dg.MetadataValue.text(value) for name, value in result.facts.items()},
        **{name: metric_metadata(value) for name, value in result.metrics.items()},
        "how": dg.MetadataValue.text(outcome.how),
        "wall_s": dg.MetadataValue.float(round(artifact.record.wall_s, 1)),
        "fingerprint": dg.MetadataValue.text(artifact.manifest.fingerprint),
        "path": dg.MetadataValue.path(str(artifact.path)),
    }


def metric_metadata(value: Number) -> dg.MetadataValue:
    """Return a metric as an entry that Dagster plots over time, without digits that say nothing."""
    if isinstance(value, int):
        return dg.MetadataValue.int(value)
    # JSON has no NaN: the UI's queries would fail on the whole event.
    if not math.isfinite(value):
        return dg.MetadataValue.text(str(value))
    return dg.MetadataValue.float(_rounded(value, METRIC_DIGITS))


def readable_number(value: Number, unit: Unit = "") -> str:
    """Return a number as people read it, with its unit: `279,168`, `0.00412 nats/token`, `40.1 %`, `1.36x`."""
    if not math.isfinite(value):
        return str(value)
    if unit == "%":
        return f"{value * 100:.3g} %"
    if isinstance(value, int) or value.is_integer() or abs(value) >= 1000:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.3g}"
    return f"{text}x" if unit == "x" else f"{text} {unit}".rstrip()


def column_title(name: str) -> str:
    """Return a column's name as people read it: `time_ms` is `time, ms`, `num_layers` is `layers`."""
    for suffix, unit in _UNIT_SUFFIXES.items():
        if name.endswith(suffix):
            name = name.removesuffix(suffix) + unit
            break
    return name.removeprefix("num_").replace("_", " ")


def _summary(outcome: Outcome, highlight: Highlight) -> str:
    result = outcome.artifact.record.result
    made = format_duration(outcome.artifact.record.wall_s)
    rows = [
        (label, readable_number(result.metrics[metric], unit))
        for metric, (label, unit) in highlight.numbers.items()
        if metric in result.metrics
    ]
    rows.append(
        ("This time", f"{outcome.how}, as made in {made}" if outcome.how == "reused" else f"{outcome.how} in {made}")
    )
    table = "\n".join(["| | |", "| --- | --- |", *(f"| {label} | **{value}** |" for label, value in rows)])
    curve = _sparkline(result, highlight.sparkline) if highlight.sparkline else None
    if curve and len(table) + len(curve) + 2 <= MAX_INLINE_CHARACTERS:
        return f"{table}\n\n{curve}"
    return table


def _sparkline(result: StageResult, column: str) -> str | None:
    """Return a training curve as a picture small enough to be shown in place, or None where there is no curve."""
    table = result.tables.get(CURVE_TABLE)
    if table is None or column not in table.columns:
        return None
    index = table.columns.index(column)
    cells = [row[index] for row in table.rows]
    values = [float(cell) for cell in cells if isinstance(cell, int | float) and math.isfinite(cell)]
    if len(values) < 2:
        return None
    last = len(values) - 1
    num_points = min(len(values), MAX_SPARKLINE_POINTS)
    values = [values[round(point * last / (num_points - 1))] for point in range(num_points)]
    low, span = min(values), (max(values) - min(values)) or 1.0
    points = " ".join(
        f"{round(4 + 232 * point / (num_points - 1))},{round(4 + 40 * (1 - (value - low) / span))}"
        for point, value in enumerate(values)
    )
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" width="240" height="48">'
        f'<polyline points="{points}" fill="none" stroke="#4f43dd" stroke-width="2"/></svg>'
    )
    return _inline_svg(column, svg.encode())


def _inline_svg(name: str, svg: bytes) -> str:
    return f"![{name}](data:image/svg+xml;base64,{base64.b64encode(svg).decode('ascii')})"


def _rounded(value: float, digits: int) -> float:
    """Return the number with so many significant digits; whole parts are kept whole."""
    return float(round(value, 1)) if abs(value) >= 10**digits else float(f"{value:.{digits}g}")


def _table_name(name: str, table: Table) -> str:
    num_rows = len(table.rows)
    return name if num_rows <= MAX_TABLE_ROWS else f"{name} (first {MAX_TABLE_ROWS} of {num_rows} rows)"


def _table(table: Table) -> dg.TableMetadataValue:
    rows = table.rows[:MAX_TABLE_ROWS]
    titles = _titles(table.columns)
    columns = [
        dg.TableColumn(title, type=_column_type([row[index] for row in rows])) for index, title in enumerate(titles)
    ]
    records = [dg.TableRecord({title: _cell(cell) for title, cell in zip(titles, row, strict=True)}) for row in rows]
    return dg.TableMetadataValue(records=records, schema=dg.TableSchema(columns))


def _titles(names: Sequence[str]) -> list[str]:
    titles = [column_title(name) for name in names]
    # Two columns must not become one: where titles collide, the names stay.
    return titles if len(set(titles)) == len(titles) else list(names)


def _cell(cell: Cell) -> Cell:
    if not isinstance(cell, float):
        return cell
    return _rounded(cell, CELL_DIGITS) if math.isfinite(cell) else str(cell)


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
    return dg.MetadataValue.md(_inline_svg(name, path.read_bytes()))
