"""Tables and metrics of evaluations: one row per checkpoint, every sampled figure with its 95% interval. Pure."""

from collections.abc import Mapping

from pipeline.evaluation.intervals import Estimate
from pipeline.evaluation.results import CHECKPOINTS, CheckpointEvaluation
from pipeline.stage import Number, Table

STAGE_TITLES = {
    "parent": "parent",
    "child": "child, assembled",
    "fused": "after FFN fusion",
    "kd": "after distillation",
    "cpt": "after continued pre-training",
    "sft": "after supervised fine-tuning",
    "rl": "after reinforcement learning (final)",
}
MISSING = "-"


def ordered(evaluations: Mapping[str, CheckpointEvaluation]) -> list[str]:
    """Return the checkpoints that were measured, in the order they came into being."""
    return [name for name in CHECKPOINTS if name in evaluations]


def write_estimate(estimate: Estimate | None, *, as_percent: bool = False, digits: int = 3) -> str:
    """Return `34.1 [32.0, 36.3]`, or with percents `95.0% [76.4%, 99.1%]`."""
    if estimate is None:
        return MISSING

    def write(value: float) -> str:
        return f"{100 * value:.1f}%" if as_percent else f"{value:#.{digits}g}".rstrip(".")

    return f"{write(estimate.value)} [{write(estimate.low)}, {write(estimate.high)}]"


def quality_table(evaluations: Mapping[str, CheckpointEvaluation]) -> Table:
    """Return text quality over all sets, one checkpoint per row."""
    rows = []
    for name in ordered(evaluations):
        text = evaluations[name].text_overall
        rows.append(
            (
                STAGE_TITLES[name],
                write_estimate(text.perplexity),
                write_estimate(text.kl_nats_per_token),
                write_estimate(text.top1_agreement, as_percent=True),
                text.num_tokens,
                text.perplexity.num_samples,
            )
        )
    columns = ("checkpoint", "perplexity", "KL to parent, nats/token", "top-1 agreement", "tokens", "n (windows)")
    return Table.of(columns, rows)


def perplexity_by_set_table(evaluations: Mapping[str, CheckpointEvaluation]) -> Table:
    """Return perplexity of each held-out set, one checkpoint per row."""
    names = ordered(evaluations)
    sets = list(evaluations[names[0]].text) if names else []
    rows = [
        (STAGE_TITLES[name], *(write_estimate(evaluations[name].text[held_out].perplexity) for held_out in sets))
        for name in names
    ]
    return Table.of(("checkpoint", *sets), rows)


def multiple_choice_table(evaluations: Mapping[str, CheckpointEvaluation]) -> Table:
    """Return accuracy of each set; `kept` is chance-corrected, (score - chance) / (parent - chance)."""
    rows = []
    for name in ordered(evaluations):
        for set_name, quality in evaluations[name].multiple_choice.items():
            parent = evaluations.get("parent")
            above_chance = (
                parent.multiple_choice[set_name].accuracy_normalised.value - quality.chance if parent else 0.0
            )
            kept = (quality.accuracy_normalised.value - quality.chance) / above_chance if above_chance > 0 else None
            rows.append(
                (
                    STAGE_TITLES[name],
                    set_name,
                    write_estimate(quality.accuracy, as_percent=True),
                    write_estimate(quality.accuracy_normalised, as_percent=True),
                    f"{100 * quality.chance:.1f}%",
                    MISSING if kept is None else f"{100 * kept:.0f}%",
                    quality.accuracy.num_samples,
                )
            )
    columns = ("checkpoint", "set", "accuracy", "normalised accuracy", "chance", "kept above chance", "n (items)")
    return Table.of(columns, rows)


def reasoning_table(evaluations: Mapping[str, CheckpointEvaluation]) -> Table:
    """Return what greedy answers are worth in both modes, and how long they are; one checkpoint and mode per row."""
    rows = []
    for name in ordered(evaluations):
        for mode in ("on", "off"):
            quality = evaluations[name].mode(mode)
            rows.append(
                (
                    STAGE_TITLES[name],
                    mode,
                    write_estimate(quality.toggle_compliance, as_percent=True),
                    write_estimate(quality.answer_found, as_percent=True),
                    write_estimate(quality.exact_reply, as_percent=True),
                    round(quality.mean_tokens, 1),
                    quality.num_truncated,
                    quality.num_empty,
                    quality.answer_found.num_samples,
                )
            )
    columns = (
        "checkpoint",
        "thinking",
        "obeys the switch",
        "right answer found",
        "exact reply",
        "mean tokens",
        "cut off",
        "empty",
        "n (answers)",
    )
    return Table.of(columns, rows)


def answers_by_task_table(evaluation: CheckpointEvaluation) -> Table:
    """Return in how many of one checkpoint's replies the right answer is found, per reasoning task and mode."""
    rows = [
        (
            task,
            write_estimate(on, as_percent=True),
            write_estimate(evaluation.thinking_off.answer_found_by_task[task], as_percent=True),
            on.num_samples,
        )
        for task, on in evaluation.thinking_on.answer_found_by_task.items()
    ]
    return Table.of(("task", "thinking on", "thinking off", "n (items)"), rows)


def evaluation_tables(evaluations: Mapping[str, CheckpointEvaluation]) -> dict[str, Table]:
    """Return every table of the evaluations that has a row."""
    tables = {
        "text": quality_table(evaluations),
        "perplexity_by_set": perplexity_by_set_table(evaluations),
        "multiple_choice": multiple_choice_table(evaluations),
        "reasoning": reasoning_table(evaluations),
    }
    return {name: table for name, table in tables.items() if table.rows}


def evaluation_metrics(evaluations: Mapping[str, CheckpointEvaluation]) -> dict[str, Number]:
    """Return the figures that checks and trackers read, flat: `{checkpoint}_{quantity}`."""
    metrics: dict[str, Number] = {}
    for name in ordered(evaluations):
        found = evaluations[name]
        metrics[f"{name}_perplexity"] = found.text_overall.perplexity.value
        metrics[f"{name}_kl"] = found.text_overall.kl_nats_per_token.value
        metrics[f"{name}_top1_agreement"] = found.text_overall.top1_agreement.value
        for set_name, quality in found.multiple_choice.items():
            metrics[f"{name}_{set_name}_accuracy_normalised"] = quality.accuracy_normalised.value
        for mode in ("on", "off"):
            metrics[f"{name}_toggle_compliance_{mode}"] = found.mode(mode).toggle_compliance.value
            metrics[f"{name}_accuracy_{mode}"] = found.mode(mode).answer_found.value
            metrics[f"{name}_exact_reply_{mode}"] = found.mode(mode).exact_reply.value
    return metrics
