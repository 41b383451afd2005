"""Intervals against published and independently computed values."""

import math
import statistics

import pytest

from pipeline.evaluation.intervals import clustered_share, share, student_t_95, weighted_mean


@pytest.mark.parametrize(
    ("num_successes", "num_samples", "low", "high"),
    [
        # Newcombe (1998), Statistics in Medicine 17, table I, method 3: score without continuity correction.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_share_published_cases_give_published_intervals(
    num_successes: int, num_samples: int, low: float, high: float
) -> None:
    estimate = share(num_successes, num_samples=num_samples)
    assert estimate.value == num_successes / num_samples
    assert (estimate.low, estimate.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_share_of_all_samples_ends_at_one() -> None:
    estimate = share(20, num_samples=20)
    assert (estimate.value, estimate.high) == (1.0, 1.0)
    assert estimate.low == pytest.approx(0.8389, abs=5e-5)


def test_share_without_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        share(0, num_samples=0)


@pytest.mark.parametrize("num_followed", [0, 2])
def test_clustered_share_of_unlike_clusters_rests_on_fewer_than_there_are(num_followed: int) -> None:
    estimate = clustered_share([(num_followed, 4), (0, 1), (0, 1)])
    # (4 + 1 + 1)^2 / (16 + 1 + 1) = 2, and Wilson's interval of n = 2: (p + z^2 / 4 +- z sqrt(p q / 2 + z^2 / 16))
    # / (1 + z^2 / 2), z^2 = 3.84146.
    p = num_followed / 6
    half_width = math.sqrt(3.84146 * (p * (1 - p) / 2 + 3.84146 / 16))
    assert (estimate.value, estimate.num_samples) == (pytest.approx(p), 3)
    assert estimate.low == pytest.approx(max(0.0, (p + 3.84146 / 4 - half_width) / 2.92073), abs=1e-5)
    assert estimate.high == pytest.approx((p + 3.84146 / 4 + half_width) / 2.92073, abs=1e-5)


def test_clustered_share_of_equal_clusters_is_the_share_of_as_many_samples() -> None:
    assert clustered_share([(3, 3), (0, 3), (0, 3), (3, 3)]) == share(2, num_samples=4)


def test_clustered_share_without_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        clustered_share([])


@pytest.mark.parametrize(
    ("degrees", "point"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (5, 2.5706), (10, 2.2281), (30, 2.0423)]
)
def test_student_t_tabulated_degrees_within_one_percent(degrees: int, point: float) -> None:
    assert student_t_95(degrees) == pytest.approx(point, rel=0.01)


def test_weighted_mean_equal_weights_is_the_textbook_interval() -> None:
    values = [3.0, 5.0, 4.0, 8.0, 1.0, 6.0]
    estimate = weighted_mean([[(10 * value, 10.0) for value in values]])
    half_width = student_t_95(5) * statistics.stdev(values) / math.sqrt(6)
    assert estimate.value == pytest.approx(statistics.fmean(values))
    assert estimate.high - estimate.value == pytest.approx(half_width)
    assert estimate.num_samples == 6


def test_weighted_mean_unequal_weights_counts_every_token_once() -> None:
    assert weighted_mean([[(30.0, 10.0), (2.0, 1.0)]]).value == pytest.approx(32 / 11)


def test_weighted_mean_of_groups_leaves_their_difference_out() -> None:
    prose, code = [3.0, 3.2, 3.1], [1.0, 1.2, 1.1]
    estimate = weighted_mean([[(value, 1.0) for value in prose], [(value, 1.0) for value in code]])
    half_width = student_t_95(4) * math.sqrt(2 * 3 * statistics.variance(prose)) / 6
    assert estimate.value == pytest.approx(2.1)
    assert estimate.high - estimate.value == pytest.approx(half_width)


def test_weighted_mean_of_one_sample_has_no_interval() -> None:
    estimate = weighted_mean([[(3.0, 2.0)]])
    assert (estimate.low, estimate.value, estimate.high, estimate.num_samples) == (1.5, 1.5, 1.5, 1)
