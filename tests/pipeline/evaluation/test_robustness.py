"""Unusual system prompts: what each one says, how replies are counted, and pass@1 over samples."""

from transformers import PreTrainedTokenizerFast

from pipeline.data.chat import THINKING_OFF, THINKING_ON
from pipeline.data.reasoning_items import ReasoningItem, generate_items
from pipeline.evaluation.robustness import VARIANTS, count_variant, robustness_rows
from pipeline.evaluation.sampled import sampled_quality
from pipeline.evaluation.suite import OTHER_DIFFICULTY, OTHER_FAMILY, group_held_out
from pipeline.evaluation.toggle import is_answer_found
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
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
