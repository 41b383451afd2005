"""The `evaluation_sets` artifact: what is measured, as plain text, and its n-grams that no training text may share.

held_out/<source>.parquet        documents that no training sees
multiple_choice/<name>.jsonl     prompt, choices, gold
search_task.jsonl                the same, for the search to choose children by; evaluation asks other items
reasoning.jsonl                  verifiable items of the tasks that are trained on
held_out_tasks.jsonl             verifiable items of families and difficulties that nothing trains on
instructions.jsonl               requests with verifiable instructions that nothing trains on
ngrams.parquet                   hashed word n-grams of all of it
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import BaseModel

from pipeline.data.benchmarks import MultipleChoiceItem
from pipeline.data.decontamination import NgramSet, build_ngrams, read_ngrams, save_ngrams
from pipeline.data.documents import Document, read_documents, write_documents
from pipeline.data.instruction_items import InstructionItem
from pipeline.data.reasoning_items import ReasoningItem

_HELD_OUT = "held_out"
_MULTIPLE_CHOICE = "multiple_choice"
_SEARCH_TASK = "search_task.jsonl"
_REASONING = "reasoning.jsonl"
_HELD_OUT_TASKS = "held_out_tasks.jsonl"
_INSTRUCTIONS = "instructions.jsonl"
_NGRAMS = "ngrams.parquet"


def save_held_out(directory: Path, source: str, documents: Sequence[Document]) -> None:
    """Write the held-out documents of one source."""
    write_documents(directory / _HELD_OUT / f"{source}.parquet", documents)


def load_held_out(directory: Path) -> dict[str, list[str]]:
    """Return held-out texts by source."""
    return {source: [item.text for item in items] for source, items in _held_out(directory).items()}


def load_held_out_ids(directory: Path) -> set[str]:
    """Return the ids of all held-out documents."""
    return {item.document_id for items in _held_out(directory).values() for item in items}


def save_multiple_choice(directory: Path, name: str, items: Sequence[MultipleChoiceItem]) -> None:
    """Write the items of one multiple-choice set."""
    _write_lines(directory / _MULTIPLE_CHOICE / f"{name}.jsonl", items)


def load_multiple_choice(directory: Path) -> dict[str, list[MultipleChoiceItem]]:
    """Return multiple-choice items by set."""
    return {
        path.stem: [MultipleChoiceItem.model_validate_json(line) for line in _read_lines(path)]
        for path in sorted((directory / _MULTIPLE_CHOICE).glob("*.jsonl"))
    }


def save_search_task(directory: Path, items: Sequence[MultipleChoiceItem]) -> None:
    """Write the items that the search may choose children by."""
    _write_lines(directory / _SEARCH_TASK, items)


def load_search_task(directory: Path) -> list[MultipleChoiceItem]:
    """Return the items that the search may choose children by."""
    return [MultipleChoiceItem.model_validate_json(line) for line in _read_lines(directory / _SEARCH_TASK)]


def save_reasoning_items(directory: Path, items: Sequence[ReasoningItem]) -> None:
    """Write the verifiable items of all tasks."""
    _write_lines(directory / _REASONING, items)


def load_reasoning_items(directory: Path) -> list[ReasoningItem]:
    """Return the verifiable items of all tasks, in the recipe's order."""
    return [ReasoningItem.model_validate_json(line) for line in _read_lines(directory / _REASONING)]


def save_held_out_items(directory: Path, items: Sequence[ReasoningItem]) -> None:
    """Write the verifiable items of tasks that nothing trains on."""
    _write_lines(directory / _HELD_OUT_TASKS, items)


def load_held_out_items(directory: Path) -> list[ReasoningItem]:
    """Return the verifiable items of tasks that nothing trains on, in the recipe's order."""
    return [ReasoningItem.model_validate_json(line) for line in _read_lines(directory / _HELD_OUT_TASKS)]


def save_instruction_items(directory: Path, items: Sequence[InstructionItem]) -> None:
    """Write the requests with verifiable instructions."""
    _write_lines(directory / _INSTRUCTIONS, items)


def load_instruction_items(directory: Path) -> list[InstructionItem]:
    """Return the requests with verifiable instructions; there may be none."""
    return [InstructionItem.model_validate_json(line) for line in _read_lines(directory / _INSTRUCTIONS)]


def load_evaluated_questions(directory: Path) -> set[str]:
    """Return every verifiable question that is measured, of whatever task."""
    tasks = [*load_reasoning_items(directory), *load_held_out_items(directory)]
    return {item.question for item in [*tasks, *load_instruction_items(directory)]}


def save_evaluation_ngrams(directory: Path, ngrams: NgramSet) -> None:
    """Write the n-grams of everything that is measured."""
    save_ngrams(directory / _NGRAMS, ngrams)


def load_evaluation_ngrams(directory: Path) -> NgramSet:
    """Return the n-grams of everything that is measured."""
    return read_ngrams(directory / _NGRAMS)


def build_text_ngrams(directory: Path, *, num_words: int) -> NgramSet:
    """Return the n-grams of held-out text and multiple-choice prompts alone.

    Questions of one reasoning task share their wording by construction; those are told apart as whole questions.
    """
    texts = [text for documents in load_held_out(directory).values() for text in documents]
    prompts = [item.prompt for items in load_multiple_choice(directory).values() for item in items]
    return build_ngrams([*texts, *prompts], num_words=num_words)


def _held_out(directory: Path) -> dict[str, list[Document]]:
    return {path.stem: read_documents(path) for path in sorted((directory / _HELD_OUT).glob("*.parquet"))}


def _write_lines(path: Path, items: Iterable[BaseModel]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(item.model_dump_json() + "\n" for item in items), encoding="utf-8")


def _read_lines(path: Path) -> list[str]:
    # Not str.splitlines: JSON may hold U+2028, which it would split at.
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n") if path.stat().st_size else []
