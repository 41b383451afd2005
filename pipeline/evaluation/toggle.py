"""Greedy answers to the held-out reasoning items in both modes: are they right, and do they obey the switch?

Models in, figures out: no files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from pipeline.data.chat import generation_prompt_ids, reasoning_messages, split_thinking, stop_token_ids
from pipeline.data.reasoning_items import ReasoningItem, score_answer
from pipeline.errors import DataError
from pipeline.evaluation.extraction import extract_answer
from pipeline.evaluation.generation import complete_greedily
from pipeline.evaluation.intervals import share
from pipeline.evaluation.results import Mode, ModeQuality
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One reply as generated, end token left out."""

    item: ReasoningItem
    text: str
    num_tokens: int
    has_ended: bool


def is_compliant(text: str, *, mode: Mode) -> bool:
    """Return whether a reply has the form its mode asks for.

    on: exactly one think block, closed, at the very start, with words in it and an answer behind it.
    off: an answer and no tag.
    """
    parse = split_thinking(text)
    return parse.is_well_formed if mode == "on" else parse.num_blocks == 0 and bool(parse.answer)


def answer_items(
    model: HeterogeneousLlamaForCausalLM,
    *,
    items: Sequence[ReasoningItem],
    mode: Mode,
    tokenizer: PreTrainedTokenizerFast,
    max_new_tokens: int,
    batch_size: int,
    on_batch: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """Return the model's greedy reply to each question under the system prompt of one mode."""
    prompts = [
        generation_prompt_ids(tokenizer, reasoning_messages(item.question, thinking=mode == "on")) for item in items
    ]
    completions = complete_greedily(
        model,
        prompts=prompts,
        stop_ids=stop_token_ids(tokenizer, model.architecture.eos_token_ids),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        on_batch=on_batch,
    )
    return [
        Answer(
            item=item,
            # Special tokens stay visible: a model that writes them must not look as if it wrote nothing.
            text=str(tokenizer.decode(list(completion.ids), skip_special_tokens=False)),
            num_tokens=len(completion.ids),
            has_ended=completion.has_ended,
        )
        for item, completion in zip(items, completions, strict=True)
    ]


def mode_quality(answers: Sequence[Answer], *, mode: Mode, max_new_tokens: int) -> ModeQuality:
    """Return how many replies in one mode are right and obey the switch. An answer without words is wrong.

    Right is counted twice: an exact reply is the bare answer, which only fine-tuning teaches; an answer is found where
    the reply is exact or `extract_answer` takes the right one from it, which compares models whatever their manners.

    Raises:
        DataError: without a reply.
    """
    if not answers:
        raise DataError("there are no reasoning items: set evaluation_sets.reasoning_items_per_task to at least 1")
    num_exact = 0
    is_found: list[bool] = []
    by_task: dict[str, list[bool]] = {}
    for answer in answers:
        num_exact += _is_right(answer.item, split_thinking(answer.text).answer)
        is_found.append(is_answer_found(answer.text, item=answer.item))
        by_task.setdefault(answer.item.task, []).append(is_found[-1])
    return ModeQuality(
        answer_found=share(sum(is_found), num_samples=len(answers)),
        answer_found_by_task={task: share(sum(found), num_samples=len(found)) for task, found in by_task.items()},
        exact_reply=share(num_exact, num_samples=len(answers)),
        toggle_compliance=share(
            sum(is_compliant(answer.text, mode=mode) for answer in answers), num_samples=len(answers)
        ),
        mean_tokens=sum(answer.num_tokens for answer in answers) / len(answers),
        num_truncated=sum(not answer.has_ended for answer in answers),
        num_empty=sum(not split_thinking(answer.text).answer for answer in answers),
        max_new_tokens=max_new_tokens,
    )


def is_answer_found(text: str, *, item: ReasoningItem) -> bool:
    """Return whether a reply is the right answer, or `extract_answer` takes the right one from it."""
    visible = split_thinking(text).answer
    return _is_right(item, visible) or _is_right(item, extract_answer(visible, reference=item.answer))


def _is_right(item: ReasoningItem, text: str) -> bool:
    return bool(text) and score_answer(item, text) == 1.0
