"""parent_evaluation: the parent through the harness that will measure its children.

    python -m pipeline materialize parent_evaluation

Leaves out KL and agreement: the parent's with itself are 0 and 1 by definition.
"""

from pathlib import Path

from pipeline.evaluation.lm_eval_results import write_lm_eval
from pipeline.evaluation.lm_eval_store import LmEvaluator
from pipeline.evaluation.results import write_evaluations
from pipeline.evaluation.shared import Evaluator
from pipeline.report.evaluation_tables import evaluation_metrics, evaluation_tables
from pipeline.report.lm_eval_tables import lm_eval_facts, lm_eval_metrics, lm_eval_tables
from pipeline.stage import StageInputs, StageResult
from pipeline.stages.configs import EvaluationStage


def run(config: EvaluationStage, inputs: StageInputs, out_dir: Path) -> StageResult:
    """Evaluate parent_checkpoint, or take its evaluation from the store."""
    evaluator = Evaluator.of(inputs, config=config.evaluation)
    lm_evaluator = LmEvaluator.of(inputs, config=config.evaluation)
    directory = inputs["parent_checkpoint"]
    evaluations = {"parent": evaluator.evaluate("parent", checkpoint_dir=directory)}
    write_evaluations(out_dir, checkpoints=evaluations)
    asked = {} if lm_evaluator is None else {"parent": lm_evaluator.evaluate("parent", checkpoint_dir=directory)}
    write_lm_eval(out_dir, checkpoints=asked)
    return StageResult(
        metrics={**evaluation_metrics(evaluations), **lm_eval_metrics(asked)},
        facts=lm_eval_facts(asked),
        tables={**evaluation_tables(evaluations), **lm_eval_tables(asked)},
    )
