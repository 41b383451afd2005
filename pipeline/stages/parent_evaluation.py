"""parent_evaluation: the parent through the harness that will measure its children.

    python -m pipeline materialize parent_evaluation

Leaves out KL and agreement: the parent's with itself are 0 and 1 by definition.
"""

from pathlib import Path

from pipeline.evaluation.results import write_evaluations
from pipeline.evaluation.shared import Evaluator
from pipeline.report.evaluation_tables import evaluation_metrics, evaluation_tables
from pipeline.stage import StageInputs, StageResult
from pipeline.stages.configs import EvaluationStage


def run(config: EvaluationStage, inputs: StageInputs, out_dir: Path) -> StageResult:
    """Evaluate parent_checkpoint, or take its evaluation from the store."""
    evaluator = Evaluator.of(inputs, config=config.evaluation)
    evaluations = {"parent": evaluator.evaluate("parent", checkpoint_dir=inputs["parent_checkpoint"])}
    write_evaluations(out_dir, checkpoints=evaluations)
    return StageResult(metrics=evaluation_metrics(evaluations), tables=evaluation_tables(evaluations))
