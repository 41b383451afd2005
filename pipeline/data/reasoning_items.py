"""Verifiable questions from reasoning-gym: distinct items, and exact scoring that no junk answer can profit from.

An item holds what reasoning-gym needs to make it again (task, config, seed, index); its scorer gets that entry.

What is measured, fine-tuned and reinforced on draws from parts of its own of all questions. Where sets are drawn one
behind the other and only leave out what is gone, an easy task has its rare questions left for the last: of 400 pairs of
numbers to 40, drawn third, 81% have the greatest common divisor 1, and 23% as the task draws them. A policy that is
reinforced on those learns to say 1.
"""

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Set
from typing import Any, Literal

import reasoning_gym
from reasoning_gym.factory import DATASETS

from pipeline.architecture import Frozen
from pipeline.errors import DataError
from pipeline.fingerprint import canonical_json
from pipeline.recipe import REFUSED_TASKS, ReasoningTask

# Entry i of a dataset is drawn from Random(seed + i): seeds nearer than a dataset is long share entries (2 and 10 share
# 42 of 50). 20,000 is the longest that every dataset allows.
DATASET_SIZE = 20_000
_MAX_GYM_SEED = 2**32 - DATASET_SIZE  # datasets that draw with numpy take no larger seeds

Part = Literal["evaluation", "fine_tuning", "reinforcement"]

# Of sixteen questions, by their sha1.
_PARTS: dict[Part, range] = {
    "evaluation": range(4),
    "reinforcement": range(4, 8),
    "fine_tuning": range(8, 16),
}


class ReasoningItem(Frozen):
    """One question with its answer; `seed` and `index` are reasoning-gym's own."""

    task: str
    config: dict[str, int | float | str | bool]
    seed: int
    index: int
    question: str
    answer: str


def generate_items(
    task: ReasoningTask, *, num_items: int, seed: int, exclude_questions: Set[str], part: Part | None = None
) -> list[ReasoningItem]:
    """Draw distinct items whose own answer scores 1.0, of one part of all questions, none in `exclude_questions`.

    Seeds less than 214,747 apart share no entry; beyond that they wrap, and some do. What keeps questions of one set
    out of another is its part, and within one `exclude_questions`: easy settings repeat themselves whatever the seed.

    Raises:
        DataError: when the task is unknown, its config is wrong, or it has fewer distinct questions.
    """
    gym_seed = seed * DATASET_SIZE % _MAX_GYM_SEED
    dataset = _dataset(task.name, canonical_json(task.config), gym_seed)
    items: list[ReasoningItem] = []
    seen: set[str] = set()
    for index in range(DATASET_SIZE):
        if len(items) == num_items:
            return items
        entry = dataset[index]
        question, answer = entry["question"], entry["answer"]
        if not isinstance(answer, str):
            raise DataError(f"reasoning task {task.name} has no single answer to compare with: choose another task")
        if question in exclude_questions or question in seen or not _is_of(question, part):
            continue
        item = ReasoningItem(
            task=task.name, config=task.config, seed=gym_seed, index=index, question=question, answer=answer
        )
        seen.add(question)
        if score_answer(item, answer) == 1.0:
            items.append(item)
    if len(items) < num_items:
        raise DataError(
            f"reasoning task {task.name} with {task.config} gave {len(items):,} new questions "
            f"{'' if part is None else f'for {part} '}in {DATASET_SIZE:,} "
            f"draws, wanted {num_items:,}: widen its config or ask for fewer items"
        )
    return items


def _is_of(question: str, part: Part | None) -> bool:
    if part is None:
        return True
    return int(hashlib.sha1(question.encode(), usedforsecurity=False).hexdigest()[0], 16) in _PARTS[part]


def ask_scorer(item: ReasoningItem, answer: str) -> float:
    """Return 1.0 when the task's own scorer gives exactly 1.0, else 0.0; partial credit is what junk answers live on.

    Whatever the scorer raises goes on to the caller.
    """
    dataset = _dataset(item.task, canonical_json(item.config), item.seed)
    return 1.0 if dataset.score_answer(answer.strip(), dataset[item.index]) == 1.0 else 0.0


def score_answer(item: ReasoningItem, answer: str, *, errors: Counter[str] | None = None) -> float:
    """Return what the task's scorer gives, as ask_scorer does.

    A scorer that raises (some do on anything but a number) scores 0.0; `errors` counts that by `task: exception`.
    """
    try:
        return ask_scorer(item, answer)
    except Exception as err:  # noqa: BLE001  a scorer is third-party code fed with whatever a model wrote
        if errors is not None:
            errors[f"{item.task}: {type(err).__name__}"] += 1
        return 0.0


def regenerate_entry(item: ReasoningItem) -> dict[str, Any]:
    """Return the reasoning-gym entry (question, answer, metadata) that the item was made from.

    Raises:
        DataError: when reasoning-gym now makes another question of it.
    """
    entry: dict[str, Any] = _dataset(item.task, canonical_json(item.config), item.seed)[item.index]
    if entry["question"] != item.question:
        raise DataError(
            f"{item.task} entry {item.index} of seed {item.seed} is now another question: the item was made by another "
            "version of reasoning-gym; generate the items again"
        )
    return entry


@functools.lru_cache(maxsize=512)
def _dataset(name: str, config_json: str, gym_seed: int) -> Any:
    if name not in DATASETS or name == "composite":
        known = sorted(set(DATASETS) - set(REFUSED_TASKS) - {"composite"})
        raise DataError(f"no reasoning task {name!r}; the tasks are {', '.join(known)}")
    config = json.loads(config_json)
    try:
        return reasoning_gym.create_dataset(name, size=DATASET_SIZE, seed=gym_seed, **config)
    except (TypeError, ValueError, AssertionError) as err:
        raise DataError(f"reasoning task {name} refuses the config {config}: {err}") from err
