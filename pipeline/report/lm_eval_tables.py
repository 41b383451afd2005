"""Tables, metrics and facts of what lm-eval measured: the modes side by side, the parent beside the child. Pure."""

from collections.abc import Mapping
from typing import get_args

from pipeline.evaluation.lm_eval_results import LmEvalResult, LmEvalScore
from pipeline.evaluation.results import CHECKPOINTS
from pipeline.recipe import LmEvalPrompt
from pipeline.report.evaluation_tables import MISSING, STAGE_TITLES
from pipeline.stage import Number, Table

Results = Mapping[str, tuple[LmEvalResult, ...]]

PROMPT_TITLES: dict[LmEvalPrompt, str] = {"plain": "plain", "on": "thinking on", "off": "thinking off"}
LM_EVAL = (
    "As lm-eval reports it, with its own standard errors. Plain is the task's text alone; on and off are the chat "
    "template of the checkpoint under the two system prompts."
)


def lm_eval_table(results: Results) -> Table:
    """Return one row per checkpoint, task and metric: a column for each prompt, and the parent's after them.

    The parent's own rows are left out where there are others.
    """
    names = [name for name in CHECKPOINTS if name in results]
    prompts = [prompt for prompt in get_args(LmEvalPrompt) if any(prompt in _prompts(results[name]) for name in names)]
    children = [name for name in names if name != "parent"]
    rows = []
    for name in children or names:
        for task, scores in _by_task(results[name]).items():
            for label in dict.fromkeys(key for _, key in scores):
                own = {prompt: scores.get((prompt, label)) for prompt in prompts}
                parents = _by_task(results["parent"]).get(task, {}) if children and "parent" in results else {}
                rows.append(
                    (
                        STAGE_TITLES[name],
                        task,
                        label,
                        *(write_score(own[prompt]) for prompt in prompts),
                        *(write_score(parents.get((prompt, label))) for prompt in prompts if children),
                        max(score.num_items for score in own.values() if score is not None),
                    )
                )
    columns = [PROMPT_TITLES[prompt] for prompt in prompts]
    beside = [f"parent, {title}" for title in columns] if children else []
    return Table.of(("checkpoint", "task", "metric", *columns, *beside, "n (items)"), rows)


def write_score(score: LmEvalScore | None) -> str:
    """Return a value with its standard error, where there is one."""
    if score is None:
        return MISSING
    return f"{score.value:.3f}" + ("" if score.stderr is None else f" \u00b1 {score.stderr:.3f}")


def lm_eval_tables(results: Results) -> dict[str, Table]:
    """Return the table by its name, nothing when lm-eval was not asked."""
    table = lm_eval_table(results)
    return {"lm_eval": table} if table.rows else {}


def lm_eval_metrics(results: Results) -> dict[str, Number]:
    """Return every score, flat: `{checkpoint}_lm_eval_{task}_{prompt}_{metric}`, its standard error with `_stderr`."""
    metrics: dict[str, Number] = {}
    for name, of_checkpoint in results.items():
        for result in of_checkpoint:
            for score in result.scores:
                metric = score.metric if score.filter == "none" else f"{score.metric}_{score.filter}"
                key = f"{name}_lm_eval_{score.task}_{result.prompt}_{metric}"
                metrics[key] = score.value
                if score.stderr is not None:
                    metrics[f"{key}_stderr"] = score.stderr
    return metrics


def lm_eval_facts(results: Results) -> dict[str, str]:
    """Return which versions of lm-eval measured, nothing when it was not asked."""
    versions = sorted({result.lm_eval_version for found in results.values() for result in found})
    return {"lm_eval": ", ".join(versions)} if versions else {}


def _prompts(results: tuple[LmEvalResult, ...]) -> set[LmEvalPrompt]:
    return {result.prompt for result in results}


def _by_task(results: tuple[LmEvalResult, ...]) -> dict[str, dict[tuple[LmEvalPrompt, str], LmEvalScore]]:
    """Return scores by task, then by prompt and metric; of a group that has a mean of its own, that alone."""
    found: dict[str, dict[tuple[LmEvalPrompt, str], LmEvalScore]] = {}
    for result in results:
        has_mean = any(score.task == result.task for score in result.scores)
        for score in result.scores:
            if score.task == result.task or not has_mean:
                found.setdefault(score.task, {})[result.prompt, score.name] = score
    return found
