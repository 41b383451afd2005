"""lm-eval's scores as a table: modes as columns, the parent's beside a checkpoint's, groups by their mean."""

from pipeline.evaluation.lm_eval_results import LmEvalResult, LmEvalScore
from pipeline.recipe import LmEvalPrompt
from pipeline.report.lm_eval_tables import lm_eval_facts, lm_eval_metrics, lm_eval_table


def _result(task: str, prompt: LmEvalPrompt, *scores: tuple[str, str, str, float]) -> LmEvalResult:
    return LmEvalResult(
        task=task,
        prompt=prompt,
        num_fewshot=None,
        lm_eval_version="0.4.13",
        task_versions={task: "1.0"},
        scores=tuple(
            LmEvalScore(task=part, metric=metric, filter=name, value=value, stderr=0.05, num_items=50)
            for part, metric, name, value in scores
        ),
    )


RESULTS = {
    "parent": (
        _result("quiz", "plain", ("quiz", "acc", "none", 0.7)),
        _result("sums", "on", ("sums", "exact_match", "last-word", 0.1)),
        _result("sums", "off", ("sums", "exact_match", "last-word", 0.2)),
    ),
    "rl": (
        _result("quiz", "plain", ("quiz", "acc", "none", 0.6)),
        _result("sums", "on", ("sums", "exact_match", "last-word", 0.4)),
        _result("sums", "off", ("sums", "exact_match", "last-word", 0.3)),
    ),
}


def test_modes_and_the_parents_modes_are_columns() -> None:
    table = lm_eval_table(RESULTS)

    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [row["metric"] for row in rows] == ["acc", "exact_match, last-word"]
    assert rows[0]["plain"] == "0.600 \u00b1 0.050"
    assert rows[0]["parent, plain"] == "0.700 \u00b1 0.050"
    assert rows[0]["thinking on"] == "-"
    assert [rows[1][column] for column in ("thinking on", "thinking off")] == [
        "0.400 \u00b1 0.050",
        "0.300 \u00b1 0.050",
    ]
    assert [rows[1][f"parent, thinking {mode}"] for mode in ("on", "off")] == [
        "0.100 \u00b1 0.050",
        "0.200 \u00b1 0.050",
    ]
    assert rows[1]["n (items)"] == 50


def test_parent_alone_has_no_columns_beside_its_own() -> None:
    table = lm_eval_table({"parent": RESULTS["parent"]})

    assert table.columns == ("checkpoint", "task", "metric", "plain", "thinking on", "thinking off", "n (items)")
    assert [row[0] for row in table.rows] == ["parent", "parent"]


def test_group_with_a_mean_shows_it_and_one_without_its_parts() -> None:
    with_mean = _result("all", "plain", ("all", "acc", "none", 0.5), ("one", "acc", "none", 0.4))
    without = _result("tag", "plain", ("one", "acc", "none", 0.4), ("two", "acc", "none", 0.6))

    assert [row[1] for row in lm_eval_table({"parent": (with_mean,)}).rows] == ["all"]
    assert [row[1] for row in lm_eval_table({"parent": (without,)}).rows] == ["one", "two"]


def test_every_score_is_a_metric_and_the_version_a_fact() -> None:
    metrics = lm_eval_metrics(RESULTS)

    assert metrics["rl_lm_eval_sums_on_exact_match_last-word"] == 0.4
    assert metrics["parent_lm_eval_quiz_plain_acc_stderr"] == 0.05
    assert lm_eval_facts(RESULTS) == {"lm_eval": "0.4.13"}
    assert lm_eval_facts({}) == {}
