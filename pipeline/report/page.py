"""The sections of the report page, composed from ReportInputs: what stands in each, in which order, in which words."""

from collections.abc import Mapping
from importlib.metadata import version

from pipeline.hardware import describe_hardware
from pipeline.report import content, evaluation_tables, lm_eval_tables
from pipeline.report.html import Page, Section, describe_blocks
from pipeline.report.inputs import ReportInputs
from pipeline.stage import Table

CAPTIONS = {
    "architecture": (
        "One column per parent layer: key/value heads above, FFN width below, as a share of the parent's. "
        "Crossed boxes are removed subblocks; a wide box is one fused FFN that does the work of several layers."
    ),
    "speed": (
        "Speed of the final checkpoint relative to the parent, measured in turn on the same machine, next to what the "
        "search predicted from block timings."
    ),
    "quality": "Perplexity and KL to the parent for every checkpoint; bars are 95% intervals over windows of text.",
    "toggle": "Share of greedy answers that have the form their mode asks for; bars are 95% Wilson intervals.",
    "curves": "Training curves, one value per optimizer step (per rollout in reinforcement learning).",
    "scores": "KL to the parent when one block is replaced by each candidate, all others left as they are.",
    "dependencies": (
        "Cosine distance of each block's update with and without an earlier block, log scale: dark pairs hardly need "
        "each other. Layers without attention are red."
    ),
    "library": "Loss of each trained variant at its last step; lower is closer to the parent's own subblock.",
}
DATA_STAGES = (
    "corpora",
    "evaluation_sets",
    "distillation_mix",
    "pretraining_mix",
    "reasoning_traces",
    "reasoning_toggle_dataset",
    "rl_prompts",
)
SEARCH_STAGES = ("mip_solution", "refined_solution", "baselines", "child_checkpoint")
FUSION_STAGES = ("dependency_matrix", "fused_checkpoint", "fusion_report")
VERSIONS = ("refit", "torch", "transformers", "deepspeed", "pulp", "highspy", "polars", "reasoning-gym", "dagster")


def compose_page(
    inputs: ReportInputs, *, figures: Mapping[str, str], recipe_name: str, recipe_description: str, target_name: str
) -> Page:
    """Return the page; a section without figure, table or note is left out."""
    final = inputs.evaluations.get(content.FINAL)
    architecture = inputs.architectures.get("rl_checkpoint") or inputs.architectures.get("child_checkpoint")
    sections = [
        _section(
            "summary",
            "Parent and child",
            intro=content.ANSWER_FOUND if inputs.evaluations else "",
            tables={"Final checkpoint against its parent": content.headline_table(inputs)},
        ),
        _section("architecture", "Architecture", figures=_pick(figures, "architecture")),
        _section(
            "speed",
            "Predicted and measured speed",
            intro="Speed is measured on assembled models, never added up from blocks; the prediction stands beside it.",
            figures=_pick(figures, "speed"),
            tables={"Speed": content.speed_table(inputs), **content.tables_of(inputs, ["speed_report"])},
        ),
        _quality_section(inputs, figures=figures),
        _toggle_section(inputs, figures=figures),
        _section(
            "lm-eval",
            "Tasks through lm-eval",
            intro=lm_eval_tables.LM_EVAL,
            tables={"Scores": lm_eval_tables.lm_eval_table(inputs.lm_eval)},
        ),
        _section("curves", "Loss curves", figures=_pick(figures, "curves")),
        _section(
            "search",
            "Search",
            figures=_pick(figures, "scores", "library"),
            tables=content.tables_of(inputs, SEARCH_STAGES),
            notes=_notes(inputs, SEARCH_STAGES),
        ),
        _section(
            "fusion",
            "FFN fusion",
            intro=(
                "What joining attention-free runs into wide FFNs cost before any training, beside the same layers in "
                "reverse order and beside FFNs deleted for the same latency, all on the same held-out windows."
            ),
            figures=_pick(figures, "dependencies"),
            tables=content.tables_of(inputs, FUSION_STAGES),
        ),
        _section(
            "data",
            "Data and licences",
            tables=content.tables_of(inputs, DATA_STAGES),
            notes=_notes(inputs, DATA_STAGES),
        ),
        _section(
            "time",
            "Wall time",
            intro="How long each stage ran when its artifact was made; reused artifacts cost seconds.",
            tables={"Stages": content.wall_time_table(inputs)},
        ),
        _section("reproduction", "Reproduction", tables={"Artifacts": content.fingerprint_table(inputs)}),
    ]
    return Page(
        title=f"Refit: {recipe_name}, target {target_name}",
        description=recipe_description,
        verdict=content.verdict(inputs, target_name=target_name),
        losses=tuple(content.where_it_loses(inputs)),
        sections=tuple(section for section in sections if section.figures or section.tables or section.notes),
        samples=final.samples if final is not None else (),
        blocks=describe_blocks(architecture) if architecture is not None else (),
        facts=_facts(inputs, recipe_name=recipe_name, target_name=target_name),
    )


