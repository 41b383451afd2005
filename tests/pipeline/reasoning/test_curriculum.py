"""Difficulty: which prompts are dropped, the Gaussian allocation by hand, and the schedule over a training."""

import math
from collections import Counter
from itertools import chain

import pytest

from pipeline.reasoning.curriculum import allocate, plan_curriculum, worth_trying
from pipeline.reasoning.stop_rules import reason_to_stop
from pipeline.recipe import CurriculumConfig, StopRulesConfig

CONFIG = CurriculumConfig(start=0.75, end=0.0, sigma=0.2)


def test_worth_trying_drops_the_published_bound_and_above():
    # Of 8 samples, 6 right are 0.75: dropped; 5 are kept, and so is what never was right.
    assert worth_trying([0.0, 5 / 8, 6 / 8, 1.0], min_pass_rate=0.0, max_pass_rate=0.75) == [0, 1]


def test_worth_trying_drops_what_was_never_right_where_asked():
    assert worth_trying([0.0, 1 / 8, 2 / 8, 1.0], min_pass_rate=1 / 8, max_pass_rate=1.0) == [1, 2]


def test_allocate_follows_the_gaussian():
    weights = {rate: math.exp(-((rate - 0.5) ** 2) / (2 * 0.25**2)) for rate in (0.0, 0.25, 0.5, 0.75)}
    # 0.135, 0.607, 1, 0.607 of 2.349: 20 prompts are 1.15, 5.16, 8.51, 5.16; the one left over goes to 0.5.
    assert sum(weights.values()) == pytest.approx(2.349, abs=1e-3)
    counts = allocate(dict.fromkeys(weights, 100), size=20, aim=0.5, sigma=0.25)
    assert counts == {0.0: 1, 0.25: 5, 0.5: 9, 0.75: 5}


def test_allocate_fills_from_the_largest_pool():
    counts = allocate({0.0: 50, 0.25: 3, 0.5: 2}, size=10, aim=0.5, sigma=0.1)
    # Nearly all are wanted at 0.5, where there are two; the rest comes from the pool with the most left.
    assert counts[0.5] == 2
    assert sum(counts.values()) == 10
    assert counts[0.0] > counts[0.25]
    assert allocate({0.0: 2, 0.5: 1}, size=10, aim=0.5, sigma=0.1) == {0.0: 2, 0.5: 1}


def test_allocate_far_from_every_rate_does_not_underflow():
    assert allocate({0.0: 5, 0.1: 5}, size=3, aim=1.0, sigma=0.01) == {0.0: 0, 0.1: 3}


def test_plan_curriculum_gets_harder_and_uses_every_prompt_once_before_any_again():
    rates = [rate for rate in (0.0, 0.25, 0.5, 0.625) for _ in range(20)]
    batches = plan_curriculum(rates, num_steps=10, prompts_per_step=8, config=CONFIG, seed=1)
    assert batches[0].aimed_pass_rate == 0.75
    assert batches[-1].aimed_pass_rate == 0.0
    assert sorted(chain.from_iterable(batch.places for batch in batches)) == list(range(80))
    means = [sum(rates[place] for place in batch.places) / 8 for batch in batches]
    assert means[0] > 0.5
    assert means[-1] < 0.1
    assert sum(means[:5]) > sum(means[5:])


def test_plan_curriculum_starts_over_when_the_prompts_are_used_up_and_depends_on_the_seed_alone():
    rates = [0.0, 0.5] * 6
    first, again, other = (
        plan_curriculum(rates, num_steps=9, prompts_per_step=4, config=CONFIG, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other
    counts = Counter(chain.from_iterable(batch.places for batch in first))
    assert counts == dict.fromkeys(range(12), 3)


def test_plan_curriculum_draws_what_is_left_over_before_any_comes_again():
    rates = [0.0, 0.5] * 5
    batches = plan_curriculum(rates, num_steps=5, prompts_per_step=4, config=CONFIG, seed=1)
    # The third batch takes the two of ten that the first two left, and two others of the next round.
    assert set(chain.from_iterable(batch.places for batch in batches[:3])) == set(range(10))
    assert all(len(set(batch.places)) == 4 for batch in batches)
    assert Counter(chain.from_iterable(batch.places for batch in batches)) == dict.fromkeys(range(10), 2)


RULES = StopRulesConfig(patience_steps=3, min_entropy_nats=0.1, max_kl_nats=0.5, max_held_out_drop=0.2)
SOUND = {
    "entropy": 1.0,
    "kl": 0.1,
    "share_zero_advantage_groups": 0.5,
    "held_out_reward": 0.6,
    "is_held_out_measured": 1,
    "reward": 0.5,
}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"entropy": 0.05}, "collapse: entropy below 0.1 nats for 3 steps"),
        ({"kl": 0.6}, "collapse: KL to the start above 0.5"),
        ({"share_zero_advantage_groups": 1.0}, "collapse: all samples of every group"),
        ({"held_out_reward": 0.3, "reward": 0.9}, "reward hacking: for 3 steps"),
        ({"kl": float("nan")}, None),
        ({"held_out_reward": 0.3, "reward": 0.4}, None),  # both fell: worse, but no game
        ({"held_out_reward": 0.5, "reward": 0.9}, None),
    ],
)
def test_reason_to_stop_needs_patience(change: dict[str, float], reason: str | None):
    bad = SOUND | change
    assert reason_to_stop([SOUND, bad, bad], rules=RULES, is_distillation=False) is None
    assert reason_to_stop([SOUND, bad, SOUND, bad, bad], rules=RULES, is_distillation=False) is None
    found = reason_to_stop([SOUND, bad, bad, bad], rules=RULES, is_distillation=False)
    assert found is None if reason is None else found is not None and found.startswith(reason)


def test_reason_to_stop_one_measurement_of_held_out_prompts_is_noise_however_long_it_stands():
    low = SOUND | {"held_out_reward": 0.3}
    copied = low | {"is_held_out_measured": 0}
    once = [SOUND, low, copied, copied, copied, copied]
    assert reason_to_stop(once, rules=RULES, is_distillation=False) is None
    found = reason_to_stop([*once, low], rules=RULES, is_distillation=False)
    assert found is not None
    assert found.startswith("reward hacking")


@pytest.mark.parametrize(
    "change", [{"kl": 0.6}, {"share_zero_advantage_groups": 1.0}, {"held_out_reward": 0.3, "reward": 0.9}]
)
def test_reason_to_stop_holds_distillation_to_its_entropy_alone(change: dict[str, float]):
    bad = SOUND | change
    assert reason_to_stop([SOUND, bad, bad, bad], rules=RULES, is_distillation=True) is None
    flat = bad | {"entropy": 0.05}
    found = reason_to_stop([SOUND, flat, flat, flat], rules=RULES, is_distillation=True)
    assert found == "collapse: entropy below 0.1 nats for 3 steps"
