"""Verifiable items: distinct, repeatable, and scored so that junk earns nothing."""

import inspect
import re
from collections import Counter
from typing import Any

import pytest
import yaml
from reasoning_gym.factory import DATASETS

from pipeline.data.reasoning_items import Part, ReasoningItem, generate_items, regenerate_entry, score_answer
from pipeline.errors import DataError, RecipeError
from pipeline.recipe import REFUSED_TASKS, ReasoningTask
from pipeline.recipe_file import RECIPES_DIR, parse_recipe

CHAIN_SUM = ReasoningTask(name="chain_sum", config={"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2})
JUNK = ["", " ", "nan", "-1e999", "1e999", "True", "yes", "I do not know", "0 0 0", "[]", "{}", "None", "9" * 5000]


def test_items_are_distinct_right_and_repeatable():
    items = generate_items(CHAIN_SUM, num_items=50, seed=3, exclude_questions=set())
    assert len({item.question for item in items}) == 50
    assert all(score_answer(item, f" {item.answer}\n") == 1.0 for item in items)
    assert items == generate_items(CHAIN_SUM, num_items=50, seed=3, exclude_questions=set())
    assert items[7] == ReasoningItem.model_validate_json(items[7].model_dump_json())
    assert regenerate_entry(items[7])["answer"] == items[7].answer


def test_items_of_near_seeds_share_no_entry():
    """Seeds 2 and 10, taken as they are, would share 42 of 50 entries."""
    first, second = (generate_items(CHAIN_SUM, num_items=50, seed=seed, exclude_questions=set()) for seed in (2, 10))
    spans = [{item.seed + item.index for item in items} for items in (first, second)]
    assert not spans[0] & spans[1]


def test_items_leave_out_excluded_questions():
    known = {item.question for item in generate_items(CHAIN_SUM, num_items=20, seed=1, exclude_questions=set())}
    assert known.isdisjoint(
        item.question for item in generate_items(CHAIN_SUM, num_items=20, seed=1, exclude_questions=known)
    )


def test_parts_share_no_question_and_are_alike():
    """Drawn third without parts, 81% of these answers are 1; as the task draws them, a quarter."""
    task = ReasoningTask(name="gcd", config={"max_value": 40})
    known: set[str] = set()
    shares = {}
    sizes: dict[Part, int] = {"evaluation": 40, "fine_tuning": 400, "reinforcement": 200}
    for part, num_items in sizes.items():
        items = generate_items(task, num_items=num_items, seed=4, exclude_questions=set(), part=part)
        assert known.isdisjoint(item.question for item in items)
        known |= {item.question for item in items}
        shares[part] = sum(item.answer == "1" for item in items) / num_items
    assert all(0.1 < share < 0.5 for share in shares.values()), shares


def test_part_that_a_task_does_not_fill_is_an_error():
    task = ReasoningTask(name="count_bits", config={"min_n": 1, "max_n": 7})
    with pytest.raises(DataError, match=r"new questions for evaluation in 20,000 draws, wanted 7"):
        generate_items(task, num_items=7, seed=1, exclude_questions=set(), part="evaluation")


def test_items_beyond_what_a_config_holds_are_an_error():
    task = ReasoningTask(name="count_bits", config={"min_n": 1, "max_n": 7})
    with pytest.raises(DataError, match=r"gave 7 new questions in 20,000 draws, wanted 8"):
        generate_items(task, num_items=8, seed=1, exclude_questions=set())


@pytest.mark.parametrize(
    ("name", "config", "match"),
    [
        ("chain_sums", {}, "no reasoning task 'chain_sums'; the tasks are .*chain_sum,"),
        ("chain_sum", {"terms": 3}, "refuses the config"),
        ("chain_sum", {"min_terms": 5, "max_terms": 2}, "refuses the config"),
    ],
)
def test_task_that_cannot_be_used_is_refused(name: str, config: dict[str, int | float | str | bool], match: str):
    with pytest.raises(DataError, match=match):
        generate_items(ReasoningTask(name=name, config=config), num_items=1, seed=1, exclude_questions=set())


@pytest.mark.parametrize("key", ["reasoning_tasks", "held_out_tasks"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("game_of_life_halting", "its scorer gives 1.0 to any text; take game_of_life"),
        ("complex_arithmetic", "its scorer gives 1.0 to 'nan'; take decimal_arithmetic"),
        ("propositional_logic", "its scorer pays for .*; take knights_knaves"),
        ("countdown", "its scorer evaluates the answer as code, .* never ends; take basic_arithmetic"),
        ("n_queens", "its scorer evaluates the answer as code, .* never ends; take mini_sudoku"),
        ("coin_flip", "never ends; take dice"),
        ("rubiks_cube", "as often as the answer R999999999 says; take color_cube_rotation"),
        ("rush_hour", r"as far as the answer A\+999999999 says; take tower_of_hanoi"),
    ],
)
def test_recipe_with_a_task_that_cannot_be_judged_says_why_and_names_another(key: str, name: str, message: str):
    recipe: dict[str, Any] = yaml.safe_load((RECIPES_DIR / "tiny.yaml").read_text(encoding="utf-8"))
    section = recipe if key == "reasoning_tasks" else recipe["evaluation_sets"]
    section[key].append({"name": name, "config": {}})
    with pytest.raises(RecipeError, match=rf"{key}\.2\.name: .*reasoning task {name} is refused: .*{message}"):
        parse_recipe(recipe, origin="test")


def test_every_task_whose_scorer_evaluates_the_answer_is_refused():
    """So that a new version of reasoning-gym adds none unseen."""
    scorers = {name: inspect.getsource(dataset.score_answer) for name, (dataset, _) in DATASETS.items()}
    evaluating = {name for name, text in scorers.items() if re.search(r"(eval|parse_expr|Fraction)\(answer", text)}
    assert "countdown" in evaluating
    assert evaluating <= set(REFUSED_TASKS)


@pytest.mark.parametrize("name", sorted({refused.instead for refused in REFUSED_TASKS.values()}))
def test_task_named_instead_of_a_refused_one_can_be_used(name: str):
    (item,) = generate_items(ReasoningTask(name=name, config={}), num_items=1, seed=1, exclude_questions=set())
    assert all(score_answer(item, junk) == 0.0 for junk in [*JUNK, "9**9**9", "1e999999999", "A+999999999"])


@pytest.mark.parametrize("name", ["chain_sum", "gcd", "prime_factorization", "leg_counting", "ransom_note"])
def test_junk_answers_earn_nothing(name: str):
    items = generate_items(ReasoningTask(name=name, config={}), num_items=5, seed=1, exclude_questions=set())
    for item in items:
        assert all(score_answer(item, junk) == 0.0 for junk in JUNK if junk != item.answer)


def test_scorer_that_raises_scores_zero_and_is_counted():
    (item,) = generate_items(
        ReasoningTask(name="prime_factorization", config={}), num_items=1, seed=1, exclude_questions=set()
    )
    errors: Counter[str] = Counter()
    assert score_answer(item, "not a number", errors=errors) == 0.0
    assert errors == {"prime_factorization: ValueError": 1}


def test_partial_credit_counts_as_wrong():
    (item,) = generate_items(CHAIN_SUM, num_items=1, seed=1, exclude_questions=set())
    assert score_answer(item, f"the answer is {item.answer}, or {item.answer}1") == 0.0
