"""Prompts of a plain request and verifiable instructions, drawn by a seed; each comes with an answer that follows them.

Requests of evaluation and of training are never the same: one in four, by its sha1, is only ever evaluated. The answer
is there to prove that the instructions can be followed together; it is never trained on.
Source: Llama-Nemotron, section 6.1 (prompts with one to ten verifiable instructions), which publishes none of them.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Set
from typing import Literal

from pipeline.architecture import Frozen
from pipeline.data.instruction_answers import (
    EXCLUDED,
    FIRST_PHRASES,
    INCLUDED,
    LAST_PHRASES,
    RARE_LETTERS,
    write_answer,
)
from pipeline.data.instructions import (
    AllLowercase,
    AllUppercase,
    EndsWith,
    ExcludeKeywords,
    IncludeKeywords,
    Instruction,
    JSONOnly,
    KeywordFrequency,
    LetterFrequency,
    NoCommas,
    NumBullets,
    NumParagraphs,
    NumSections,
    NumSentences,
    NumWords,
    Postscript,
    Quoted,
    Relation,
    StartsWith,
    Title,
    are_followed,
)
from pipeline.errors import DataError
from pipeline.recipe import InstructionKind, InstructionsConfig

_RELATIONS: tuple[Relation, ...] = ("at_least", "at_most", "exactly")
_DRAWS_PER_ITEM = 200

_FORMS = (
    "Write a short note about {}.",
    "Explain {} to a child.",
    "Explain {} to a new colleague.",
    "Describe {} to someone who has never heard of it.",
    "Write a letter to a friend about {}.",
    "Tell a short story about {}.",
    "Give some advice about {}.",
    "Write a poem about {}.",
    "Say what people most often get wrong about {}.",
    "Write an announcement about {} for a village newspaper.",
    "What speaks for and what against {}?",
    "Write a product description that has to do with {}.",
)
_TOPICS = (
    *("baking bread", "keeping bees", "learning to swim", "growing tomatoes", "riding a bicycle", "reading maps"),
    *("night trains", "public libraries", "lighthouses", "thunderstorms", "volcanoes", "coral reefs", "tides"),
    *("the moon", "snow", "deserts", "migrating birds", "octopuses", "wolves", "house cats", "old trees"),
    *("learning the piano", "singing in a choir", "painting a wall", "repairing shoes", "sewing a button"),
    *("moving to another town", "sharing a kitchen", "planning a wedding", "writing a diary", "lost keys"),
    *("saving money", "paying rent", "a first day at work", "long meetings", "working from home", "asking for help"),
    *("bridges", "windmills", "clocks", "glass", "paper", "salt", "tea", "cheese", "chocolate", "street markets"),
    *("football", "chess", "card games", "running in the rain", "camping", "sailing", "skiing", "sleeping well"),
    *("rain barrels", "compost", "electric cars", "bus timetables", "telescopes", "photographs", "dictionaries"),
)

# What makes no sense together, or where it would be open what counts: is "P.S." a sentence, a title a paragraph?
_CONFLICTS: dict[InstructionKind, frozenset[InstructionKind]] = {
    "all_lowercase": frozenset({"all_uppercase"}),
    "num_sentences": frozenset({"num_bullets", "num_sections", "title", "postscript"}),
    "num_paragraphs": frozenset({"num_bullets", "num_sections", "title", "postscript"}),
    "starts_with": frozenset({"num_bullets", "num_sections"}),
    "json_only": frozenset(
        {
            *("num_words", "num_sentences", "num_paragraphs", "keyword_frequency", "letter_frequency", "starts_with"),
            *("ends_with", "num_bullets", "quoted", "title", "num_sections", "postscript"),
        }
    ),
}


class InstructionItem(Frozen):
    """One prompt, what it asks for beside its request, and an answer that does all of it."""

    task: Literal["instructions"]
    question: str
    instructions: tuple[Instruction, ...]
    answer: str


def generate_instruction_items(
    config: InstructionsConfig, *, part: Literal["training", "evaluation"], seed: int, exclude_questions: Set[str]
) -> list[InstructionItem]:
    """Draw `config.num_prompts` distinct items of one to `max_instructions` instructions.

    Raises:
        DataError: when the kinds and sizes asked for give too few different questions.
    """
    generator = random.Random(f"instructions/{part}/{seed}")
    requests = _requests(generator, part=part)
    items: list[InstructionItem] = []
    seen: set[str] = set()
    for _ in range(_DRAWS_PER_ITEM * config.num_prompts):
        if len(items) == config.num_prompts:
            break
        request = next(requests)
        instructions = _draw_instructions(generator, config=config)
        answer = write_answer(instructions)
        question = " ".join([request, *(one.text() for one in instructions)])
        if not all(are_followed(instructions, answer)) or question in seen or question in exclude_questions:
            continue
        seen.add(question)
        items.append(InstructionItem(task="instructions", question=question, instructions=instructions, answer=answer))
    if len(items) < config.num_prompts:
        raise DataError(
            f"instructions of the kinds {config.kinds} with up to {config.max_words} words gave {len(items):,} "
            f"different questions in {_DRAWS_PER_ITEM * config.num_prompts:,} draws, wanted {config.num_prompts:,}: "
            "name more kinds, raise max_words, or ask for fewer prompts"
        )
    return items


def is_evaluated_request(request: str) -> bool:
    """Return whether a request is only ever evaluated, whatever the seed."""
    return hashlib.sha1(request.encode(), usedforsecurity=False).digest()[0] % 4 == 0


def _requests(generator: random.Random, *, part: Literal["training", "evaluation"]) -> Iterator[str]:
    """Yield every request of a part once before any comes again."""
    requests = [form.format(topic) for form in _FORMS for topic in _TOPICS]
    own = [request for request in requests if is_evaluated_request(request) == (part == "evaluation")]
    while True:
        yield from generator.sample(own, len(own))


def _draw_instructions(generator: random.Random, *, config: InstructionsConfig) -> tuple[Instruction, ...]:
    """Draw kinds that go together, each once; fewer than wanted where no further kind does."""
    wanted = generator.randint(1, config.max_instructions)
    chosen: list[InstructionKind] = []
    for kind in generator.sample(config.allowed_kinds, len(config.allowed_kinds)):
        if len(chosen) < wanted and not any(_in_conflict(kind, other) for other in chosen):
            chosen.append(kind)
    words = generator.sample(INCLUDED, 4)
    return tuple(_MAKERS[kind](generator, words, config.max_words) for kind in chosen)


def _in_conflict(first: InstructionKind, second: InstructionKind) -> bool:
    return second in _CONFLICTS.get(first, ()) or first in _CONFLICTS.get(second, ())


def _num_words(generator: random.Random, _: list[str], max_words: int) -> Instruction:
    relation = generator.choice(_RELATIONS)
    return NumWords(kind="num_words", relation=relation, count=generator.randint(min(5, max_words), max_words))


def _num_sentences(generator: random.Random, _: list[str], __: int) -> Instruction:
    return NumSentences(kind="num_sentences", relation=generator.choice(_RELATIONS), count=generator.randint(1, 5))


def _num_paragraphs(generator: random.Random, _: list[str], __: int) -> Instruction:
    return NumParagraphs(kind="num_paragraphs", relation=generator.choice(_RELATIONS), count=generator.randint(2, 4))


def _include_keywords(generator: random.Random, words: list[str], _: int) -> Instruction:
    return IncludeKeywords(kind="include_keywords", words=tuple(words[: generator.randint(1, 3)]))


def _keyword_frequency(generator: random.Random, words: list[str], _: int) -> Instruction:
    # The last of the words: include_keywords takes the first three at most.
    relation, count = generator.choice(_RELATIONS), generator.randint(1, 3)
    return KeywordFrequency(kind="keyword_frequency", word=words[-1], relation=relation, count=count)


def _exclude_keywords(generator: random.Random, _: list[str], __: int) -> Instruction:
    return ExcludeKeywords(kind="exclude_keywords", words=tuple(generator.sample(EXCLUDED, generator.randint(1, 3))))


def _letter_frequency(generator: random.Random, _: list[str], max_words: int) -> Instruction:
    if generator.random() < 0.5:
        letter, relation, count = generator.choice("aeinorst"), "at_least", generator.randint(2, max(2, max_words // 3))
    else:
        letter, relation, count = generator.choice(RARE_LETTERS), "at_most", generator.randint(0, 2)
    return LetterFrequency(kind="letter_frequency", letter=letter, relation=relation, count=count)


_MAKERS: dict[InstructionKind, Callable[[random.Random, list[str], int], Instruction]] = {
    "num_words": _num_words,
    "num_sentences": _num_sentences,
    "num_paragraphs": _num_paragraphs,
    "include_keywords": _include_keywords,
    "keyword_frequency": _keyword_frequency,
    "exclude_keywords": _exclude_keywords,
    "letter_frequency": _letter_frequency,
    "all_lowercase": lambda *_: AllLowercase(kind="all_lowercase"),
    "all_uppercase": lambda *_: AllUppercase(kind="all_uppercase"),
    "no_commas": lambda *_: NoCommas(kind="no_commas"),
    "starts_with": lambda generator, *_: StartsWith(kind="starts_with", phrase=generator.choice(FIRST_PHRASES)),
    "ends_with": lambda generator, *_: EndsWith(kind="ends_with", phrase=generator.choice(LAST_PHRASES)),
    "num_bullets": lambda generator, *_: NumBullets(kind="num_bullets", count=generator.randint(2, 5)),
    "json_only": lambda *_: JSONOnly(kind="json_only"),
    "quoted": lambda *_: Quoted(kind="quoted"),
    "title": lambda *_: Title(kind="title"),
    "num_sections": lambda generator, *_: NumSections(kind="num_sections", count=generator.randint(2, 4)),
    "postscript": lambda *_: Postscript(kind="postscript"),
}
