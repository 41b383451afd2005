"""Multiple-choice accuracy by the log-likelihood of each choice behind its prompt. Models in, figures out: no files.

B batch, T tokens, D hidden_size, C tokens of one choice, V vocab_size
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from pipeline.data.benchmarks import MultipleChoiceItem
from pipeline.data.choice_texts import ScoredText, scored_text
from pipeline.errors import DataError
from pipeline.evaluation.intervals import share
from pipeline.evaluation.results import MultipleChoiceQuality
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM


@torch.inference_mode()
def multiple_choice_quality(
    model: HeterogeneousLlamaForCausalLM,
    *,
    items: Sequence[MultipleChoiceItem],
    tokenizer: PreTrainedTokenizerFast,
    max_tokens: int,
    batch_size: int,
    on_batch: Callable[[], None] = lambda: None,
) -> MultipleChoiceQuality:
    """Return how often the right choice has the highest log-likelihood, plain and per character of the choice.

    Raises:
        DataError: for a set without items.
    """
    if not items:
        raise DataError("a multiple-choice set has no items: accuracy needs at least 1")
    texts = [
        scored_text(item.prompt, choice=choice, tokenizer=tokenizer, max_tokens=max_tokens)
        for item in items
        for choice in item.choices
    ]
    scores = choice_log_likelihoods(model, texts=texts, batch_size=batch_size, on_batch=on_batch)
    num_right = num_right_normalised = begin = 0
    for item in items:
        of_item = scores[begin : begin + len(item.choices)]
        begin += len(item.choices)
        per_character = [score / len(choice) for score, choice in zip(of_item, item.choices, strict=True)]
        num_right += of_item.index(max(of_item)) == item.gold
        num_right_normalised += per_character.index(max(per_character)) == item.gold
    return MultipleChoiceQuality(
        accuracy=share(num_right, num_samples=len(items)),
        accuracy_normalised=share(num_right_normalised, num_samples=len(items)),
        chance=sum(1 / len(item.choices) for item in items) / len(items),
    )


@torch.inference_mode()
def choice_log_likelihoods(
    model: HeterogeneousLlamaForCausalLM,
    *,
    texts: Sequence[ScoredText],
    batch_size: int,
    on_batch: Callable[[], None] = lambda: None,
) -> list[float]:
    """Return sum of log q(token) over the choice's tokens of each text, in the order given.

    Texts of like length share a batch. Padding stands on the right, behind everything a causal model can see, so it
    needs no mask; the head is applied to the choices' positions alone.
    """
    order = sorted(range(len(texts)), key=lambda index: -len(texts[index].ids))
    scores = [0.0] * len(texts)
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        rows = [torch.tensor(texts[index].ids[:-1]) for index in batch]
        inputs_BT = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
        hidden_BTD = model.model(input_ids=inputs_BT, use_cache=False).last_hidden_state
        for index, hidden_TD in zip(batch, hidden_BTD, strict=True):
            scores[index] = _choice_log_likelihood(model.lm_head, hidden_TD, text=texts[index])
        on_batch()
    return scores


def _choice_log_likelihood(head: nn.Module, hidden_TD: Tensor, *, text: ScoredText) -> float:
    end = len(text.ids) - 1
    hidden_CD = hidden_TD[end - text.num_choice_tokens : end]
    targets_C = torch.tensor(text.ids[-text.num_choice_tokens :], device=hidden_TD.device)
    # float32 before the softmax, as everywhere: choices differ in the third decimal.
    log_q_CV = F.log_softmax(head(hidden_CD).float(), dim=-1)
    return -F.nll_loss(log_q_CV, targets_C, reduction="sum").item()
