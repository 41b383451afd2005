"""Figures are the same bytes every time, well-formed XML, and say what they show."""

from xml.etree import ElementTree

import pytest

from pipeline.report.drawings import draw
from pipeline.report.figures import Curve, CurvePanel, architecture_strip, curve_panels
from pipeline.report.inputs import ReportInputs
from tests.pipeline.report.builders import child_architecture, parent_architecture

ALL = {"architecture", "speed", "quality", "toggle", "curves", "scores", "library", "dependencies"}


def _texts(svg: str) -> str:
    return " ".join(
        element.text or "" for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("text")
    )


def test_figures_drawn_twice_are_equal_bytes(inputs: ReportInputs, figures: dict[str, str]) -> None:
    assert figures.keys() == ALL
    assert draw(inputs) == figures


def test_figures_hold_no_date_and_no_fixed_group_ids(figures: dict[str, str]) -> None:
    for svg in figures.values():
        assert "dc:date" not in svg
        assert 'id="axes_1"' not in svg


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("architecture", ("KV heads", "FFN width", "parent layer", "fused", "3 layers from 4")),
        ("speed", ("decode", "prefill", "1.40x", "1.30x", "0.96x", "parent = 1")),
        ("quality", ("perplexity", "nats per token", "parent", "rl")),
        ("toggle", ("n = 20", "share of answers")),
        ("curves", ("Knowledge distillation", "tokens", "reward")),
        ("scores", ("no_op+ffn64", "layer replaced", "nats per token")),
        ("dependencies", ("Dependency of blocks", "layer removed", "cosine distance")),
        ("library", ("attention kv1", "layer")),
    ],
)
def test_figures_carry_titles_units_and_labels(figures: dict[str, str], name: str, words: tuple[str, ...]) -> None:
    texts = _texts(figures[name])
    for word in words:
        assert word in texts


def test_labels_with_markup_are_escaped() -> None:
    panel = CurvePanel(title="<script>", x_label="a & b", y_label="y", curves=[Curve(label="c", x=[1, 2], y=[1, 2])])
    svg = curve_panels([panel])
    assert "<script>" not in svg
    assert "<script>" in _texts(svg)


def test_architecture_strip_of_the_parent_itself_has_no_removed_layer() -> None:
    whole = architecture_strip(parent_architecture(), parent_architecture())
    assert whole != architecture_strip(parent_architecture(), child_architecture())
    assert "4 layers from 4" in _texts(whole)
