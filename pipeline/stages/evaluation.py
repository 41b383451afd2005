"""evaluation: every checkpoint of the target by one harness; collects what was measured before and measures the rest.

python -m pipeline materialize evaluation
"""

from pathlib import Path

from pipeline.evaluation.lm_eval_results import read_lm_eval, write_lm_eval
from pipeline.evaluation.lm_eval_store import LmEvaluator
from pipeline.evaluation.results import CHECKPOINTS, read_evaluations, write_evaluations
from pipeline.evaluation.shared import Evaluator
from pipeline.report.drawings import draw_evaluations, save_figures
from pipeline.report.evaluation_tables import evaluation_metrics, evaluation_tables
from pipeline.report.lm_eval_tables import lm_eval_facts, lm_eval_metrics, lm_eval_tables
from pipeline.stage import StageInputs, StageResult
from pipeline.stages.configs import EvaluationStage


def run(config: EvaluationStage, inputs: StageInputs, out_dir: Path) -> StageResult:
    """Evaluate each checkpoint of the target against the parent."""
    evaluator = Evaluator.of(inputs, config=config.evaluation)
    lm_evaluator = LmEvaluator.of(inputs, config=config.evaluation)
    evaluations = {"parent": read_evaluations(inputs["parent_evaluation"])["parent"]}
    for name in CHECKPOINTS[1:]:
        evaluations[name] = evaluator.evaluate(name, checkpoint_dir=inputs[f"{name}_checkpoint"])
    write_evaluations(out_dir, checkpoints=evaluations)
    asked = read_lm_eval(inputs["parent_evaluation"])
    if lm_evaluator is not None and config.evaluation.lm_eval is not None:
        for name in CHECKPOINTS[1:] if config.evaluation.lm_eval.checkpoints == "all" else CHECKPOINTS[-1:]:
            asked[name] = lm_evaluator.evaluate(name, checkpoint_dir=inputs[f"{name}_checkpoint"])
    write_lm_eval(out_dir, checkpoints=asked)
    return StageResult(
        metrics={**evaluation_metrics(evaluations), **lm_eval_metrics(asked)},
        facts=lm_eval_facts(asked),
        tables={**evaluation_tables(evaluations), **lm_eval_tables(asked)},
        figures=save_figures(draw_evaluations(evaluations), out_dir=out_dir),
    )
