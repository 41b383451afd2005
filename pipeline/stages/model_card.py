"""model_card: what the exported model is, how it was made, measured and licensed, as Markdown for a model hub."""

from pathlib import Path

import yaml

from pipeline.report.inputs import read_inputs
from pipeline.report.model_card import CardSubject, base_model, licence, render_model_card
from pipeline.stage import StageInputs, StageResult
from pipeline.stages.configs import CARD_FILE, ReportStage

FRONT_MATTER_KEYS = ("license", "base_model", "library_name", "pipeline_tag")


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
        metrics={"size_bytes": len(card.encode()), "num_missing_front_matter_keys": _num_missing_keys(card)},
        facts={"base_model": base_model(config.parent), "licence": licence(config.parent)},
        markdown={"card": card},
    )


def _num_missing_keys(card: str) -> int:
    """Return how many keys that a model hub reads are absent or empty in the card's front matter."""
    _, front_matter, _ = card.split("---\n", 2)
    found = yaml.safe_load(front_matter)
    return sum(not found.get(key) for key in FRONT_MATTER_KEYS)
