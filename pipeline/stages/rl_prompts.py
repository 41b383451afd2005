"""rl_prompts: verifiable questions and instructions that neither fine-tuning nor evaluation uses, answers checked."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from pipeline.artifacts import write_atomically
from pipeline.data.evaluation_sets import build_text_ngrams, load_evaluated_questions
from pipeline.data.instruction_items import InstructionItem, generate_instruction_items
from pipeline.data.instructions import are_followed
from pipeline.data.reasoning_items import generate_items, score_answer
from pipeline.reasoning.prompts import PROMPTS_FILE, RLItem, kind_of, prompts_text
from pipeline.stage import StageInputs, StageResult, Table
from pipeline.stages.configs import RLPromptsStage

_NUM_SHOWN = 12


def run(config: RLPromptsStage, inputs: StageInputs, out_dir: Path) -> StageResult:
    """Draw the prompts and write prompts.jsonl."""
    evaluated = load_evaluated_questions(inputs["evaluation_sets"])
    samples = pl.read_parquet(inputs["reasoning_toggle_dataset"] / "samples.parquet", columns=["question"])
    known = evaluated | set(samples["question"])
    num_known = len(known)
    measured = build_text_ngrams(inputs["evaluation_sets"], num_words=config.ngram_tokens)
    drawn: list[RLItem] = []
    for task in config.reasoning_tasks:
        of_task = generate_items(
            task,
            num_items=config.rl_prompts.items_per_task,
            seed=config.rl_prompts.seed,
            exclude_questions=known,
            part="reinforcement",
        )
        known.update(item.question for item in of_task)
        drawn += of_task
    drawn += generate_instruction_items(
        config.rl_prompts.instructions, part="training", seed=config.rl_prompts.seed, exclude_questions=known
    )
    items = [item for item in drawn if not measured.shares_ngram(item.question)]
    write_atomically(out_dir / PROMPTS_FILE, prompts_text(items).encode())
    answered = _answers_of_tasks([item for item in items if not isinstance(item, InstructionItem)])
    errors: Counter[str] = Counter()
    num_rejected = sum(not _accepts_its_answer(item, errors=errors) for item in items)
    return StageResult(
        metrics={
            "num_prompts": len(items),
            "num_instruction_prompts": sum(kind_of(item) == "instructions" for item in items),
            "num_tasks": len(config.reasoning_tasks),
            "num_excluded_questions": num_known,
            "num_contaminated_questions": len(drawn) - len(items),
            "max_answer_share": max((share for *_, share in answered), default=0.0),
            "num_rejected_reference_answers": num_rejected,
            "num_verifier_errors": errors.total(),
        },
        tables={
            "prompts_per_task": Table.of(("task", "num_prompts", "most frequent answer", "its share"), answered),
            "prompts": Table.of(
                ("task", "question", "answer"),
                [
                    (item.task, item.question.strip(), item.answer)
                    for item in items[:: max(1, len(items) // _NUM_SHOWN)]
                ],
            ),
        },
    )


def _answers_of_tasks(items: Sequence[RLItem]) -> list[tuple[str, int, str, float]]:
    """Return how many prompts each task has, and which answer is worth saying always: a policy finds it out."""
    answers: dict[str, Counter[str]] = {}
    for item in items:
        answers.setdefault(item.task, Counter())[item.answer] += 1
    found = ((task, counts.total(), *counts.most_common(1)[0]) for task, counts in answers.items())
    return [(task, num_prompts, answer, count / num_prompts) for task, num_prompts, answer, count in found]


def _accepts_its_answer(item: RLItem, *, errors: Counter[str]) -> bool:
    if isinstance(item, InstructionItem):
        return all(are_followed(item.instructions, item.answer))
    return score_answer(item, item.answer, errors=errors) == 1.0
