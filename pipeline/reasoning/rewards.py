"""Rewards of one completion: is the answer right, and has the reply the form its mode asks for. Pure but for scoring.

Accuracy is of what stands after the thought: for a task its own scorer's, and only its full mark counts; for
instructions the share that is followed, or whether all are. Form: with thinking on one thought at the start and an
answer after it; with thinking off no tag. A reply that was cut off earns nothing, and neither does one in the other
mode's form, however right: told not to think, a model that thinks is right more often, and would learn to (a run that
paid for it obeyed "off" in 93% of 1,900 replies, 98% before).
Source: Llama-Nemotron, sections 5 (accuracy and format rewards; zero for replies that do not end) and 6.1 (verifiable
instructions; it does not say what following some of them earns).
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from pipeline.data.chat import split_thinking
from pipeline.data.instruction_items import InstructionItem
from pipeline.data.instructions import are_followed
from pipeline.data.reasoning_items import score_answer
from pipeline.reasoning.prompts import RLItem


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What one completion earns; an answer whose verifier failed is not right, and is told apart from a wrong one.

    `accuracy` is 0 to 1; `answer` is what stands after the thought, empty for a reply that was cut off.
    """

    is_terminated: bool
    accuracy: float
    is_well_formed: bool
    has_verifier_failed: bool
    answer: str

    @property
    def is_right(self) -> bool:
        """Whether nothing is left to be desired."""
        return self.accuracy == 1.0

    def reward(self, *, accuracy_reward: float, format_reward: float) -> float:
        """Return the weighted sum, or 0 for a reply that was cut off or has not the form of its mode."""
        if not self.is_well_formed:
            return 0.0
        return accuracy_reward * self.accuracy + format_reward


def judge(
    text: str,
    *,
    item: RLItem,
    thinking: bool,
    is_terminated: bool,
    instruction_reward: Literal["share", "all"],
) -> Verdict:
    """Judge a reply, given as text without its end token."""
    if not is_terminated:
        return Verdict(is_terminated=False, accuracy=0.0, is_well_formed=False, has_verifier_failed=False, answer="")
    reply = split_thinking(text)
    has_right_form = reply.is_well_formed if thinking else reply.num_blocks == 0 and bool(reply.answer)
    errors: Counter[str] = Counter()
    if isinstance(item, InstructionItem):
        followed = are_followed(item.instructions, reply.answer)
        accuracy = float(all(followed)) if instruction_reward == "all" else sum(followed) / len(followed)
    else:
        accuracy = score_answer(item, reply.answer, errors=errors) if reply.answer else 0.0
    return Verdict(
        is_terminated=True,
        accuracy=accuracy,
        is_well_formed=has_right_form,
        has_verifier_failed=bool(errors),
        answer=reply.answer,
    )
