"""The `rl_prompts` artifact: prompts.jsonl, one reasoning item per line."""

from collections.abc import Iterable
from pathlib import Path

from pipeline.data.reasoning_items import ReasoningItem
from pipeline.errors import DataError

PROMPTS_FILE = "prompts.jsonl"


def prompts_text(items: Iterable[ReasoningItem]) -> str:
    """Return items as JSON lines."""
    return "".join(item.model_dump_json() + "\n" for item in items)


def load_prompts(directory: Path) -> list[ReasoningItem]:
    """Return the items of an rl_prompts artifact.

    Raises:
        DataError: when there are none.
    """
    with (directory / PROMPTS_FILE).open(encoding="utf-8", newline="\n") as file:
        items = [ReasoningItem.model_validate_json(line) for line in file]
    if not items:
        raise DataError(f"{directory / PROMPTS_FILE} holds no prompts: raise rl_prompts.items_per_task")
    return items
