"""Which windows a step trains on."""

import pytest

from pipeline.errors import DataError
from pipeline.training.batches import plan_batches
from tests.pipeline.training.builders import text_windows


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
