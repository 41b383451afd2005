"""evaluation: every checkpoint of the target by one harness; collects what was measured before and measures the rest.

python -m pipeline materialize evaluation
"""

from pathlib import Path

from pipeline.evaluation.results import CHECKPOINTS, read_evaluations, write_evaluations
from pipeline.evaluation.shared import Evaluator
from pipeline.report.drawings import draw_evaluations, save_figures
from pipeline.report.evaluation_tables import evaluation_metrics, evaluation_tables
from pipeline.stage import StageInputs, StageResult
from pipeline.stages.configs import EvaluationStage


def run(config: EvaluationStage, inputs: StageInputs, out_dir: Path) -> StageResult:
    """Evaluate each checkpoint of the target against the parent."""
    evaluator = Evaluator.of(inputs, config=config.evaluation)
    evaluations = {"parent": read_evaluations(inputs["parent_evaluation"])["parent"]}
    for name in CHECKPOINTS[1:]:
        evaluations[name] = evaluator.evaluate(name, checkpoint_dir=inputs[f"{name}_checkpoint"])
    write_evaluations(out_dir, checkpoints=evaluations)
    return StageResult(
        metrics=evaluation_metrics(evaluations),
        tables=evaluation_tables(evaluations),
        figures=save_figures(draw_evaluations(evaluations), out_dir=out_dir),
    )
