"""pass@1 over several samples of each question, at a temperature, thinking on. Models in, figures out: no files.

Source: Llama-Nemotron, section 7.1 (temperature 0.6, top-p 0.95, the mean over up to 16 completions).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from pipeline.data.chat import generation_prompt_ids, reasoning_messages, stop_token_ids
from pipeline.data.reasoning_items import ReasoningItem
from pipeline.evaluation.intervals import share
from pipeline.evaluation.results import SampledQuality
from pipeline.evaluation.toggle import is_answer_found, is_compliant
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.model.sampling import sample_completions, seeded_generator
from pipeline.recipe import SampledConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One sampled reply, end token left out of its text and counted among its tokens."""

    text: str
    num_tokens: int


def num_sampled_batches(num_items: int, *, config: SampledConfig, batch_size: int) -> int:
    """Return how many batches `num_items` items take; the samples of one item are never parted."""
    return math.ceil(num_items / _items_per_batch(config, batch_size=batch_size))


def _items_per_batch(config: SampledConfig, *, batch_size: int) -> int:
    return max(1, batch_size // config.num_samples)


def sampled_quality(
    model: HeterogeneousLlamaForCausalLM,
    *,
    items: Sequence[ReasoningItem],
    config: SampledConfig,
    tokenizer: PreTrainedTokenizerFast,
    max_new_tokens: int,
    batch_size: int,
    on_batch: Callable[[], None] = lambda: None,
) -> SampledQuality | None:
    """Return what samples of every item are worth; None without items.

    A batch is whole items, and never fewer than one item's `config.num_samples` rows, however small `batch_size` is.
    """
    if not items:
        return None
    size = _items_per_batch(config, batch_size=batch_size)
    samples: list[list[Sample]] = []
    for start in range(0, len(items), size):
        batch = items[start : start + size]
        groups = sample_completions(
            model,
            [generation_prompt_ids(tokenizer, reasoning_messages(item.question, thinking=True)) for item in batch],
            num_samples=config.num_samples,
            max_new_tokens=max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            stop_ids=stop_token_ids(tokenizer, model.architecture.eos_token_ids),
            # Seeded by the questions, so that every checkpoint is sampled with the same draws.
            generator=seeded_generator("pass@1", *(item.question for item in batch), device=model.device),
        )
        samples += [
            [
                Sample(
                    text=str(tokenizer.decode(list(reply.ids[:-1] if reply.is_terminated else reply.ids))),
                    num_tokens=len(reply.ids),
                )
                for reply in group
            ]
            for group in groups
        ]
        on_batch()
    return quality_of_samples(items, samples, config=config)


def quality_of_samples(
    items: Sequence[ReasoningItem], samples: Sequence[Sequence[Sample]], *, config: SampledConfig
) -> SampledQuality:
    """Return the mean over items of the share of their samples that are right, with Wilson's interval over items."""
    num_right = num_compliant = num_tokens = 0
    for item, group in zip(items, samples, strict=True):
        num_right += sum(is_answer_found(sample.text, item=item) for sample in group)
        num_compliant += sum(is_compliant(sample.text, mode="on") for sample in group)
        num_tokens += sum(sample.num_tokens for sample in group)
    num_replies = len(items) * config.num_samples
    return SampledQuality(
        pass_at_1=share(num_right / config.num_samples, num_samples=len(items)),
        share_compliant=num_compliant / num_replies,
        mean_tokens=num_tokens / num_replies,
        num_samples=config.num_samples,
        temperature=config.temperature,
        top_p=config.top_p,
    )
