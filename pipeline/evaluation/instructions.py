"""How many verifiable instructions greedy replies follow, in both modes. Models in, figures out: no files.

Strict is the answer as it is; loose also forgives bold type and a line before or behind it. A prompt counts when all
its instructions are followed. A reply that was cut off is judged as far as it goes.
Source: Zhou et al. 2023 ("Instruction-following evaluation for large language models"), section 3.
"""

from collections.abc import Callable, Mapping, Sequence

from transformers import PreTrainedTokenizerFast

from pipeline.data.chat import generation_prompt_ids, reasoning_messages, split_thinking, stop_token_ids
from pipeline.data.instruction_items import InstructionItem
from pipeline.data.instructions import are_followed, are_loosely_followed
from pipeline.evaluation.generation import complete_greedily
from pipeline.evaluation.intervals import Estimate, clustered_share, share
from pipeline.evaluation.results import InstructionQuality, Mode
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM


def instruction_qualities(
    model: HeterogeneousLlamaForCausalLM,
    *,
    items: Sequence[InstructionItem],
    tokenizer: PreTrainedTokenizerFast,
    max_new_tokens: Mapping[Mode, int],
    batch_size: int,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[Mode, InstructionQuality]:
    """Return what greedy replies are worth in each mode; nothing without items."""
    if not items:
        return {}
    qualities: dict[Mode, InstructionQuality] = {}
    for mode, limit in max_new_tokens.items():
        completions = complete_greedily(
            model,
            prompts=[
                generation_prompt_ids(tokenizer, reasoning_messages(item.question, thinking=mode == "on"))
                for item in items
            ],
            stop_ids=stop_token_ids(tokenizer, model.architecture.eos_token_ids),
            max_new_tokens=limit,
            batch_size=batch_size,
            on_batch=on_batch,
        )
        texts = [str(tokenizer.decode(list(completion.ids), skip_special_tokens=False)) for completion in completions]
        qualities[mode] = instruction_quality(items, texts)
    return qualities


def instruction_quality(items: Sequence[InstructionItem], texts: Sequence[str]) -> InstructionQuality:
    """Return the shares of prompts and of instructions that replies follow, behind their thoughts."""
    answers = [split_thinking(text).answer for text in texts]
    strict = [are_followed(item.instructions, answer) for item, answer in zip(items, answers, strict=True)]
    loose = [are_loosely_followed(item.instructions, answer) for item, answer in zip(items, answers, strict=True)]
    return InstructionQuality(
        prompt_strict=share(sum(map(all, strict)), num_samples=len(items)),
        prompt_loose=share(sum(map(all, loose)), num_samples=len(items)),
        instruction_strict=_instructions_followed(strict),
        instruction_loose=_instructions_followed(loose),
        num_instructions=sum(map(len, strict)),
    )


def _instructions_followed(followed: Sequence[tuple[bool, ...]]) -> Estimate:
    """Return the share of instructions; those of one prompt are followed together more often than by chance."""
    return clustered_share([(sum(of_prompt), len(of_prompt)) for of_prompt in followed])