def _quality_section(inputs: ReportInputs, *, figures: Mapping[str, str]) -> Section:
    evaluations = inputs.evaluations
    tables = {
        "All held-out text": evaluation_tables.quality_table(evaluations),
        "Perplexity by set": evaluation_tables.perplexity_by_set_table(evaluations),
        "Multiple choice, zero-shot": evaluation_tables.multiple_choice_table(evaluations),
    }
    tables["What each stage changed"] = evaluation_tables.bookends_table(evaluations)
    return _section(
        "quality",
        "Quality through the stages",
        intro=(
            "Every checkpoint is measured by the same harness on the same tokens. Brackets hold 95% intervals: over "
            "windows for text, Wilson's for shares. KL is KL(parent || checkpoint)."
        ),
        figures=_pick(figures, "quality"),
        tables=tables,
    )


def _toggle_section(inputs: ReportInputs, *, figures: Mapping[str, str]) -> Section:
    final = inputs.evaluations.get(content.FINAL)
    tables = {
        "Greedy answers in both modes": evaluation_tables.reasoning_table(inputs.evaluations),
        "Tasks that nothing trains on": evaluation_tables.held_out_tasks_table(inputs.evaluations),
        "Verifiable instructions": evaluation_tables.instructions_table(inputs.evaluations),
        "Sampled answers, and the health of chains": evaluation_tables.chains_table(inputs.evaluations),
    }
    if final is not None:
        tables["Right answer found, final checkpoint by task"] = evaluation_tables.answers_by_task_table(final)
        tables["Unusual system prompts, final checkpoint"] = evaluation_tables.robustness_table({content.FINAL: final})
    return _section(
        "toggle",
        "Reasoning on and off",
        intro=(
            "On obeys when the reply is exactly one closed think block followed by an answer; off obeys when there is "
            "an answer and no think tag. An empty answer counts as wrong. An exact reply is the right answer and "
            "nothing else behind the thought; how a right answer is found in other replies stands with the first "
            "table. The answers below are the final checkpoint's, as generated."
        ),
        figures=_pick(figures, "toggle"),
        tables=tables,
    )


def _facts(inputs: ReportInputs, *, recipe_name: str, target_name: str) -> tuple[tuple[str, str], ...]:
    facts = [("recipe", recipe_name), ("target", target_name), ("report made on", describe_hardware())]
    speed = inputs.records.get("speed_report")
    if speed is not None:
        facts += [(f"speed measured, {name.replace('_', ' ')}", value) for name, value in speed.result.facts.items()]
    parent = inputs.evaluations.get("parent")
    if parent is not None:
        facts.append(("evaluation harness", f"version {parent.harness_version}, {parent.precision}"))
        facts.append(("chat template sha256", parent.template_sha256))
    facts += list(lm_eval_tables.lm_eval_facts(inputs.lm_eval).items())
    facts.append(("versions", ", ".join(f"{package} {version(package)}" for package in VERSIONS)))
    return tuple(facts)


def _section(
    anchor: str,
    title: str,
    *,
    intro: str = "",
    figures: Mapping[str, str] | None = None,
    tables: Mapping[str, Table] | None = None,
    notes: Mapping[str, str] | None = None,
) -> Section:
    return Section(
        anchor=anchor,
        title=title,
        intro=intro,
        figures=figures or {},
        tables={name: table for name, table in (tables or {}).items() if table.rows},
        notes=notes or {},
    )


def _pick(figures: Mapping[str, str], *names: str) -> dict[str, str]:
    return {CAPTIONS[name]: figures[name] for name in names if name in figures}


def _notes(inputs: ReportInputs, assets: tuple[str, ...]) -> dict[str, str]:
    return {
        f"{asset}: {title.replace('_', ' ')}": text
        for asset in assets
        if asset in inputs.records
        for title, text in inputs.records[asset].result.markdown.items()
    }
