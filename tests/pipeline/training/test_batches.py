"""Which windows a step trains on."""

import pytest

from pipeline.errors import DataError
from pipeline.training.batches import plan_batches, with_replay
from tests.pipeline.training.builders import sample_windows, text_windows


def test_plan_without_shuffle_reads_the_data_once_in_order():
    plan = plan_batches(text_windows(8), tokens=7 * 16, global_batch_size=3, shuffle_seed=None, what="kd")
    assert plan.num_steps == 2
    assert [plan.rows(step) for step in range(2)] == [[0, 1, 2], [3, 4, 5]]


def test_plan_with_shuffle_goes_through_every_window_each_epoch_in_another_order():
    plan = plan_batches(text_windows(6), tokens=12 * 16, global_batch_size=3, shuffle_seed=7, what="sft")
    first, second = plan.rows(0) + plan.rows(1), plan.rows(2) + plan.rows(3)
    assert plan.num_epochs == 2
    assert sorted(first) == sorted(second) == list(range(6))
    assert first != second


def test_plan_that_exceeds_the_data_names_both():
    with pytest.raises(DataError, match=r"kd.tokens is 144, the data holds 128 tokens"):
        plan_batches(text_windows(8), tokens=144, global_batch_size=3, shuffle_seed=None, what="kd")


def test_plan_shorter_than_a_step_is_refused():
    with pytest.raises(DataError, match=r"one step is 48 tokens"):
        plan_batches(text_windows(8), tokens=47, global_batch_size=3, shuffle_seed=None, what="kd")


@pytest.mark.parametrize(("share", "num_text"), [(0.25, 8), (0.5, 24), (0.2, 6)])
def test_replayed_windows_stand_evenly_between_those_of_the_blend(share: float, num_text: int):
    blend, text = sample_windows(24), text_windows(30)
    mixed = with_replay(blend, text, share=share, what="sft.stages[0]")
    assert len(mixed) == 24 + num_text
    # Only text carries loss at every token.
    is_text = (mixed.labels_NT == mixed.tokens_NT).all(dim=1)
    assert mixed.tokens_NT[is_text].equal(text.tokens_NT[:num_text])
    assert mixed.labels_NT[~is_text].equal(blend.labels_NT)
    assert mixed.position_ids_NT[~is_text].equal(blend.position_ids_NT)
    half = int(is_text[: len(mixed) // 2].sum())
    assert abs(half - num_text / 2) <= 1
    places = is_text.nonzero().flatten()
    gaps = places.diff()
    assert int(gaps.max() - gaps.min()) <= 1


def test_replayed_text_that_is_too_short_is_read_again():
    mixed = with_replay(sample_windows(6), text_windows(4), share=0.5, what="sft.stages[0]")
    text = text_windows(4).tokens_NT
    is_text = (mixed.labels_NT == mixed.tokens_NT).all(dim=1)
    assert mixed.tokens_NT[is_text].equal(text[[0, 1, 2, 3, 0, 1]])


def test_no_replay_is_the_blend_itself():
    blend = sample_windows(6)
    assert with_replay(blend, text_windows(4), share=0.0, what="sft.stages[0]") is blend


def test_replay_from_an_empty_mixture_is_refused():
    with pytest.raises(DataError, match=r"sft.stages\[0\].replay_share is 0.5: the pre-training mixture has 0 windows"):
        with_replay(sample_windows(6), text_windows(4).take(0), share=0.5, what="sft.stages[0]")
