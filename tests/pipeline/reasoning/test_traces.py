"""Solvers: every trace verifies, every statement in it is true, and the answer comes from the steps."""

import re

import pytest

from pipeline.data.reasoning_items import ReasoningItem, generate_items
from pipeline.errors import RecipeError
from pipeline.reasoning.solvers import arithmetic, lists, words
from pipeline.reasoning.traces import SOLVERS, verifies, write_trace
from pipeline.recipe import TRACED_TASKS, ReasoningTask

CONFIGS = {
    "chain_sum": {"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 3, "allow_negation": True},
    "products": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2, "allow_negation": True},
    "gcd": {"max_numbers": 3, "max_value": 90},
    "lcm": {"max_numbers": 3, "max_value": 20},
    "leg_counting": {"min_animals": 2, "max_animals": 4},
    "letter_counting": {"min_words": 2, "max_words": 5},
    "spell_backward": {"min_word_len": 3, "max_word_len": 7},
    "word_sequence_reversal": {"min_words": 3, "max_words": 5},
    "word_sorting": {"min_words": 3, "max_words": 5},
    "number_filtering": {"min_numbers": 3, "max_numbers": 6},
    "number_sorting": {"min_numbers": 3, "max_numbers": 5},
    "count_bits": {"max_n": 5000},
    "prime_factorization": {"max_value": 2000},
    "simple_equations": {"max_terms": 4, "max_value": 30},
}
_EQUATION = re.compile(r"(-?\d+) ([*/+-]) (-?\d+) = (-?\d+)(?=[. ]|$)")


def _items(task: str, *, num_items: int) -> list[ReasoningItem]:
    return generate_items(
        ReasoningTask(name=task, config=CONFIGS[task]), num_items=num_items, seed=7, exclude_questions=set()
    )


def test_solvers_all_tasks_have_a_test_config():
    assert set(CONFIGS) == set(SOLVERS)


@pytest.mark.parametrize("task", sorted(SOLVERS))
def test_write_trace_generated_items_verify(task: str):
    items = _items(task, num_items=60)
    traces = [write_trace(item) for item in items]

    assert all(trace is not None and verifies(trace, item) for trace, item in zip(traces, items, strict=True))


@pytest.mark.parametrize("task", ["chain_sum", "products", "gcd", "lcm", "leg_counting", "count_bits"])
def test_write_trace_arithmetic_every_statement_is_true(task: str):
    compute = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}
    for item in _items(task, num_items=60):
        trace = write_trace(item)
        assert trace is not None
        statements = _EQUATION.findall(trace.text)
        assert statements
        for left, operator, right, result in statements:
            assert compute[operator](int(left), int(right)) == int(result), trace.text


def test_write_trace_wrong_answer_does_not_verify():
    item, other = _items("chain_sum", num_items=2)
    trace = write_trace(other)
    assert trace is not None
    assert trace.answer != item.answer
    assert not verifies(trace, item)


def test_recipes_may_train_on_every_task_that_has_a_solver_and_on_no_other():
    assert frozenset(SOLVERS) == TRACED_TASKS


def test_write_trace_task_without_solver_is_an_error():
    item = ReasoningItem(task="sudoku", config={}, seed=0, index=0, question="?", answer="!")
    with pytest.raises(RecipeError, match=r"sudoku has no solver.*gcd"):
        write_trace(item)


def test_chain_sum_two_digits_go_in_place_by_place():
    assert arithmetic.chain_sum({"expression": "47 - 28"}).text == "47 - 20 = 27. 27 - 8 = 19."
    assert arithmetic.chain_sum({"expression": "5 - -13"}).text == "5 + 10 = 15. 15 + 3 = 18."


def test_gcd_shows_product_and_subtraction():
    trace = arithmetic.gcd({"numbers": [12, 33]})
    assert trace.text == "12 * 2 = 24. 33 - 24 = 9. 12 - 9 = 3. 3 * 3 = 9. 9 - 9 = 0. The GCD is 3."


def test_letter_counting_spells_and_numbers_hits():
    trace = words.letter_counting({"target_letter": "a", "span": ["Banana", "at"]})
    assert trace.text == "Banana: b a1 n a2 n a3. at: a4 t. Total 4."
    assert trace.answer == "4"


@pytest.mark.parametrize(
    ("equation", "answer"),
    [("72*b = 360", "5"), ("5 - 8*e = -51", "7"), ("x + 4 = 9", "5"), ("3*x - 4 = 8", "4"), ("-x = -3", "3")],
)
def test_simple_equations_forms_are_solved(equation: str, answer: str):
    trace = arithmetic.simple_equations({"equation": equation})
    assert trace is not None
    assert trace.answer == answer


def test_simple_equations_outside_its_form_is_left_out():
    assert arithmetic.simple_equations({"equation": "x**2 = 4"}) is None
    assert arithmetic.simple_equations({"equation": "2*x = 5"}) is None


@pytest.mark.parametrize(
    ("operation", "kept"),
    [
        ("keep_larger", "['7']"),
        ("keep_smaller", "['1']"),
        ("remove_larger", "['1', '4']"),
        ("remove_smaller", "['4', '7']"),
    ],
)
def test_number_filtering_equal_numbers_are_neither(operation: str, kept: str):
    metadata = {"filter_value": "4", "operation": operation, "original_numbers": ["1", "4", "7"]}
    assert lists.number_filtering(metadata).answer == kept
