"""Greedy answers to chat prompts, in left-padded batches. Models in, token ids out: no files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.model.sampling import sample_completions


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What a model wrote behind one prompt, without its end token."""

    ids: tuple[int, ...]
    has_ended: bool


def complete_greedily(
    model: HeterogeneousLlamaForCausalLM,
    *,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    on_batch: Callable[[], None] = lambda: None,
) -> list[Completion]:
    """Return the most likely continuation of each prompt, token by token, in the order given.

    It ends before the first of `stop_ids`, of which there must be one at least.
    Prompts of like length share a batch; padding stands on the left and is masked. Rows that have ended leave it.
    """
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    completions: dict[int, Completion] = {}
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        replies = sample_completions(
            model,
            [prompts[index] for index in batch],
            num_samples=1,
            max_new_tokens=max_new_tokens,
            temperature=0.0,
            top_p=1.0,
            stop_ids=stop_ids,
            generator=None,
        )
        for index, (reply,) in zip(batch, replies, strict=True):
            ended = reply.is_terminated
            completions[index] = Completion(ids=reply.ids[:-1] if ended else reply.ids, has_ended=ended)
        on_batch()
    return [completions[index] for index in range(len(prompts))]
