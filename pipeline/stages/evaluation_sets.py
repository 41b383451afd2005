"""evaluation_sets: held-out text, multiple-choice items and verifiable tasks, and the n-grams that protect them."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.data.benchmarks import Question, draw_further_questions, draw_questions, get_benchmark, read_questions
from pipeline.data.decontamination import build_ngrams
from pipeline.data.documents import Document, load_documents, load_source_records
from pipeline.data.evaluation_sets import (
    save_evaluation_ngrams,
    save_held_out,
    save_held_out_items,
    save_instruction_items,
    save_multiple_choice,
    save_reasoning_items,
    save_search_task,
)
from pipeline.data.instruction_items import generate_instruction_items
from pipeline.data.reasoning_items import Part, ReasoningItem, generate_items
from pipeline.errors import DataError
from pipeline.recipe import EvaluationSetsConfig, HeldOutText, MultipleChoiceSet, ReasoningTask
from pipeline.stage import StageInputs, StageResult, Table
from pipeline.stages.configs import EvaluationSetsStage

# Added to the recipe's seed, so that no seed a person writes for training draws the same reasoning items.
EVALUATION_SEED = 10**9


def run(config: EvaluationSetsStage, inputs: StageInputs, out_dir: Path) -> StageResult:
    """Choose what is measured, write it, and hash its n-grams."""
    sets = config.evaluation_sets
    records = load_source_records(inputs["corpora"])
    texts: list[str] = []
    rows: list[tuple[str, str, int, str]] = []
    for held_out in sets.held_out:
        documents = _held_out_documents(held_out, corpora=inputs["corpora"])
        save_held_out(out_dir, held_out.source, documents)
        texts += [document.text for document in documents]
        rows.append(("held-out text", held_out.source, len(documents), records[held_out.source].licence))
    for choice in sets.multiple_choice:
        benchmark = get_benchmark(choice.name)
        questions = draw_questions(
            read_questions(benchmark, downloads=inputs.downloads),
            num_items=choice.num_items,
            seed=sets.seed,
            name=choice.name,
        )
        save_multiple_choice(out_dir, choice.name, [benchmark.item(question) for question in questions])
        texts += _question_texts(questions)
        rows.append(("multiple choice", choice.name, len(questions), benchmark.licence))
    if config.search_task is not None:
        searched = _search_questions(config.search_task, sets=sets, downloads=inputs.downloads)
        benchmark = get_benchmark(config.search_task.name)
        save_search_task(out_dir, [benchmark.item(question) for question in searched])
        texts += _question_texts(searched)
        rows.append(("search task", benchmark.name, len(searched), benchmark.licence))
    items = _reasoning_items(
        config.reasoning_tasks,
        num_items=sets.reasoning_items_per_task,
        seed=EVALUATION_SEED + sets.seed,
        known=set(),
        part="evaluation",
    )
    save_reasoning_items(out_dir, items)
    held_out_items = _reasoning_items(
        sets.held_out_tasks,
        num_items=sets.reasoning_items_per_task,
        seed=EVALUATION_SEED + sets.seed,
        known={item.question for item in items},
        part=None,  # nothing trains on these tasks, so all their questions are free
    )
    save_held_out_items(out_dir, held_out_items)
    instruction_items = generate_instruction_items(
        sets.instructions, part="evaluation", seed=sets.seed, exclude_questions=set()
    )
    save_instruction_items(out_dir, instruction_items)
    texts += [item.question for item in [*items, *held_out_items, *instruction_items]]
    for task in config.reasoning_tasks:
        rows.append(("reasoning", task.name, sets.reasoning_items_per_task, "Apache-2.0 (reasoning-gym)"))
    for task in sets.held_out_tasks:
        rows.append(
            ("reasoning, not trained on", task.name, sets.reasoning_items_per_task, "Apache-2.0 (reasoning-gym)")
        )
    if instruction_items:
        rows.append(
            (
                "instructions",
                f"{len(sets.instructions.allowed_kinds)} kinds",
                len(instruction_items),
                "Apache-2.0 (our own)",
            )
        )
    ngrams = build_ngrams(texts, num_words=sets.ngram_tokens)
    save_evaluation_ngrams(out_dir, ngrams)
    return StageResult(
        metrics={
            "num_held_out_documents": sum(row[2] for row in rows if row[0] == "held-out text"),
            "num_multiple_choice_items": sum(row[2] for row in rows if row[0] == "multiple choice"),
            "num_reasoning_items": len(items),
            "num_held_out_task_items": len(held_out_items),
            "num_instruction_items": len(instruction_items),
            "num_ngrams": len(ngrams),
        },
        tables={"sets": Table.of(("kind", "name", "num_items", "licence"), rows)},
    )


def _held_out_documents(held_out: HeldOutText, *, corpora: Path) -> list[Document]:
    documents = load_documents(corpora, held_out.source)
    if held_out.num_documents > len(documents):
        raise DataError(
            f"evaluation_sets.held_out wants {held_out.num_documents:,} documents of {held_out.source}, corpora holds "
            f"{len(documents):,}: hold fewer out, or raise the source's max_documents"
        )
    return documents[: held_out.num_documents]


def _search_questions(task: MultipleChoiceSet, *, sets: EvaluationSetsConfig, downloads: Path) -> list[Question]:
    """Return items that evaluation does not ask."""
    return draw_further_questions(
        read_questions(get_benchmark(task.name), downloads=downloads),
        num_items=task.num_items,
        num_drawn=sum(choice.num_items for choice in sets.multiple_choice if choice.name == task.name),
        seed=sets.seed,
        name=task.name,
    )


def _question_texts(questions: Sequence[Question]) -> list[str]:
    return [text for question in questions for text in question.texts()]


def _reasoning_items(
    tasks: Sequence[ReasoningTask], *, num_items: int, seed: int, known: set[str], part: Part | None
) -> list[ReasoningItem]:
    items: list[ReasoningItem] = []
    for task in tasks:
        asked = known | {item.question for item in items}
        items += generate_items(task, num_items=num_items, seed=seed, exclude_questions=asked, part=part)
    return items
