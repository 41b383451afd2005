"""What a report says, in words and tables, before it is HTML or Markdown: pure functions of ReportInputs.

Every sampled figure is written with its 95% interval, and its sample size stands in the same row or sentence.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.costs import kv_bytes_per_token, num_parameters
from pipeline.evaluation.intervals import Estimate
from pipeline.evaluation.results import CheckpointEvaluation
from pipeline.progress import format_duration
from pipeline.report.evaluation_tables import MISSING, write_estimate
from pipeline.report.inputs import ReportInputs, TargetLimits
from pipeline.stage import Table

FINAL = "rl"
BF16_BYTES = 2
ANSWER_FOUND = (
    "A right answer is found in a reply to a reasoning task when the task's verifier accepts all that stands after the "
    "thought or, failing that, what a fixed rule takes from it: the last \\boxed{...}; else the last number, where the "
    "reference is one; else the last word or the quotation at the end. This compares parent and child, because the "
    "parent was never taught to reply with the bare answer, as an exact reply must."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantity:
    """One figure compared between parent and final checkpoint: how it is called, taken and written."""

    name: str
    of: Callable[[CheckpointEvaluation], Estimate | None]
    is_higher_better: bool
    as_percent: bool


def mean_multiple_choice(evaluation: CheckpointEvaluation) -> Estimate | None:
    """Return normalised accuracy over the items of all sets, None where there is no set."""
    parts = [quality.accuracy_normalised for quality in evaluation.multiple_choice.values()]
    if not parts:
        return None
    total = sum(part.num_samples for part in parts)

    def pooled(take: Callable[[Estimate], float]) -> float:
        return sum(take(part) * part.num_samples for part in parts) / total

    if len(parts) == 1:
        return parts[0]
    value = pooled(lambda part: part.value)
    # Sets are independent samples: half widths add in squares.
    below = sum(((part.value - part.low) * part.num_samples) ** 2 for part in parts) ** 0.5 / total
    above = sum(((part.high - part.value) * part.num_samples) ** 2 for part in parts) ** 0.5 / total
    return Estimate(value=value, low=value - below, high=value + above, num_samples=total)


QUANTITIES = (
    Quantity(
        name="perplexity on held-out text",
        of=lambda evaluation: evaluation.text_overall.perplexity,
        is_higher_better=False,
        as_percent=False,
    ),
    Quantity(
        name="multiple-choice accuracy (normalised)", of=mean_multiple_choice, is_higher_better=True, as_percent=True
    ),
    Quantity(
        name="rate of right answers found, thinking on",
        of=lambda evaluation: evaluation.thinking_on.answer_found,
        is_higher_better=True,
        as_percent=True,
    ),
    Quantity(
        name="rate of right answers found, thinking off",
        of=lambda evaluation: evaluation.thinking_off.answer_found,
        is_higher_better=True,
        as_percent=True,
    ),
    Quantity(
        name="toggle compliance, thinking on",
        of=lambda evaluation: evaluation.thinking_on.toggle_compliance,
        is_higher_better=True,
        as_percent=True,
    ),
    Quantity(
        name="toggle compliance, thinking off",
        of=lambda evaluation: evaluation.thinking_off.toggle_compliance,
        is_higher_better=True,
        as_percent=True,
    ),
)


def write_percent_change(new: float, old: float) -> str:
    """Return the relative change with its sign: +12.3%."""
    return f"{100 * (new / old - 1):+.1f}%"


def verdict(inputs: ReportInputs, *, target_name: str) -> str:
    """Return the result in one sentence, with its figures."""
    parts = []
    decode = inputs.speedup("decode")
    if decode is not None:
        slower = " (slower)" if decode.value < 1 else ""
        parts.append(
            f"decodes {decode.value:.2f} times as fast as its parent{slower} (interval {decode.low:.2f} to "
            f"{decode.high:.2f}, n = {decode.num_samples} rounds)"
        )
    prefill = inputs.speedup("prefill")
    if prefill is not None:
        slower = " (slower)" if prefill.value < 1 else ""
        parts.append(f"reads prompts {prefill.value:.2f} times as fast{slower}")
    parent, final = inputs.evaluations.get("parent"), inputs.evaluations.get(FINAL)
    if parent is not None and final is not None:
        fewer = 1 - final.num_parameters / parent.num_parameters
        parts.append(f"has {100 * fewer:.0f}% fewer parameters")
        before, after = parent.text_overall.perplexity.value, final.text_overall.perplexity.value
        word = "worse" if after > before else "better" if after < before else "equal"
        parts.append(
            f"has perplexity {after:.1f} against {before:.1f} ({write_percent_change(after, before)}, {word}) on "
            f"{final.text_overall.num_tokens:,} held-out tokens"
        )
        on, off = final.thinking_on.toggle_compliance, final.thinking_off.toggle_compliance
        before_on, before_off = parent.thinking_on.answer_found, parent.thinking_off.answer_found
        found_on, found_off = final.thinking_on.answer_found, final.thinking_off.answer_found
        parts.append(
            f"replies with a right answer in {100 * found_on.value:.0f}% (thinking on) and "
            f"{100 * found_off.value:.0f}% (off) against {100 * before_on.value:.0f}% and {100 * before_off.value:.0f}%"
        )
        parts.append(
            f"obeys the reasoning switch in {100 * on.value:.0f}% (on) and {100 * off.value:.0f}% (off) of "
            f"{on.num_samples} answers per mode"
        )
    limits = inputs.target_limits()
    if limits is not None and limits.num_limits:
        parts.append(write_target_limits(limits))
    if not parts:
        return f"Nothing was measured for target {target_name}."
    said = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + ", and " + parts[-1]
    return f"For target {target_name}, the child {said}."


def write_target_limits(limits: TargetLimits) -> str:
    """Return how the final checkpoint stands to the target's limits, in a few words."""
    if limits.num_missed:
        text = f"misses {limits.num_missed} of the {_limits(limits.num_limits)} of its target when measured"
    else:
        text = "meets its target when measured"
    if not limits.num_within_tolerance:
        return text
    number = "all" if limits.num_within_tolerance == limits.num_limits else f"{limits.num_within_tolerance}"
    return f"{text} ({number} of its {_limits(limits.num_limits)} only within the tolerance of " + (
        f"{100 * limits.speed_tolerance:g}%)"
    )


