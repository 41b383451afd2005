"""The switch under system prompts that no training showed: paraphrased, missing, late, contradicted.

What a reply should do is plain for all but the missing prompt; a system prompt outranks what the user adds to it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerFast

from pipeline.data.chat import (
    THINKING_OFF,
    THINKING_ON,
    generation_prompt_ids,
    split_thinking,
    stop_token_ids,
)
from pipeline.data.reasoning_items import ReasoningItem
from pipeline.evaluation.generation import complete_greedily
from pipeline.evaluation.intervals import share
from pipeline.evaluation.results import PromptRobustness
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One unusual way of asking for a mode: the system prompt, if any, and what stands behind the question."""

    name: str
    system: str | None
    behind_question: str
    wanted: Literal["on", "off", "either"]

    def messages(self, question: str) -> list[dict[str, str]]:
        """Return the prompt of a question."""
        user = {"role": "user", "content": question.strip() + self.behind_question}
        return [user] if self.system is None else [{"role": "system", "content": self.system}, user]


VARIANTS = (
    Variant(
        name="paraphrased, on",
        system="Think through the problem step by step before you answer.",
        behind_question="",
        wanted="on",
    ),
    Variant(
        name="paraphrased, off",
        system="Answer directly, without thinking out loud.",
        behind_question="",
        wanted="off",
    ),
    Variant(name="missing", system=None, behind_question="", wanted="either"),
    Variant(name="late, on", system=None, behind_question=f"\n\n{THINKING_ON}", wanted="on"),
    Variant(name="late, off", system=None, behind_question=f"\n\n{THINKING_OFF}", wanted="off"),
    Variant(name="contradicted, on", system=THINKING_ON, behind_question=f"\n\n{THINKING_OFF}", wanted="on"),
    Variant(name="contradicted, off", system=THINKING_OFF, behind_question=f"\n\n{THINKING_ON}", wanted="off"),
)


def robustness_rows(
    model: HeterogeneousLlamaForCausalLM,
    *,
    items: Sequence[ReasoningItem],
    tokenizer: PreTrainedTokenizerFast,
    max_new_tokens: int,
    batch_size: int,
    on_batch: Callable[[], None] = lambda: None,
) -> tuple[PromptRobustness, ...]:
    """Return for every variant how many greedy replies hold one well-formed thought, and how many hold no tag."""
    if not items:
        return ()
    prompts = [
        generation_prompt_ids(tokenizer, variant.messages(item.question)) for variant in VARIANTS for item in items
    ]
    completions = complete_greedily(
        model,
        prompts=prompts,
        stop_ids=stop_token_ids(tokenizer, model.architecture.eos_token_ids),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        on_batch=on_batch,
    )
    texts = [str(tokenizer.decode(list(completion.ids), skip_special_tokens=False)) for completion in completions]
    return tuple(
        count_variant(variant, texts[number * len(items) : (number + 1) * len(items)])
        for number, variant in enumerate(VARIANTS)
    )


def count_variant(variant: Variant, texts: Sequence[str]) -> PromptRobustness:
    """Return the row of one variant."""
    parses = [split_thinking(text) for text in texts]
    thinks = sum(parse.is_well_formed for parse in parses)
    answers = sum(parse.num_blocks == 0 and bool(parse.answer) for parse in parses)
    return PromptRobustness(
        variant=variant.name,
        wanted=variant.wanted,
        thinks=share(thinks, num_samples=len(texts)),
        answers_at_once=share(answers, num_samples=len(texts)),
    )
