"""The model card: README.md of the exported model, Markdown with the YAML front matter that model hubs read.

It holds figures and names, never text that a model wrote.
"""

from dataclasses import dataclass
from pathlib import Path

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.data.chat import THINKING_OFF, THINKING_ON
from pipeline.recipe import HubParent, LocalParent, ParentConfig, Target, WheelParent
from pipeline.report import content, evaluation_tables, lm_eval_tables
from pipeline.report.html import TEMPLATES_DIR, write_cell
from pipeline.report.inputs import ReportInputs
from pipeline.stage import Table


@dataclass(frozen=True, kw_only=True, slots=True)
class CardSubject:
    """Which experiment the card is about."""

    recipe_name: str
    recipe_description: str
    target_name: str
    target: Target
    parent: ParentConfig


def render_model_card(inputs: ReportInputs, *, subject: CardSubject) -> str:
    """Return the card as Markdown."""
    # Markdown has no escaping that fits all readers; nothing hostile is put in, so autoescape would only harm.
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES_DIR),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["markdown_table"] = markdown_table
    final = inputs.evaluations.get(content.FINAL)
    return environment.get_template("model_card.md.j2").render(
        front_matter=front_matter(subject),
        subject=subject,
        base_model=base_model(subject.parent),
        licence=licence(subject.parent),
        verdict=content.verdict(inputs, target_name=subject.target_name),
        losses=content.where_it_loses(inputs),
        answer_found=content.ANSWER_FOUND,
        headline=content.headline_table(inputs),
        quality=evaluation_tables.quality_table(inputs.evaluations),
        choices=evaluation_tables.multiple_choice_table(inputs.evaluations),
        reasoning=evaluation_tables.reasoning_table(inputs.evaluations),
        lm_eval=lm_eval_tables.lm_eval_table(inputs.lm_eval),
        lm_eval_words=lm_eval_tables.LM_EVAL,
        lm_eval_version=lm_eval_tables.lm_eval_facts(inputs.lm_eval).get("lm_eval"),
        speed=content.speed_table(inputs),
        speed_facts=_facts(inputs, "speed_report"),
        data_tables=content.tables_of(inputs, ["corpora", "reasoning_toggle_dataset"]),
        harness=None if final is None else f"version {final.harness_version}, {final.precision}",
        template_sha256=None if final is None else final.template_sha256,
        max_new_tokens_on=None if final is None else final.thinking_on.max_new_tokens,
        thinking_on=THINKING_ON,
        thinking_off=THINKING_OFF,
    )


def front_matter(subject: CardSubject) -> str:
    """Return the YAML that model hubs read, without the lines of dashes."""
    values = {
        "license": licence(subject.parent).lower(),
        "base_model": base_model(subject.parent),
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
        "tags": ["refit", "puzzle", "distillation", "reasoning", "nemotron-nas"],
    }
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True).strip()


def base_model(parent: ParentConfig) -> str:
    """Return the name of what the model was made from."""
    if isinstance(parent, HubParent):
        return parent.repo_id
    if isinstance(parent, WheelParent):
        return Path(parent.member).name.partition(".")[0]
    if isinstance(parent, LocalParent):
        return Path(parent.path).name
    return "random initialisation"


def licence(parent: ParentConfig) -> str:
    """Return the parent's licence, which the child inherits; random weights are under this project's own."""
    return parent.licence if isinstance(parent, HubParent | WheelParent | LocalParent) else "Apache-2.0"


def markdown_table(table: Table) -> str:
    """Return a table in Markdown; a bar inside a value is written as its entity, line breaks as spaces."""

    def line(values: list[str]) -> str:
        cells = [" ".join(value.split()).replace("|", "&#124;") for value in values]
        return "| " + " | ".join(cells) + " |"

    head = [line(list(table.columns)), line(["---"] * len(table.columns))]
    return "\n".join(head + [line([write_cell(value) for value in row]) for row in table.rows])


def _facts(inputs: ReportInputs, asset: str) -> dict[str, str]:
    return inputs.records[asset].result.facts if asset in inputs.records else {}
