"""Learning-rate schedules against values worked out by hand."""

import pytest

from pipeline.training.schedules import learning_rate_factor
from tests.pipeline.training.builders import OPTIMIZER


def test_cosine_warms_up_and_falls_to_the_minimum():
    factors = [learning_rate_factor(step, total_steps=10, optimizer=OPTIMIZER) for step in range(11)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[6] == pytest.approx(0.55)  # half of the way down
    assert factors[10] == pytest.approx(0.1)


def test_constant_stays_after_warm_up():
    constant = OPTIMIZER.model_copy(update={"schedule": "constant"})
    factors = [learning_rate_factor(step, total_steps=10, optimizer=constant) for step in range(10)]
    assert factors == [0.5] + [1.0] * 9


def test_no_warm_up_begins_at_full_rate():
    at_once = OPTIMIZER.model_copy(update={"warmup_ratio": 0.0})
    assert learning_rate_factor(0, total_steps=1, optimizer=at_once) == 1.0
