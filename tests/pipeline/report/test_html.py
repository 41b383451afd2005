"""One self-contained page: hostile text stays text, nothing is fetched, every section is there."""

from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipeline.recipe import RandomParent, Target
from pipeline.report.html import render_page, write_cell
from pipeline.report.inputs import ReportInputs, read_inputs
from pipeline.report.page import compose_page
from pipeline.stage import StageInputs
from pipeline.stages import report
from pipeline.stages.configs import ReportStage
from tests.pipeline.report.builders import HOSTILE

# `xlink:href` inside a figure points at a mark of the same figure, or is the colour bar itself as data.
LOADING_TAGS = {"script", "iframe", "object", "embed", "link", "img", "base", "form"}


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.handlers: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def html(inputs: ReportInputs, figures: dict[str, str]) -> str:
    page = compose_page(
        inputs, figures=figures, recipe_name="tiny", recipe_description="A <b>try</b>.", target_name="fast"
    )
    return render_page(page)


@pytest.fixture(scope="module")
def read(html: str) -> _Reader:
    reader = _Reader()
    reader.feed(html)
    return reader


def test_html_hostile_model_output_stays_text(html: str, read: _Reader) -> None:
    assert "<script" not in html
    assert "<img" not in html
    assert not read.handlers
    assert HOSTILE in "".join(read.text)
    assert "<think>" in "".join(read.text)
    assert "<b>" not in html


def test_html_loads_nothing(html: str, read: _Reader) -> None:
    assert not LOADING_TAGS & set(read.tags)
    assert all(reference.startswith(("#", "data:image/png;base64,")) for reference in read.references)
    assert "url(http" not in html
    assert "@import" not in html


def test_html_has_every_section_verdict_and_losses(html: str, read: _Reader) -> None:
    text = "".join(read.text)
    for title in (
        "Where the child loses",
        "Parent and child",
        "Architecture",
        "Predicted and measured speed",
        "Quality through the stages",
        "Reasoning on and off",
        "Loss curves",
        "Search",
        "FFN fusion",
        "Data and licences",
        "Wall time",
        "Reproduction",
        "decodes 1.30 times as fast",
        "CC0-1.0",
        "detailed thinking off",
    ):
        assert title in text
    assert read.tags.count("figure") == 8
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html


def test_html_figures_take_the_pages_colours(html: str) -> None:
    assert "fill: var(--ink, #20242a)" in html
    assert "fill: #20242a" not in html


def test_html_without_artifacts_is_a_short_honest_page() -> None:
    page = compose_page(read_inputs({}), figures={}, recipe_name="tiny", recipe_description="", target_name="fast")
    assert "Nothing was measured for target fast." in render_page(page)


@pytest.mark.parametrize(
    ("value", "wanted"),
    [(None, "-"), (True, "yes"), (12345, "12,345"), (0.123456, "0.1235"), (1e6, "1,000,000"), ("a", "a")],
)
def test_write_cell_formats_by_type(value: str | float | bool | None, wanted: str) -> None:
    assert write_cell(value) == wanted


def test_report_stage_writes_the_same_page_twice(artifacts: dict[str, Path], tmp_path: Path) -> None:
    config = ReportStage(
        recipe_name="tiny",
        recipe_description="A try.",
        target_name="fast",
        target=Target(description="Fast.", limits=(), pins=()),
        parent=RandomParent(
            kind="random",
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.02,
            tie_word_embeddings=True,
            seed=1,
        ),
    )
    pages = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        stage_inputs = StageInputs(artifacts=artifacts, store_root=tmp_path, downloads=tmp_path)
        result = report.run(config, stage_inputs, tmp_path / name)
        assert all((tmp_path / name / "view" / path).is_file() for path in result.figures.values())
        pages.append((tmp_path / name / "report.html").read_bytes())
    assert pages[0] == pages[1]