def where_it_loses(inputs: ReportInputs) -> list[str]:
    """Return a sentence for everything in which the final checkpoint is behind its parent or its target."""
    found = []
    for phase, verb in (("decode", "decodes"), ("prefill", "reads prompts")):
        speed = inputs.speedup(phase)
        if speed is not None and speed.value < 1:
            found.append(f"It {verb} more slowly than the parent: {speed.value:.2f} times its speed.")
    parent, final = inputs.evaluations.get("parent"), inputs.evaluations.get(FINAL)
    if parent is not None and final is not None:
        for quantity in QUANTITIES:
            before, after = quantity.of(parent), quantity.of(final)
            if before is None or after is None:
                continue
            is_worse = after.value < before.value if quantity.is_higher_better else after.value > before.value
            if is_worse:
                overlap = after.low <= before.high and before.low <= after.high
                found.append(
                    f"Worse {quantity.name}: {write_estimate(after, as_percent=quantity.as_percent)} against "
                    f"{write_estimate(before, as_percent=quantity.as_percent)}"
                    + (" (the intervals overlap)." if overlap else ".")
                )
    limits = inputs.target_limits()
    if limits is not None and limits.num_missed:
        found.append(f"It misses {limits.num_missed} of its target's {_limits(limits.num_limits)} when measured.")
    if limits is not None and limits.num_within_tolerance:
        found.append(
            f"It meets {limits.num_within_tolerance} of its target's {_limits(limits.num_limits)} only within the "
            f"tolerance of {100 * limits.speed_tolerance:g}%."
        )
    return found


