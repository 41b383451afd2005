"""What the report says: figures with intervals and sample sizes, and losses named as losses."""

from dataclasses import replace

import pytest

from pipeline.evaluation.intervals import share
from pipeline.evaluation.results import MultipleChoiceQuality
from pipeline.report.content import (
    headline_table,
    mean_multiple_choice,
    verdict,
    where_it_loses,
    write_target_limits,
)
from pipeline.report.evaluation_tables import evaluation_metrics, multiple_choice_table, write_estimate
from pipeline.report.inputs import ReportInputs, TargetLimits, read_inputs
from tests.pipeline.report.builders import checkpoint_evaluation, estimate


def test_verdict_names_speed_quality_switch_and_target(inputs: ReportInputs) -> None:
    text = verdict(inputs, target_name="fast")
    for words in (
        "For target fast",
        "decodes 1.30 times as fast as its parent (interval 1.25 to 1.36, n = 15 rounds)",
        "reads prompts 0.96 times as fast (slower)",
        "20% fewer parameters",
        "perplexity 35.5 against 29.0 (+22.4%, worse) on 6,144 held-out tokens",
        "95% (on) and 100% (off) of 20 answers per mode",
        "right answer in 40% (thinking on) and 40% (off) against 10% and 10%",
        "misses 1 of the 3 limits of its target when measured (1 of its 3 limits only within the tolerance of 5%)",
    ):
        assert words in text
    assert text.count(". ") == 0  # one sentence


def test_verdict_without_measurements_says_so() -> None:
    assert verdict(read_inputs({}), target_name="fast") == "Nothing was measured for target fast."


def test_where_it_loses_names_every_loss_and_no_gain(inputs: ReportInputs) -> None:
    text = "\n".join(where_it_loses(inputs))
    assert "reads prompts more slowly" in text
    assert "Worse perplexity on held-out text: 35.5 [33.5, 37.5] against 29.0 [27.0, 31.0]." in text
    assert "Worse multiple-choice accuracy" in text
    assert "(the intervals overlap)" in text
    assert "misses 1 of its target's 3 limits" in text
    assert "decodes more slowly" not in text
    assert "right answers found" not in text


def test_where_it_loses_names_answers_that_the_parent_found_and_the_child_does_not(inputs: ReportInputs) -> None:
    final = inputs.evaluations["rl"]
    worse = final.thinking_on.model_copy(update={"answer_found": share(0, num_samples=20)})
    evaluations = {**inputs.evaluations, "rl": final.model_copy(update={"thinking_on": worse})}
    text = "\n".join(where_it_loses(replace(inputs, evaluations=evaluations)))
    assert "Worse rate of right answers found, thinking on: 0.0% [0.0%, 16.1%] against 10.0% [2.8%, 30.1%]" in text


@pytest.mark.parametrize(
    ("num_missed", "num_within", "wanted"),
    [
        (0, 0, "meets its target when measured"),
        (0, 2, "meets its target when measured (all of its 2 limits only within the tolerance of 2.5%)"),
        (2, 0, "misses 2 of the 2 limits of its target when measured"),
    ],
)
def test_target_limits_are_told_with_the_tolerance_they_need(num_missed: int, num_within: int, wanted: str) -> None:
    limits = TargetLimits(num_limits=2, num_missed=num_missed, num_within_tolerance=num_within, speed_tolerance=0.025)
    assert write_target_limits(limits) == wanted


def test_headline_table_carries_change_and_sample_size(inputs: ReportInputs) -> None:
    rows = {row[0]: row for row in headline_table(inputs).rows}
    assert rows["decode speed, measured, parent = 1"][2:] == ("1.30 [1.25, 1.36], n = 15", "+30.0%")
    assert rows["perplexity on held-out text"][3] == "+22.4%"
    assert rows["multiple-choice accuracy (normalised)"][3] == "-6.0 points"
    assert str(rows["multiple-choice accuracy (normalised)"][2]).endswith("n = 50")


def test_multiple_choice_table_corrects_for_chance(inputs: ReportInputs) -> None:
    table = multiple_choice_table(inputs.evaluations)
    final = next(row for row in table.rows if "final" in str(row[0]))
    assert final[table.columns.index("kept above chance")] == "50%"  # (0.56 - 0.5) / (0.62 - 0.5)


def test_mean_multiple_choice_pools_items() -> None:
    sets = {
        "a": MultipleChoiceQuality(
            accuracy=share(1, num_samples=2), accuracy_normalised=share(10, num_samples=10), chance=0.5
        ),
        "b": MultipleChoiceQuality(
            accuracy=share(1, num_samples=2), accuracy_normalised=share(15, num_samples=30), chance=0.5
        ),
    }
    pooled = mean_multiple_choice(checkpoint_evaluation("rl").model_copy(update={"multiple_choice": sets}))
    assert pooled is not None
    assert (pooled.value, pooled.num_samples) == (pytest.approx(25 / 40), 40)
    assert mean_multiple_choice(checkpoint_evaluation("rl").model_copy(update={"multiple_choice": {}})) is None


def test_evaluation_metrics_are_flat_and_complete(inputs: ReportInputs) -> None:
    metrics = evaluation_metrics(inputs.evaluations)
    assert (metrics["rl_toggle_compliance_on"], metrics["rl_toggle_compliance_off"]) == (0.95, 1.0)
    for name in ("parent", "child", "fused", "kd", "cpt", "sft", "rl"):
        for quantity in ("perplexity", "kl", "top1_agreement", "accuracy_on", "accuracy_off", "exact_reply_on"):
            assert f"{name}_{quantity}" in metrics


def test_write_estimate_keeps_three_digits_and_the_interval() -> None:
    assert write_estimate(estimate(34.123, half_width=2.0)) == "34.1 [32.1, 36.1]"
    assert write_estimate(share(19, num_samples=20), as_percent=True) == "95.0% [76.4%, 99.1%]"
    assert write_estimate(None) == "-"
