"""Which prompts a step of reinforcement learning takes: all of them before any again, in one order an epoch."""

import random
from types import SimpleNamespace

import pytest

from pipeline.data.reasoning_items import ReasoningItem
from pipeline.reasoning import experience
from pipeline.reasoning.experience import draw_prompts
from tests.pipeline.reasoning.rl_builders import CONFIG


def test_draw_prompts_every_item_comes_once_before_any_again(items: list[ReasoningItem]):
    config = CONFIG.model_copy(update={"prompts_per_step": 5})
    drawn = [draw_prompts(items, config=config, step=step, curriculum=None) for step in (1, 2, 3, 4)]
    first, second = drawn[0] + drawn[1], drawn[2] + drawn[3]
    for epoch in (first, second):
        assert {prompt.item.question for prompt in epoch} == {item.question for item in items}
    assert [prompt.item for prompt in first] != [prompt.item for prompt in second]
    assert [prompt.thinking for prompt in drawn[0]] == [True, False, False, False, False]


@pytest.mark.parametrize("prompts_per_step", [4, 7, 24])
def test_draw_prompts_shuffles_once_an_epoch_and_draws_what_a_shuffle_for_each_prompt_would(
    items: list[ReasoningItem], prompts_per_step: int, monkeypatch: pytest.MonkeyPatch
):
    config = CONFIG.model_copy(update={"prompts_per_step": prompts_per_step, "seed": 1_000 + prompts_per_step})
    num_steps = 9
    drawn_by_hand: list[ReasoningItem] = []
    for place in range(num_steps * prompts_per_step):
        epoch, index = divmod(place, len(items))
        order = random.Random(f"{config.seed}/{epoch}").sample(range(len(items)), len(items))
        drawn_by_hand.append(items[order[index]])
    seeds: list[str] = []

    def seeded(seed: str) -> random.Random:
        seeds.append(seed)
        return random.Random(seed)

    monkeypatch.setattr(experience, "random", SimpleNamespace(Random=seeded))
    drawn = [
        prompt.item
        for step in range(1, num_steps + 1)
        for prompt in draw_prompts(items, config=config, step=step, curriculum=None)
    ]

    assert drawn == drawn_by_hand
    assert seeds == [f"{config.seed}/{epoch}" for epoch in range(-(-len(drawn) // len(items)))]
