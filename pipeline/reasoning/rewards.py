"""Rewards of one completion: is the answer right, and has the reply the form its mode asks for. Pure but for scoring.

Accuracy is the task's own scorer on what stands after the thought, and only its full mark counts. Form: with thinking
on one thought at the start and an answer after it; with thinking off no tag. A reply that was cut off earns nothing.
Source: Llama-Nemotron, section 5 (accuracy and format rewards; zero for replies that do not end).
"""

from collections import Counter
from dataclasses import dataclass

from pipeline.data.chat import split_thinking
from pipeline.data.reasoning_items import ReasoningItem, score_answer


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What one completion earns; an answer whose verifier failed is not right, and is told apart from a wrong one."""

    is_terminated: bool
    is_right: bool
    is_well_formed: bool
    has_verifier_failed: bool

    def reward(self, *, accuracy_reward: float, format_reward: float) -> float:
        """Return the weighted sum, or 0 for a reply that was cut off."""
        if not self.is_terminated:
            return 0.0
        return accuracy_reward * self.is_right + format_reward * self.is_well_formed


def judge(text: str, *, item: ReasoningItem, thinking: bool, is_terminated: bool) -> Verdict:
    """Judge a reply, given as text without its end token."""
    if not is_terminated:
        return Verdict(is_terminated=False, is_right=False, is_well_formed=False, has_verifier_failed=False)
    reply = split_thinking(text)
    has_right_form = reply.is_well_formed if thinking else reply.num_blocks == 0 and bool(reply.answer)
    errors: Counter[str] = Counter()
    score = score_answer(item, reply.answer, errors=errors) if reply.answer else 0.0
    return Verdict(
        is_terminated=True,
        is_right=score == 1.0,
        is_well_formed=has_right_form,
        has_verifier_failed=bool(errors),
    )
