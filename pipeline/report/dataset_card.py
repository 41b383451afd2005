"""The card of the toggle dataset: what is in it, from whom, under which licences, and what was dropped. Markdown."""

from collections.abc import Mapping, Sequence

from pipeline.stage import Table

CARD_FILE = "README.md"

_NAME = "reasoning-toggle"

_HEADINGS = {
    "samples_per_category": "Samples per category and mode",
    "generators": "Who wrote them, and under which licence",
    "filters": "Filters: rows in and out",
    "drop_reasons": "Why rows were dropped",
    "blends": "Blends that are trained on",
}


def render_dataset_card(*, languages: Sequence[str], tables: Mapping[str, Table]) -> str:
    """Return the card with its front matter; licences are those of the rows that are left."""
    licences = sorted({str(row[2]).lower() for row in tables["generators"].rows})
    lines = [
        "---",
        f"pretty_name: {_NAME}",
        f"language: [{', '.join(languages)}]",
        f"license: {licences[0] if len(licences) == 1 else 'other'}",
        *([] if len(licences) == 1 else [f"license_name: {' and '.join(licences)}"]),
        "task_categories: [text-generation]",
        "tags: [reasoning]",
        "---",
        f"# {_NAME}",
        "",
        "Conversations whose system prompt is `detailed thinking on` or `detailed thinking off`: with it on, the reply",
        "thinks between `<think>` and `</think>` before it answers; with it off, it answers. `samples.parquet` holds",
        "the conversations, `dropped.parquet` every row that a filter dropped with its reason, `train-*.safetensors`",
        "the packed tokens with their loss mask.",
    ]
    for key, heading in _HEADINGS.items():
        table = tables[key]
        lines += ["", f"## {heading}", ""]
        lines.append("| " + " | ".join(table.columns) + " |")
        lines.append("|" + " --- |" * len(table.columns))
        lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in table.rows]
    return "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|").replace("\n", " ")
