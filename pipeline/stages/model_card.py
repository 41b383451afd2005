"""model_card: what the exported model is, how it was made, measured and licensed, as Markdown for a model hub."""

from pathlib import Path

from pipeline.report.inputs import read_inputs
from pipeline.report.model_card import CardSubject, base_model, licence, render_model_card
from pipeline.stage import StageInputs, StageResult
from pipeline.stages.configs import ReportStage

CARD_FILE = "model_card.md"


def run(config: ReportStage, inputs: StageInputs, out_dir: Path) -> StageResult:
    """Write model_card.md."""
    subject = CardSubject(
        recipe_name=config.recipe_name,
        recipe_description=config.recipe_description,
        target_name=config.target_name,
        target=config.target,
        parent=config.parent,
    )
    card = render_model_card(read_inputs(inputs.artifacts), subject=subject)
    (out_dir / CARD_FILE).write_text(card, encoding="utf-8")
    return StageResult(
        metrics={"size_bytes": len(card.encode())},
        facts={"base_model": base_model(config.parent), "licence": licence(config.parent)},
        markdown={"card": card},
    )
