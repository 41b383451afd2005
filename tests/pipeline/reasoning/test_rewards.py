"""Rewards: form and accuracy of replies, and what a cut-off reply or a failing verifier earns."""

import pytest

from pipeline.data.reasoning_items import ReasoningItem, generate_items
from pipeline.reasoning.rewards import judge
from pipeline.recipe import ReasoningTask


@pytest.fixture(scope="module")
def item() -> ReasoningItem:
    task = ReasoningTask(name="chain_sum", config={"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2})
    return generate_items(task, num_items=1, seed=1, exclude_questions=set())[0]


@pytest.mark.parametrize(
    ("thinking", "template", "is_right", "is_well_formed"),
    [
        (True, "<think>\nsteps\n</think>\n\n{answer}", True, True),
        (True, "{answer}", True, False),
        (True, "<think>\nsteps\n</think>\n\n", False, False),
        (True, "<think>\nsteps {answer}", False, False),
        (True, "So: <think>steps</think>{answer}", True, False),
        (True, "<think>a</think><think>b</think>{answer}", True, False),
        (True, "<think>{answer}</think>99999", False, True),
        (False, "{answer}", True, True),
        (False, "99999", False, True),
        (False, "<think>\nsteps\n</think>\n\n{answer}", True, False),
        (False, "", False, False),
    ],
)
def test_judge_replies_earn_accuracy_and_form_apart(
    item: ReasoningItem, thinking: bool, template: str, is_right: bool, is_well_formed: bool
):
    verdict = judge(template.format(answer=item.answer), item=item, thinking=thinking, is_terminated=True)
    assert (verdict.is_right, verdict.is_well_formed) == (is_right, is_well_formed)
    assert verdict.reward(accuracy_reward=1.0, format_reward=0.25) == is_right + 0.25 * is_well_formed
    assert not verdict.has_verifier_failed


def test_judge_cut_off_reply_earns_nothing(item: ReasoningItem):
    verdict = judge(item.answer, item=item, thinking=False, is_terminated=False)
    assert verdict.reward(accuracy_reward=1.0, format_reward=1.0) == 0.0


def test_judge_verifier_error_is_counted_apart_from_wrong():
    task = ReasoningTask(name="prime_factorization", config={"max_value": 100})
    item = generate_items(task, num_items=1, seed=1, exclude_questions=set())[0]
    broken = judge("no number", item=item, thinking=False, is_terminated=True)
    wrong = judge("2 × 2 × 2 × 2 × 2 × 2 × 2", item=item, thinking=False, is_terminated=True)  # noqa: RUF001
    assert (broken.is_right, broken.has_verifier_failed) == (False, True)
    assert (wrong.is_right, wrong.has_verifier_failed) == (False, False)
