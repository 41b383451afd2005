"""Greedy answers to the held-out reasoning items in both modes, their accuracy, and whether they obey the switch.

Models in, figures out: no files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from pipeline.data.chat import generation_prompt_ids, reasoning_messages, split_thinking
from pipeline.data.reasoning_items import ReasoningItem, score_answer
from pipeline.errors import DataError
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

    on: exactly one think block, closed, at the very start, with words in it and an answer behind it. off: no tag.
    """
    parse = split_thinking(text)
    return parse.is_well_formed if mode == "on" else parse.num_blocks == 0


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
        model, prompts=prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, on_batch=on_batch
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
    """Return accuracy and toggle compliance of the replies in one mode. An answer without words is wrong.

    Raises:
        DataError: without a reply.
    """
    if not answers:
        raise DataError("there are no reasoning items: set evaluation_sets.reasoning_items_per_task to at least 1")
    is_right = [_is_right(answer) for answer in answers]
    by_task: dict[str, list[bool]] = {}
    for answer, right in zip(answers, is_right, strict=True):
        by_task.setdefault(answer.item.task, []).append(right)
    return ModeQuality(
        accuracy=share(sum(is_right), num_samples=len(answers)),
        accuracy_by_task={task: share(sum(found), num_samples=len(found)) for task, found in by_task.items()},
        toggle_compliance=share(
            sum(is_compliant(answer.text, mode=mode) for answer in answers), num_samples=len(answers)
        ),
        mean_tokens=sum(answer.num_tokens for answer in answers) / len(answers),
        num_truncated=sum(not answer.has_ended for answer in answers),
        num_empty=sum(not split_thinking(answer.text).answer for answer in answers),
        max_new_tokens=max_new_tokens,
    )


def _is_right(answer: Answer) -> bool:
    visible = split_thinking(answer.text).answer
    return bool(visible) and score_answer(answer.item, visible) == 1.0
