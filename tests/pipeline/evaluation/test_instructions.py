"""Instruction-following figures of planted replies, counted by hand, and the model's own greedy replies."""

import pytest
from transformers import PreTrainedTokenizerFast

from pipeline.data.instruction_items import InstructionItem
from pipeline.data.instructions import AllLowercase, Instruction, NoCommas, NumWords
from pipeline.evaluation.instructions import instruction_qualities, instruction_quality
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM

LOWER, NO_COMMAS = AllLowercase(kind="all_lowercase"), NoCommas(kind="no_commas")
SHORT = NumWords(kind="num_words", relation="at_most", count=2)


def _item(*instructions: Instruction) -> InstructionItem:
    return InstructionItem(task="instructions", question="Describe snow.", instructions=instructions, answer="snow")


ITEMS = [_item(LOWER, NO_COMMAS), _item(SHORT), _item(LOWER, NO_COMMAS, SHORT), _item(LOWER)]
TEXTS = [
    "<think>\nA, B\n</think>\n\nsnow is cold",  # both, behind the thought
    "Sure:\nsnow falls",  # three words; two without the first line
    "Snow, cold",  # one of three
    "<think>\nnever closed",  # no answer
]


def test_instruction_quality_counts_prompts_and_instructions_strictly_and_loosely():
    quality = instruction_quality(ITEMS, TEXTS)
    assert (quality.prompt_strict.value, quality.prompt_loose.value) == (1 / 4, 2 / 4)
    assert quality.instruction_strict.value == pytest.approx((2 + 0 + 1 + 0) / 7)
    assert quality.instruction_loose.value == pytest.approx((2 + 1 + 1 + 0) / 7)
    assert (quality.num_instructions, quality.prompt_strict.num_samples) == (7, 4)
    for estimate in (quality.instruction_strict, quality.instruction_loose):
        assert 0 <= estimate.low < estimate.value < estimate.high <= 1
        assert estimate.num_samples == 4


def test_instruction_quality_two_prompts_of_which_nothing_is_followed_prove_little():
    quality = instruction_quality(ITEMS[:2], ["", "Snow falls, softly"])
    # Two instructions and one count for (2 + 1)^2 / (4 + 1) = 1.8 prompts.
    for estimate, n in ((quality.prompt_strict, 2), (quality.instruction_strict, 1.8)):
        # Wilson's upper bound of 0 of n: z^2 / (n + z^2), z = 1.96.
        assert (estimate.value, estimate.low, estimate.high) == (0, 0, pytest.approx(3.8416 / (n + 3.8416), abs=1e-4))


def test_instruction_qualities_of_a_model_are_of_its_own_replies_in_both_modes(
    parent: HeterogeneousLlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
):
    num_batches = 0

    def on_batch() -> None:
        nonlocal num_batches
        num_batches += 1

    found = instruction_qualities(
        parent,
        items=ITEMS,
        tokenizer=tokenizer,
        max_new_tokens={"on": 6, "off": 4},
        batch_size=3,
        on_batch=on_batch,
    )
    assert list(found) == ["on", "off"]
    assert num_batches == 4
    assert all(quality.prompt_strict.num_samples == 4 for quality in found.values())
    nothing = {"items": [], "tokenizer": tokenizer, "max_new_tokens": {"on": 6}, "batch_size": 3}
    assert instruction_qualities(parent, **nothing) == {}
