"""evaluation.json reads back as it was written, broken checkpoints included."""

import math
from pathlib import Path

from pipeline.evaluation.intervals import Estimate
from pipeline.evaluation.results import read_evaluations, write_evaluations
from tests.pipeline.report.builders import checkpoint_evaluation


def test_evaluations_written_and_read_are_equal(tmp_path: Path) -> None:
    evaluations = {name: checkpoint_evaluation(name) for name in ("parent", "rl")}
    write_evaluations(tmp_path, checkpoints=evaluations)
    assert read_evaluations(tmp_path) == evaluations


def test_evaluation_with_nan_reads_back(tmp_path: Path) -> None:
    nan = Estimate(value=math.nan, low=math.nan, high=math.inf, num_samples=2)
    whole = checkpoint_evaluation("rl")
    broken = whole.model_copy(update={"text_overall": whole.text_overall.model_copy(update={"perplexity": nan})})
    write_evaluations(tmp_path, checkpoints={"rl": broken})
    perplexity = read_evaluations(tmp_path)["rl"].text_overall.perplexity
    assert math.isnan(perplexity.value)
    assert perplexity.high == math.inf
