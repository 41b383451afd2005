"""pass@1 over several samples of each question, at a temperature, thinking on. Models in, figures out: no files.

Source: Llama-Nemotron, section 7.1 (temperature 0.6, top-p 0.95, the mean over up to 16 completions).
"""

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerFast

from pipeline.data.chat import generation_prompt_ids, reasoning_messages, stop_token_ids
from pipeline.data.reasoning_items import ReasoningItem
from pipeline.evaluation.intervals import weighted_mean
from pipeline.evaluation.results import SampledQuality
from pipeline.evaluation.toggle import is_answer_found, is_compliant
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.model.sampling import sample_completions, seeded_generator
from pipeline.recipe import SampledConfig


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
    """Return the mean over items of the share of right samples; its interval is over items. None without items."""
    if not items:
        return None
    size = max(1, batch_size // config.num_samples)
    shares: list[float] = []
    num_compliant = num_tokens = 0
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
        for item, group in zip(batch, groups, strict=True):
            texts = [
                str(tokenizer.decode(list(reply.ids[:-1] if reply.is_terminated else reply.ids))) for reply in group
            ]
            shares.append(sum(is_answer_found(text, item=item) for text in texts) / len(texts))
            num_compliant += sum(is_compliant(text, mode="on") for text in texts)
            num_tokens += sum(len(reply.ids) for reply in group)
        on_batch()
    num_replies = len(items) * config.num_samples
    return SampledQuality(
        pass_at_1=weighted_mean([[(value, 1.0) for value in shares]]),
        share_compliant=num_compliant / num_replies,
        mean_tokens=num_tokens / num_replies,
        num_samples=config.num_samples,
        temperature=config.temperature,
        top_p=config.top_p,
    )
