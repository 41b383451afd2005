"""Chain health against hand counts: repetition, loops, self-BLEU."""

import math

import pytest

from pipeline.evaluation.chains import chain_health, self_bleu
from pipeline.evaluation.intervals import share


def test_self_bleu_of_equal_and_of_unlike_chains():
    chain = ["one", "and", "two", "are", "three"]
    assert self_bleu([chain, chain, chain]) == pytest.approx(1.0)
    assert self_bleu([chain, ["quite", "another", "sequence", "of", "words"]]) == 0.0
    assert math.isnan(self_bleu([chain]))


def test_self_bleu_matches_a_hand_computation():
    first, second = ["a", "b", "c", "d", "e"], ["a", "b", "c", "x"]
    # first against second: 3/5, (2+1)/(4+1), (1+1)/(3+1), (0+1)/(2+1); longer than its reference.
    forward = (3 / 5 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    # second against first: 3/4, (2+1)/(3+1), (1+1)/(2+1), (0+1)/(1+1); brevity exp(1 - 5/4).
    backward = math.exp(1 - 5 / 4) * (3 / 4 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert self_bleu([first, second]) == pytest.approx((forward + backward) / 2)


def test_chain_health_counts_loops_and_leaves_empty_replies_out():
    health = chain_health(["a b c d e f g h " * 6, "nine words that are all different from one another", ""])
    assert (health.looping.value, health.looping.num_samples) == (0.5, 2)
    assert health.num_words.value == pytest.approx((48 + 9) / 2)
    assert math.isnan(chain_health([" "]).self_bleu)


def test_chain_health_of_four_chains_that_repeat_nothing_leaves_room_for_some_that_do():
    assert chain_health(["a chain of words"] * 4).repeated_share == share(0, num_samples=4)


def test_chain_health_repeated_share_stays_a_share():
    # Nine windows of 8 words, of which only the first is new: 8/9.
    repeated = chain_health(["a " * 16, "b", "c", "d"]).repeated_share
    assert (repeated.value, repeated.num_samples) == (pytest.approx(8 / 9 / 4), 4)
    assert 0 < repeated.low < repeated.value < repeated.high < 1
