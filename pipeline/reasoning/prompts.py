"""The `rl_prompts` artifact: prompts.jsonl, one item per line, of a reasoning task or with instructions."""

from collections.abc import Iterable
from pathlib import Path

from pydantic import TypeAdapter

from pipeline.data.instruction_items import InstructionItem
from pipeline.data.reasoning_items import ReasoningItem
from pipeline.errors import DataError

PROMPTS_FILE = "prompts.jsonl"

RLItem = ReasoningItem | InstructionItem
_ITEM: TypeAdapter[RLItem] = TypeAdapter(RLItem)


def kind_of(item: RLItem) -> str:
    """Return `instructions` or `tasks`: rewards are told apart by it."""
    return "instructions" if isinstance(item, InstructionItem) else "tasks"


def prompts_text(items: Iterable[RLItem]) -> str:
    """Return items as JSON lines."""
    return "".join(item.model_dump_json() + "\n" for item in items)


def load_prompts(directory: Path) -> list[RLItem]:
    """Return the items of an rl_prompts artifact.

    Raises:
        DataError: when there are none.
    """
    with (directory / PROMPTS_FILE).open(encoding="utf-8", newline="\n") as file:
        items = [_ITEM.validate_json(line) for line in file]
    if not items:
        raise DataError(f"{directory / PROMPTS_FILE} holds no prompts: raise rl_prompts.items_per_task")
    return items
