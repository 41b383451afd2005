"""Tables and metrics of evaluations: one row per checkpoint, every sampled figure with its 95% interval. Pure."""

import itertools
import math
from collections.abc import Callable, Mapping

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
        return f"{100 * value:.1f}%" if as_percent else write_figure(value, digits=digits)

    return f"{write(estimate.value)} [{write(estimate.low)}, {write(estimate.high)}]"


def write_figure(value: float, *, digits: int = 3) -> str:
    """Return so many digits, and all of them in front of the point: `0.560`, `34.1`, `1,230`."""
    if abs(value) >= 10**digits - 0.5:
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}".rstrip(".")


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


def held_out_tasks_table(evaluations: Mapping[str, CheckpointEvaluation]) -> Table:
    """Return how many right answers are found on tasks that nothing trains on, one checkpoint and group per row."""
    rows = [
        (
            STAGE_TITLES[name],
            group,
            write_estimate(quality.thinking_on.answer_found, as_percent=True),
            write_estimate(quality.thinking_off.answer_found, as_percent=True),
            write_estimate(quality.thinking_on.toggle_compliance, as_percent=True),
            write_estimate(quality.thinking_off.toggle_compliance, as_percent=True),
            quality.thinking_on.answer_found.num_samples,
        )
        for name in ordered(evaluations)
        for group, quality in evaluations[name].held_out_tasks.items()
    ]
    columns = ("checkpoint", "tasks", "right, on", "right, off", "obeys, on", "obeys, off", "n (items)")
    return Table.of(columns, rows)


def instructions_table(evaluations: Mapping[str, CheckpointEvaluation]) -> Table:
    """Return how many verifiable instructions greedy replies follow, one checkpoint per row.

    A prompt is followed when all its instructions are; loose forgives bold type and a line around the answer.
    """
    rows = [
        (
            STAGE_TITLES[name],
            *(write_estimate(quality.prompt_strict, as_percent=True) for quality in (on, off)),
            *(write_estimate(quality.prompt_loose, as_percent=True) for quality in (on, off)),
            *(write_estimate(quality.instruction_strict, as_percent=True) for quality in (on, off)),
            *(write_estimate(quality.instruction_loose, as_percent=True) for quality in (on, off)),
            f"{on.prompt_strict.num_samples} ({on.num_instructions})",
        )
        for name in ordered(evaluations)
        if evaluations[name].instructions
        for on, off in [(evaluations[name].instructions["on"], evaluations[name].instructions["off"])]
    ]
    measures = ("prompts, strict", "prompts, loose", "instructions, strict", "instructions, loose")
    columns = ("checkpoint", *(f"{measure}, {mode}" for measure in measures for mode in ("on", "off")))
    return Table.of((*columns, "n prompts (instructions)"), rows)


def robustness_table(evaluations: Mapping[str, CheckpointEvaluation]) -> Table:
    """Return what replies do under unusual system prompts, one checkpoint and prompt per row."""
    rows = [
        (
            STAGE_TITLES[name],
            row.variant,
            row.wanted,
            write_estimate(row.thinks, as_percent=True),
            write_estimate(row.answers_at_once, as_percent=True),
            row.thinks.num_samples,
        )
        for name in ordered(evaluations)
        for row in evaluations[name].robustness
    ]
    return Table.of(("checkpoint", "system prompt", "wanted", "thinks", "answers at once", "n (answers)"), rows)


def chains_table(evaluations: Mapping[str, CheckpointEvaluation]) -> Table:
    """Return pass@1 over samples and the health of chains of thought, one checkpoint per row."""
    rows = []
    for name in ordered(evaluations):
        sampled, chains = evaluations[name].sampled, evaluations[name].chains
        rows.append(
            (
                STAGE_TITLES[name],
                MISSING if sampled is None else write_estimate(sampled.pass_at_1, as_percent=True),
                MISSING
                if sampled is None
                else f"{sampled.pass_at_1.num_samples} x {sampled.num_samples}, T {sampled.temperature:g}, "
                f"top-p {sampled.top_p:g}",
                write_estimate(chains.num_words),
                write_estimate(chains.repeated_share, as_percent=True),
                write_estimate(chains.looping, as_percent=True),
                MISSING if math.isnan(chains.self_bleu) else f"{chains.self_bleu:.3f}",
                chains.num_words.num_samples,
            )
        )
    columns = (
        "checkpoint",
        "pass@1, on",
        "items x samples",
        "words a reply, on",
        "repeated",
        "looping",
        "self-BLEU",
        "n (replies)",
    )
    return Table.of(columns, rows)


def bookends_table(evaluations: Mapping[str, CheckpointEvaluation]) -> Table:
    """Return what each stage changed: every measure before and after it."""
    measures: tuple[tuple[str, Callable[[CheckpointEvaluation], float | None], bool], ...] = (
        ("perplexity", lambda found: found.text_overall.perplexity.value, False),
        ("KL to parent, nats/token", lambda found: found.text_overall.kl_nats_per_token.value, False),
        ("right, on", lambda found: found.thinking_on.answer_found.value, True),
        ("right, off", lambda found: found.thinking_off.answer_found.value, True),
        ("pass@1, on", lambda found: None if found.sampled is None else found.sampled.pass_at_1.value, True),
        ("obeys, on", lambda found: found.thinking_on.toggle_compliance.value, True),
        ("obeys, off", lambda found: found.thinking_off.toggle_compliance.value, True),
        ("tokens, on", lambda found: found.thinking_on.mean_tokens, False),
        ("self-BLEU", lambda found: found.chains.self_bleu, False),
    )
    names = ordered(evaluations)
    rows = [
        (
            STAGE_TITLES[after],
            *(
                f"{_bare(of(evaluations[before]), as_percent=as_percent)} > "
                f"{_bare(of(evaluations[after]), as_percent=as_percent)}"
                for _, of, as_percent in measures
            ),
        )
        for before, after in itertools.pairwise(names)
    ]
    return Table.of(("stage", *(title for title, _, _ in measures)), rows)


def _bare(value: float | None, *, as_percent: bool) -> str:
    if value is None or math.isnan(value):
        return MISSING
    if as_percent:
        return f"{100 * value:.0f}%"
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"


def evaluation_tables(evaluations: Mapping[str, CheckpointEvaluation]) -> dict[str, Table]:
    """Return every table of the evaluations that has a row."""
    tables = {
        "text": quality_table(evaluations),
        "perplexity_by_set": perplexity_by_set_table(evaluations),
        "multiple_choice": multiple_choice_table(evaluations),
        "reasoning": reasoning_table(evaluations),
        "held_out_tasks": held_out_tasks_table(evaluations),
        "instructions": instructions_table(evaluations),
        "chains": chains_table(evaluations),
        "robustness": robustness_table(evaluations),
        "bookends": bookends_table(evaluations),
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
            metrics[f"{name}_mean_tokens_{mode}"] = found.mode(mode).mean_tokens
        if found.sampled is not None:
            metrics[f"{name}_pass_at_1_on"] = found.sampled.pass_at_1.value
    return metrics
