"""Medians, intervals and ratios of measured models, and what the profile derives from its timings."""

import math

import pytest
import torch

from pipeline.progress import SilentReporter
from pipeline.puzzle.calibration import PHASES, calibrate
from pipeline.puzzle.measure import Measurements, measure_models, median_interval
from pipeline.puzzle.profiling import Samples, SubblockClock, profile_blocks
from pipeline.puzzle.search_space import resolve
from pipeline.recipe import MeasurementConfig, ProfileConfig, Scenario, SearchSpaceConfig
from tests.pipeline.puzzle.workplace import Workplace

CHAT = Scenario(name="chat", batch_size=2, prompt_tokens=12, generation_tokens=3)


@pytest.mark.parametrize(
    # The ranks of the published tables of confidence limits for the median: n -> k-th smallest and largest.
    ("count", "rank"),
    [(6, 1), (8, 1), (9, 2), (15, 4), (20, 6), (25, 8)],
)
def test_median_interval_has_the_ranks_of_the_binomial_tables(count: int, rank: int):
    interval = median_interval([float(value) for value in range(count, 0, -1)])
    assert (interval.low, interval.high) == (rank, count - rank + 1)
    assert interval.coverage >= 0.95
    assert interval.median == (count + 1) / 2


def test_median_interval_of_few_values_is_their_range_and_says_what_it_covers():
    interval = median_interval([3.0, 1.0, 2.0])
    assert (interval.low, interval.median, interval.high) == (1.0, 2.0, 3.0)
    assert interval.coverage == pytest.approx(0.75)
    assert median_interval([5.0]).coverage == 0.0


def test_speedup_compares_timings_of_the_same_round():
    measurements = Measurements(
        times_ms={
            ("parent", "chat", "decode"): (10.0, 20.0, 30.0),
            ("child", "chat", "decode"): (5.0, 10.0, 15.0),
        },
        kv_bytes_per_token={"parent": 128, "child": 64},
    )
    speedup = measurements.speedup("child", "chat", "decode", over="parent")
    assert (speedup.low, speedup.median, speedup.high) == (2.0, 2.0, 2.0)
    assert measurements.tokens_per_second("child", CHAT, "decode").median == pytest.approx(2 * 1000 / 10.0)


def test_measure_models_times_every_model_in_every_round(workplace: Workplace):
    measurements = measure_models(
        {"parent": workplace.model(), "child": workplace.model()},
        [CHAT],
        measurement=MeasurementConfig(rounds=3, warmups=1),
        threads=1,
        reporter=SilentReporter(),
    )
    assert set(measurements.times_ms) == {(name, "chat", phase) for name in ("parent", "child") for phase in PHASES}
    assert all(len(times) == 3 and min(times) > 0 for times in measurements.times_ms.values())


def test_profile_blocks_times_every_variant_and_its_calibration_meets_the_parent(workplace: Workplace):
    config = SearchSpaceConfig(
        attention=("parent", 1, "linear", "no_op"), ffn=("parent", 16, "linear", "no_op"), overrides=(), portable=False
    )
    space = resolve(config, workplace.architecture)
    profile = profile_blocks(
        workplace.architecture,
        space,
        profile=ProfileConfig(
            backend="torch",
            scenarios=(CHAT,),
            precision="fp32",
            served_precision="fp32",
            num_threads=1,
            warmups=1,
            repeats=3,
        ),
        device=torch.device("cpu"),
        dtype=torch.float32,
        reporter=SilentReporter(),
    )
    parts = [("attention", key) for key in ("kv2", "kv1", "linear", "no_op")]
    parts += [("ffn", key) for key in ("ffn48", "ffn16", "linear", "no_op")]
    parts.append(("fixed", "fixed"))
    assert set(profile.samples) == {("chat", phase, *part) for phase in PHASES for part in parts}
    assert all(len(samples.times_ms) == 3 for samples in profile.samples.values())
    for phase in PHASES:
        time_ms = {part: profile.samples["chat", phase, *part].median_ms for part in parts}
        assert time_ms["attention", "no_op"] < time_ms["attention", "kv2"]
        assert time_ms["ffn", "no_op"] < time_ms["ffn", "ffn48"]
        by_hand = time_ms["fixed", "fixed"] + 3 * (time_ms["attention", "kv2"] + time_ms["ffn", "ffn48"])
        assert profile.sum_ms["chat", phase] == pytest.approx(by_hand)
        entry = profile.calibration.get("chat", phase)
        assert entry.factor * by_hand == pytest.approx(profile.parent["chat", phase].median_ms)


def test_subblock_clock_leaves_the_model_as_it_was(workplace: Workplace):
    model = workplace.model()
    tokens_BT = workplace.packed().tokens_NT[:1]
    before = model(input_ids=tokens_BT).logits
    clock = SubblockClock(torch.device("cpu"))
    with clock.watching(model):
        during = model(input_ids=tokens_BT).logits
    assert {part: len(times) for part, times in clock.take().items()} == {("attention", "kv2"): 3, ("ffn", "ffn48"): 3}
    assert torch.equal(before, during)
    model(input_ids=tokens_BT)
    assert clock.take() == {}


def test_calibrate_predicts_what_was_measured():
    calibration = calibrate(
        sum_ms={("chat", "decode"): 4.0}, measured_ms={("chat", "decode"): 5.0}, parent_ms={("chat", "decode"): 9.0}
    )
    entry = calibration.get("chat", "decode")
    assert (entry.factor, entry.parent_ms) == (1.25, 9.0)


def test_samples_spread_is_the_interquartile_range():
    assert Samples(times_ms=(1.0, 2.0, 3.0, 4.0, 100.0)).spread_ms == 2.0
    assert Samples(times_ms=(7.0,)).spread_ms == 0.0
    assert math.isclose(Samples(times_ms=(1.0, 3.0)).median_ms, 2.0)
