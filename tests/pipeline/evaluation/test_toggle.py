"""Which replies obey the switch, and how right ones are counted."""

import pytest

from pipeline.data.reasoning_items import ReasoningItem, generate_items
from pipeline.errors import DataError
from pipeline.evaluation.results import Mode
from pipeline.evaluation.toggle import Answer, is_compliant, mode_quality
from pipeline.recipe import ReasoningTask

TASK = ReasoningTask(name="chain_sum", config={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1})


@pytest.mark.parametrize(
    ("text", "mode", "wanted"),
    [
        ("<think>\n1 + 1 = 2\n</think>\n\n2", "on", True),
        ("2", "on", False),
        ("<think>\n1 + 1 = 2", "on", False),
        ("<think>a</think><think>b</think>2", "on", False),
        ("</think>a<think>2", "on", False),
        ("2", "off", True),
        ("", "off", False),
        ("  \n", "off", False),
        ("<think>a</think>2", "off", False),
        ("a</think>2", "off", False),
    ],
)
def test_is_compliant_follows_the_mode(text: str, mode: Mode, wanted: bool) -> None:
    assert is_compliant(text, mode=mode) is wanted


def _answer(item: ReasoningItem, text: str, *, has_ended: bool = True) -> Answer:
    return Answer(item=item, text=text, num_tokens=len(text), has_ended=has_ended)


def test_mode_quality_counts_right_empty_and_cut_off_answers() -> None:
    items = generate_items(TASK, num_items=4, seed=3, exclude_questions=frozenset())
    quality = mode_quality(
        [
            _answer(items[0], f"<think>\nx\n</think>\n\n{items[0].answer}"),
            _answer(items[1], f"<think>\n{items[1].answer}", has_ended=False),  # right digits, but only in a thought
            _answer(items[2], ""),
            _answer(items[3], f"That makes 100 - no, **{items[3].answer}**."),
        ],
        mode="on",
        max_new_tokens=32,
    )
    assert quality.exact_reply.value == 0.25
    assert (quality.answer_found.value, quality.answer_found.num_samples) == (0.5, 4)
    assert quality.answer_found.low < 0.5 < quality.answer_found.high
    assert quality.answer_found_by_task["chain_sum"] == quality.answer_found
    assert quality.toggle_compliance.value == 0.25
    assert (quality.num_empty, quality.num_truncated) == (2, 1)


def test_mode_quality_without_answers_is_refused() -> None:
    with pytest.raises(DataError, match="no reasoning items"):
        mode_quality([], mode="on", max_new_tokens=32)
