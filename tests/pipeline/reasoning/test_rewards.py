"""Rewards: form and accuracy of replies, and what a cut-off reply or a failing verifier earns."""

import pytest

from pipeline.data.instruction_items import InstructionItem
from pipeline.data.instructions import AllLowercase, NoCommas
from pipeline.data.reasoning_items import ReasoningItem, generate_items
from pipeline.reasoning.prompts import RLItem
from pipeline.reasoning.rewards import Verdict, judge
from pipeline.recipe import ReasoningTask


def _judge(text: str, *, item: RLItem, thinking: bool = False, is_terminated: bool = True) -> Verdict:
    return judge(text, item=item, thinking=thinking, is_terminated=is_terminated, instruction_reward="share")


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
def test_judge_replies_earn_in_the_form_of_their_mode_alone(
    item: ReasoningItem, thinking: bool, template: str, is_right: bool, is_well_formed: bool
):
    verdict = _judge(template.format(answer=item.answer), item=item, thinking=thinking)
    assert (verdict.is_right, verdict.is_well_formed) == (is_right, is_well_formed)
    assert verdict.reward(accuracy_reward=1.0, format_reward=0.25) == (is_right + 0.25) * is_well_formed
    assert not verdict.has_verifier_failed


def test_judge_cut_off_reply_earns_nothing(item: ReasoningItem):
    verdict = _judge(item.answer, item=item, is_terminated=False)
    assert verdict.reward(accuracy_reward=1.0, format_reward=1.0) == 0.0


def test_judge_verifier_error_is_counted_apart_from_wrong():
    task = ReasoningTask(name="prime_factorization", config={"max_value": 100})
    item = generate_items(task, num_items=1, seed=1, exclude_questions=set())[0]
    broken = _judge("no number", item=item)
    wrong = _judge("2 × 2 × 2 × 2 × 2 × 2 × 2", item=item)  # noqa: RUF001
    assert (broken.is_right, broken.has_verifier_failed) == (False, True)
    assert (wrong.is_right, wrong.has_verifier_failed) == (False, False)


INSTRUCTED = InstructionItem(
    task="instructions",
    question="Describe snow. Do not use any commas. Write in lowercase letters only.",
    instructions=(NoCommas(kind="no_commas"), AllLowercase(kind="all_lowercase")),
    answer="snow is cold.",
)


@pytest.mark.parametrize(
    ("thinking", "text", "share", "is_well_formed"),
    [
        (False, "snow is cold", 1.0, True),
        (False, "Snow is cold", 0.5, True),
        (False, "Snow, cold", 0.0, True),
        (True, "<think>\nI, a Thinker, think.\n</think>\n\nsnow is cold", 1.0, True),
        (True, "<think>\nsnow is cold\n</think>\n\nSnow, cold", 0.0, True),
        (True, "snow is cold", 1.0, False),
        (True, "<think>\nsnow is cold", 0.0, False),
        (False, "", 0.0, False),
    ],
)
def test_judge_instructions_are_those_that_the_answer_follows(
    thinking: bool, text: str, share: float, is_well_formed: bool
):
    in_part = _judge(text, item=INSTRUCTED, thinking=thinking)
    in_all = judge(text, item=INSTRUCTED, thinking=thinking, is_terminated=True, instruction_reward="all")
    assert in_part.reward(accuracy_reward=2.0, format_reward=0.25) == (2.0 * share + 0.25) * is_well_formed
    assert in_all.accuracy == float(share == 1.0)
    assert in_part.is_right == in_all.is_right == (share == 1.0)


def test_judge_instructions_of_a_reply_that_was_cut_off_earn_nothing():
    verdict = _judge("snow", item=INSTRUCTED, is_terminated=False)
    assert verdict.reward(accuracy_reward=1.0, format_reward=1.0) == 0.0
