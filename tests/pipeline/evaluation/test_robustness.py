"""Unusual system prompts: what each one says, how replies are counted, and pass@1 over samples."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from pipeline.data.chat import THINKING_OFF, THINKING_ON
from pipeline.data.reasoning_items import ReasoningItem, generate_items
from pipeline.evaluation.robustness import VARIANTS, count_variant, robustness_rows
from pipeline.evaluation.sampled import Sample, num_sampled_batches, quality_of_samples, sampled_quality
from pipeline.evaluation.suite import OTHER_DIFFICULTY, OTHER_FAMILY, group_held_out
from pipeline.evaluation.toggle import is_answer_found
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM, build_model
from pipeline.recipe import ReasoningTask, SampledConfig

EASY = ReasoningTask(name="chain_sum", config={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1})
HARD = ReasoningTask(name="chain_sum", config={"min_terms": 4, "max_terms": 4, "min_digits": 1, "max_digits": 1})
OTHER = ReasoningTask(name="count_bits", config={"max_n": 15})


def _items(task: ReasoningTask, num_items: int) -> list[ReasoningItem]:
    return generate_items(task, num_items=num_items, seed=3, exclude_questions=frozenset())


def test_variants_hold_the_toggle_where_they_say():
    prompts = {variant.name: variant.messages("Q? ") for variant in VARIANTS}
    assert prompts["missing"] == [{"role": "user", "content": "Q?"}]
    assert prompts["late, on"] == [{"role": "user", "content": f"Q?\n\n{THINKING_ON}"}]
    assert prompts["contradicted, off"] == [
        {"role": "system", "content": THINKING_OFF},
        {"role": "user", "content": f"Q?\n\n{THINKING_ON}"},
    ]
    for name in ("paraphrased, on", "paraphrased, off"):
        assert "detailed thinking" not in prompts[name][0]["content"]


def test_count_variant_tells_thoughts_bare_answers_and_neither():
    row = count_variant(VARIANTS[0], ["<think>\na\n</think>\n\n1", "1", "<think>a", ""])
    assert (row.thinks.value, row.answers_at_once.value, row.thinks.num_samples) == (0.25, 0.25, 4)


def test_robustness_rows_of_a_model_one_per_variant(
    other: HeterogeneousLlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
):
    rows = robustness_rows(other, items=_items(EASY, 2), tokenizer=tokenizer, max_new_tokens=4, batch_size=3)
    assert [row.variant for row in rows] == [variant.name for variant in VARIANTS]
    assert all(row.thinks.num_samples == 2 for row in rows)
    assert robustness_rows(other, items=[], tokenizer=tokenizer, max_new_tokens=4, batch_size=3) == ()


def test_sampled_quality_is_the_same_for_the_same_model(
    other: HeterogeneousLlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
):
    config = SampledConfig(num_items=3, num_samples=2, temperature=0.6, top_p=0.95)
    first, second = (
        sampled_quality(
            other, items=_items(EASY, 3), config=config, tokenizer=tokenizer, max_new_tokens=5, batch_size=4
        )
        for _ in range(2)
    )
    assert first == second
    assert first is not None
    assert (first.pass_at_1.num_samples, first.num_samples) == (3, 2)
    assert 0 < first.mean_tokens <= 5


def _thought(answer: str) -> str:
    return f"<think>\nx\n</think>\n\n{answer}"


def test_quality_of_samples_counts_planted_replies():
    items = _items(EASY, 4)
    texts = [
        [_thought(items[0].answer), items[0].answer],  # both right; the second does not think
        [_thought(items[1].answer), _thought("1000")],  # one right
        [f"<think>\n{items[2].answer}", ""],  # right digits in a thought that never ends, and nothing
        [_thought("1000"), _thought(f"It is {items[3].answer}.")],  # one right
    ]
    samples = [[Sample(text=text, num_tokens=2 + 3 * (place % 2)) for text in texts[place]] for place in range(4)]
    quality = quality_of_samples(
        items, samples, config=SampledConfig(num_items=4, num_samples=2, temperature=0.6, top_p=0.95)
    )
    # Items are worth 1, 1/2, 0 and 1/2, and Wilson's interval of 2 of 4 is 0.5 -+ z / sqrt(4 (4 + z^2)).
    estimate, half_width = quality.pass_at_1, 1.959964 / (2 * (4 + 3.841459) ** 0.5)
    assert (estimate.value, estimate.num_samples) == (0.5, 4)
    assert (estimate.low, estimate.high) == (pytest.approx(0.5 - half_width), pytest.approx(0.5 + half_width))
    assert quality.share_compliant == 5 / 8
    assert quality.mean_tokens == 3.5
    assert (quality.num_samples, quality.temperature, quality.top_p) == (2, 0.6, 0.95)


@pytest.mark.parametrize("share_right", [0.0, 1.0])
def test_quality_of_samples_none_or_all_right_prove_little(share_right: float):
    items = _items(EASY, 4)
    samples = [[Sample(text=item.answer if share_right else "1000", num_tokens=2)] for item in items]
    config = SampledConfig(num_items=4, num_samples=1, temperature=0.6, top_p=0.95)
    estimate = quality_of_samples(items, samples, config=config).pass_at_1
    assert estimate.value == share_right
    # Wilson's interval of 0 of 4 ends at z^2 / (4 + z^2).
    assert estimate.high - estimate.low == pytest.approx(3.841459 / 7.841459, abs=1e-5)


def test_sampled_quality_of_a_model_that_says_7_is_right_where_7_is_right(
    other: HeterogeneousLlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
):
    by_answer = {item.answer: item for item in _items(EASY, 60)}
    items = [by_answer[answer] for answer in ("7", "3", "12")]
    config = SampledConfig(num_items=3, num_samples=5, temperature=0.6, top_p=0.95)
    num_batches = 0

    def on_batch() -> None:
        nonlocal num_batches
        num_batches += 1

    quality = sampled_quality(
        _model_that_says_7(other, tokenizer),
        items=items,
        config=config,
        tokenizer=tokenizer,
        max_new_tokens=6,
        batch_size=4,
        on_batch=on_batch,
    )
    assert quality is not None
    assert quality.pass_at_1.value == pytest.approx(1 / 3)
    assert (quality.share_compliant, quality.mean_tokens) == (0.0, 2.0)  # the digit and the end token
    assert num_batches == num_sampled_batches(3, config=config, batch_size=4) == 3


def _model_that_says_7(
    other: HeterogeneousLlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> HeterogeneousLlamaForCausalLM:
    """Return a model whose next token depends on the last one alone: 7 behind a line break, and the end behind 7."""
    architecture = other.architecture.model_copy(update={"tie_word_embeddings": False})
    model = build_model(architecture, dtype=torch.float32, seed=1)
    line_break, seven = tokenizer.encode("\n7", add_special_tokens=False)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not name.endswith("norm.weight"):
                weight.zero_()
        embeddings = model.model.embed_tokens.weight
        embeddings[:, 2] = 1.0
        for direction, (token, following) in enumerate([(line_break, seven), (seven, architecture.eos_token_ids[0])]):
            embeddings[token] = torch.eye(architecture.hidden_size)[direction]
            model.lm_head.weight[following, direction] = 10.0
    return model


@pytest.mark.parametrize(
    ("num_items", "num_samples", "batch_size", "num_batches"),
    [(4, 16, 8, 4), (4, 3, 4, 4), (4, 2, 4, 2), (5, 2, 4, 3), (5, 1, 64, 1), (0, 2, 4, 0)],
)
def test_num_sampled_batches_never_parts_the_samples_of_an_item(
    num_items: int, num_samples: int, batch_size: int, num_batches: int
):
    config = SampledConfig(num_items=num_items, num_samples=num_samples, temperature=0.6, top_p=0.95)
    assert num_sampled_batches(num_items, config=config, batch_size=batch_size) == num_batches


def test_is_answer_found_behind_the_thought_alone():
    item = _items(EASY, 1)[0]
    assert is_answer_found(f"<think>\nx\n</think>\n\nIt is {item.answer}.", item=item)
    assert not is_answer_found(f"<think>\n{item.answer}\n</think>\n\n", item=item)


def test_group_held_out_by_family_and_difficulty():
    groups = group_held_out([*_items(HARD, 2), *_items(OTHER, 1)], trained=_items(EASY, 1))
    assert {group: [item.task for item in items] for group, items in groups.items()} == {
        OTHER_DIFFICULTY: ["chain_sum"] * 2,
        OTHER_FAMILY: ["count_bits"],
    }
