"""The validation windows of a search: what chooses is not what judges."""

import pytest
import torch

from pipeline.data.packed import PackedTokens
from pipeline.errors import DataError
from pipeline.recipe import RefinementConfig
from pipeline.stages.score_inputs import SearchWindows

LENGTH = 4


def windows(count: int) -> PackedTokens:
    """Windows that hold nothing but their number."""
    tokens_NT = torch.arange(count)[:, None].expand(count, LENGTH)
    return PackedTokens(tokens_NT=tokens_NT, labels_NT=tokens_NT, position_ids_NT=tokens_NT)


def numbers(packed: PackedTokens) -> list[int]:
    return packed.tokens_NT[:, 0].tolist()


def test_parts_lie_apart_and_rounds_are_read_from_the_end():
    refinement = RefinementConfig(
        tokens=3 * LENGTH - 1,
        tokens_per_round=2 * LENGTH,
        path_steps=1,
        rounds=9,
        answers_per_step=1,
        max_changed_layers=1,
    )
    parts = SearchWindows.of(windows(11), refinement)
    assert numbers(parts.compared) == [0, 1, 2]
    assert [numbers(one) for one in parts.rounds] == [[6, 7], [4, 5]]
    assert numbers(parts.unseen) == [8, 9, 10]


def test_too_few_windows_for_a_single_round_are_refused():
    refinement = RefinementConfig(
        tokens=3 * LENGTH, tokens_per_round=2 * LENGTH, path_steps=1, rounds=0, answers_per_step=1, max_changed_layers=1
    )
    with pytest.raises(DataError, match="7 validation windows of 4 tokens do not hold"):
        SearchWindows.of(windows(7), refinement)
    assert len(SearchWindows.of(windows(8), refinement).rounds) == 1
