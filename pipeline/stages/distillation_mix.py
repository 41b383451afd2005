"""distillation_mix: the packed tokens of importance, block distillation, scores and knowledge distillation."""

from pathlib import Path

from pipeline.stage import StageInputs, StageResult
from pipeline.stages.configs import MixtureStage
from pipeline.stages.mixture import make_mixture


def run(config: MixtureStage, inputs: StageInputs, out_dir: Path) -> StageResult:
    """Build the mixture with the parent's tokenizer."""
    return make_mixture(config, inputs, out_dir)
