"""Instruction items: drawn by a seed, distinct, followable together, and never the same request in both parts."""

from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.instruction_items import InstructionItem, generate_instruction_items, is_evaluated_request
from pipeline.data.instructions import are_followed
from pipeline.errors import DataError
from pipeline.recipe import InstructionsConfig


def _config(**changes: object) -> InstructionsConfig:
    values: dict[str, object] = {"num_prompts": 60, "kinds": "all", "max_instructions": 4, "max_words": 40}
    return InstructionsConfig.model_validate(values | changes)


def _draw(
    part: Literal["training", "evaluation"], *, seed: int = 1, exclude: frozenset[str] = frozenset(), **changes: object
) -> list[InstructionItem]:
    return generate_instruction_items(_config(**changes), part=part, seed=seed, exclude_questions=exclude)


def _request(item: InstructionItem) -> str:
    """The question without the words of its instructions."""
    text = item.question
    for instruction in reversed(item.instructions):
        assert text.endswith(" " + instruction.text())
        text = text.removesuffix(" " + instruction.text())
    return text


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 10), st.integers(6, 120))
def test_generate_every_item_says_what_it_asks_and_can_be_followed(seed: int, max_instructions: int, max_words: int):
    items = _draw("training", seed=seed, max_instructions=max_instructions, max_words=max_words)
    assert len({item.question for item in items}) == len(items) == 60
    for item in items:
        assert 1 <= len(item.instructions) <= max_instructions
        assert len({one.kind for one in item.instructions}) == len(item.instructions)
        assert all(are_followed(item.instructions, item.answer)), item
        assert _request(item)[-1] in ".?"


def test_generate_same_seed_same_items_other_seed_others():
    assert _draw("training") == _draw("training")
    assert not {item.question for item in _draw("training")} & {item.question for item in _draw("training", seed=2)}


def test_generate_parts_never_share_a_request():
    training = {_request(item) for seed in range(8) for item in _draw("training", seed=seed, num_prompts=200)}
    evaluation = {_request(item) for seed in range(8) for item in _draw("evaluation", seed=seed, num_prompts=200)}
    assert min(len(training), len(evaluation)) > 100
    assert not training & evaluation
    assert all(map(is_evaluated_request, evaluation))


def test_generate_what_is_known_is_left_out():
    first = frozenset(item.question for item in _draw("training"))
    assert not first & {item.question for item in _draw("training", exclude=first)}


def test_generate_only_the_kinds_asked_for():
    items = _draw("training", kinds=("no_commas", "all_lowercase"), max_instructions=3)
    assert {one.kind for item in items for one in item.instructions} == {"no_commas", "all_lowercase"}


def test_generate_too_few_different_questions_is_an_error():
    with pytest.raises(DataError, match=r"instructions of the kinds \('no_commas',\).*wanted 2,000: name more kinds"):
        _draw("training", kinds=("no_commas",), num_prompts=2000)


def test_generate_none_is_none():
    assert _draw("evaluation", num_prompts=0) == []