def _limits(number: int) -> str:
    return f"{number} limit" if number == 1 else f"{number} limits"


def headline_table(inputs: ReportInputs) -> Table:
    """Return parent against final checkpoint, one quantity per row."""
    rows: list[tuple[str, str, str, str]] = []
    parent, final = inputs.architectures.get("parent_checkpoint"), inputs.architectures.get("rl_checkpoint")
    if parent is not None and final is not None:
        for name, before, after in (
            ("parameters", num_parameters(parent), num_parameters(final)),
            (
                "KV cache, bytes per token (bf16)",
                round(kv_bytes_per_token(parent, bytes_per_value=BF16_BYTES)),
                round(kv_bytes_per_token(final, bytes_per_value=BF16_BYTES)),
            ),
        ):
            rows.append((name, f"{before:,}", f"{after:,}", write_percent_change(after, before)))
    for phase in ("decode", "prefill"):
        speed = inputs.speedup(phase)
        if speed is not None:
            text = f"{speed.value:.2f} [{speed.low:.2f}, {speed.high:.2f}], n = {speed.num_samples}"
            rows.append((f"{phase} speed, measured, parent = 1", "1.00", text, write_percent_change(speed.value, 1.0)))
    before_all, after_all = inputs.evaluations.get("parent"), inputs.evaluations.get(FINAL)
    if before_all is not None and after_all is not None:
        for quantity in QUANTITIES:
            before, after = quantity.of(before_all), quantity.of(after_all)
            if before is None or after is None:
                continue
            if quantity.as_percent:
                change = f"{100 * (after.value - before.value):+.1f} points"
            else:
                change = write_percent_change(after.value, before.value)
            rows.append(
                (
                    quantity.name,
                    write_estimate(before, as_percent=quantity.as_percent),
                    f"{write_estimate(after, as_percent=quantity.as_percent)}, n = {after.num_samples}",
                    change,
                )
            )
    return Table.of(("quantity", "parent", "final checkpoint", "change"), rows)


def speed_table(inputs: ReportInputs) -> Table:
    """Return predicted and measured speed side by side."""
    rows = []
    for phase in ("decode", "prefill"):
        predicted, measured = inputs.predicted_speedup(phase), inputs.speedup(phase)
        child = inputs.metric("child_checkpoint", f"measured_{phase}_speedup")
        if predicted is None and measured is None and child is None:
            continue
        rows.append(
            (
                phase,
                MISSING if predicted is None else f"{predicted:.2f}",
                MISSING if child is None else f"{child:.2f}",
                MISSING if measured is None else write_estimate(measured),
                MISSING if measured is None else measured.num_samples,
            )
        )
    columns = ("speed, parent = 1", "predicted", "child, measured after assembly", "final checkpoint, measured", "n")
    return Table.of(columns, rows)


def wall_time_table(inputs: ReportInputs) -> Table:
    """Return how long each stage ran when its artifact was made, and its share of the whole."""
    total = sum(record.wall_s for record in inputs.records.values()) or 1.0
    rows: list[tuple[str | float, ...]] = [
        (record.asset, format_duration(record.wall_s), f"{100 * record.wall_s / total:.1f}%")
        for record in inputs.records.values()
    ]
    rows.append(("all of these", format_duration(total), "100.0%"))
    return Table.of(("stage", "wall time", "share"), rows)


def fingerprint_table(inputs: ReportInputs) -> Table:
    """Return what identifies every artifact: fingerprint of its inputs and configuration, hash of its content."""
    rows = [(record.asset, record.fingerprint, record.content_hash) for record in inputs.records.values()]
    return Table.of(("artifact", "fingerprint", "content hash"), rows)


def tables_of(inputs: ReportInputs, assets: Sequence[str]) -> dict[str, Table]:
    """Return the tables that some stages reported, titled `stage: table`."""
    return {
        f"{asset}: {title.replace('_', ' ')}": table
        for asset in assets
        if asset in inputs.records
        for title, table in inputs.records[asset].result.tables.items()
    }
