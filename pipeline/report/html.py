"""The report as one HTML file: inline SVG and CSS, no script, nothing fetched. Everything that is text is escaped.

What models wrote is shown as they wrote it, and is therefore the most hostile text on the page: it reaches the template
as a plain string and autoescape does the rest. Only figures, which are drawn here, are passed as markup.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.architecture import Architecture
from pipeline.evaluation.results import SampleAnswer
from pipeline.report.canvas import GRID, INK, PAPER
from pipeline.stage import Number, Table

TEMPLATES_DIR = Path(__file__).parent / "templates"
MAX_TABLE_ROWS = 80


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """One part of the page: figures by caption, tables by title, then notes; `anchor` is its id."""

    anchor: str
    title: str
    intro: str
    figures: Mapping[str, str]
    tables: Mapping[str, Table]
    notes: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """Everything on the page, as plain text and tables; only the figures are markup."""

    title: str
    description: str
    verdict: str
    losses: tuple[str, ...]
    sections: tuple[Section, ...]
    samples: tuple[SampleAnswer, ...]
    blocks: tuple[tuple[str, str, str], ...]
    facts: tuple[tuple[str, str], ...]


def render_page(page: Page) -> str:
    """Return the page as HTML."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES_DIR),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = write_cell
    environment.filters["inline_svg"] = inline_svg
    return environment.get_template("report.html.j2").render(page=page, max_rows=MAX_TABLE_ROWS)


def write_cell(value: str | Number | bool | None) -> str:
    """Return a table's value as people read it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    return value


def inline_svg(svg: str, label: str) -> Markup:
    """Return one of our figures as markup, in the page's colours and with a label for readers that cannot see it."""
    for color, variable in ((INK, "--ink"), (GRID, "--grid"), (PAPER, "--paper")):
        svg = svg.replace(color, f"var({variable}, {color})")
    return Markup('<svg role="img" aria-label="{}" ').format(label) + Markup(svg.removeprefix("<svg "))


def describe_blocks(child: Architecture) -> tuple[tuple[str, str, str], ...]:
    """Return (parent layers, attention, FFN) of each layer of the child."""
    rows = []
    for block in child.blocks:
        first, last = block.parent_layers[0], block.parent_layers[-1]
        rows.append((str(first) if first == last else f"{first}-{last}", block.attention.key, block.ffn.key))
    return tuple(rows)
