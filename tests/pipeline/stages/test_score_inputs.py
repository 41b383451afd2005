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


def refinement(*, tokens: int, path_steps: int, rounds: int) -> RefinementConfig:
    return RefinementConfig(
        tokens=tokens,
        tokens_per_round=2 * LENGTH,
        path_steps=path_steps,
        rounds=rounds,
        answers_per_step=1,
        max_changed_layers=1,
    )


def test_parts_lie_apart_and_rounds_are_read_from_the_end():
    parts = SearchWindows.of(windows(11), refinement(tokens=3 * LENGTH - 1, path_steps=2, rounds=1))
    assert numbers(parts.compared) == [0, 1, 2]
    assert [numbers(one) for one in parts.rounds] == [[6, 7], [4, 5]]
    assert numbers(parts.unseen) == [8, 9, 10]


def test_fewer_windows_than_steps_and_rounds_read_are_refused():
    with pytest.raises(
        DataError, match=r"9 validation windows of 4 tokens do not hold .* for each of 2 steps and rounds"
    ):
        SearchWindows.of(windows(9), refinement(tokens=3 * LENGTH, path_steps=2, rounds=1))
    assert len(SearchWindows.of(windows(10), refinement(tokens=3 * LENGTH, path_steps=2, rounds=1)).rounds) == 2
    # Without rounds nothing is asked of what lies between.
    assert SearchWindows.of(windows(6), refinement(tokens=3 * LENGTH, path_steps=2, rounds=0)).rounds == ()
