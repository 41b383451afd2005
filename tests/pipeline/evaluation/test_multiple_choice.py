"""Batched scoring of choices against one forward pass per choice."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from pipeline.data.benchmarks import MultipleChoiceItem
from pipeline.data.choice_texts import scored_text
from pipeline.errors import DataError
from pipeline.evaluation.multiple_choice import choice_log_likelihoods, multiple_choice_quality
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM

ITEMS = [
    MultipleChoiceItem(prompt="Question: is ice cold?\nAnswer:", choices=("yes", "not at all"), gold=0),
    MultipleChoiceItem(prompt="Two and two are", choices=("four", "five", "a great many more"), gold=2),
    MultipleChoiceItem(prompt="Birds", choices=("fly", "bark"), gold=1),
]


def _naive(
    model: HeterogeneousLlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, item: MultipleChoiceItem
) -> list[float]:
    scores = []
    for choice in item.choices:
        prompt_ids = tokenizer.encode(item.prompt, add_special_tokens=False)
        ids = tokenizer.encode(f"{item.prompt} {choice}", add_special_tokens=False)
        with torch.no_grad():
            log_q_TV = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), dim=-1)
        places = range(len(prompt_ids), len(ids))
        scores.append(sum(log_q_TV[place - 1, ids[place]].item() for place in places))
    return scores


def test_multiple_choice_equals_one_pass_per_choice(
    other: HeterogeneousLlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    naive = [_naive(other, tokenizer, item) for item in ITEMS]
    texts = [
        scored_text(item.prompt, choice=choice, tokenizer=tokenizer, max_tokens=128)
        for item in ITEMS
        for choice in item.choices
    ]
    scores = choice_log_likelihoods(other, texts=texts, batch_size=3)
    assert scores == pytest.approx([score for of_item in naive for score in of_item], rel=1e-5)

    quality = multiple_choice_quality(other, items=ITEMS, tokenizer=tokenizer, max_tokens=128, batch_size=3)
    right = [of_item.index(max(of_item)) == item.gold for item, of_item in zip(ITEMS, naive, strict=True)]
    normalised = [
        [score / len(choice) for score, choice in zip(of_item, item.choices, strict=True)]
        for item, of_item in zip(ITEMS, naive, strict=True)
    ]
    right_normalised = [
        of_item.index(max(of_item)) == item.gold for item, of_item in zip(ITEMS, normalised, strict=True)
    ]
    assert quality.accuracy.value == pytest.approx(sum(right) / 3)
    assert quality.accuracy_normalised.value == pytest.approx(sum(right_normalised) / 3)
    assert quality.chance == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3)
    assert quality.accuracy.num_samples == 3


def test_scored_text_beyond_the_limit_loses_the_prompts_beginning(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = scored_text("a long prompt", choice="end", tokenizer=tokenizer, max_tokens=128)
    cut = scored_text("a long prompt", choice="end", tokenizer=tokenizer, max_tokens=6)
    assert cut.ids == whole.ids[-6:]
    assert cut.num_choice_tokens == whole.num_choice_tokens == 4


def test_multiple_choice_without_items_is_refused(
    other: HeterogeneousLlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(DataError, match="no items"):
        multiple_choice_quality(other, items=[], tokenizer=tokenizer, max_tokens=128, batch_size=3)
