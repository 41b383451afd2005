"""Whole models measured in turn, so that a change of the machine's load meets all of them: medians, intervals, ratios.

Intervals of a median come from order statistics: between the k-th smallest and the k-th largest of n values lies the
true median with a probability of 1 - 2 * P(Binomial(n, 1/2) < k), whatever the distribution. The widest k that keeps
95 % is taken; below 6 values even the extremes promise less, and `coverage` says how much.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.costs import kv_bytes_per_token
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.progress import Reporter
from pipeline.puzzle.calibration import PHASES, Phase
from pipeline.puzzle.devices import num_threads
from pipeline.puzzle.timing import time_generation
from pipeline.recipe import MeasurementConfig, Scenario

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A median, and the order statistics that hold the true one with probability `coverage`."""

    median: float
    low: float
    high: float
    coverage: float
    num_samples: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurements:
    """Timings of every model by scenario and phase, in milliseconds, one per round; rounds line up across models.

    `kv_bytes_per_token` is what a token takes in the cache of the runtime that was measured.
    """

    times_ms: Mapping[tuple[str, str, Phase], tuple[float, ...]]  # model, scenario, phase
    kv_bytes_per_token: Mapping[str, float]

    def median_ms(self, model: str, scenario: str, phase: Phase) -> float:
        """Return the median time of one model."""
        return statistics.median(self.times_ms[model, scenario, phase])

    def tokens_per_second(self, model: str, scenario: Scenario, phase: Phase) -> Interval:
        """Return the tokens that one model reads (prefill) or writes (decode) per second."""
        tokens = scenario.batch_size * (scenario.prompt_tokens if phase == "prefill" else 1)
        return median_interval([1000.0 * tokens / time for time in self.times_ms[model, scenario.name, phase]])

    def speedup(self, model: str, scenario: str, phase: Phase, *, over: str) -> Interval:
        """Return how many times faster one model is than another; a ratio of two timings of the same round each."""
        ours, theirs = self.times_ms[model, scenario, phase], self.times_ms[over, scenario, phase]
        return median_interval([slow / fast for slow, fast in zip(theirs, ours, strict=True)])


def measure_models(
    models: Mapping[str, HeterogeneousLlamaForCausalLM],
    scenarios: Sequence[Scenario],
    *,
    measurement: MeasurementConfig,
    threads: int,
    reporter: Reporter,
) -> Measurements:
    """Time prefill and decode of every model in every scenario, eagerly in this process."""

    def time_ms(name: str, scenario: Scenario) -> dict[Phase, float]:
        timing = time_generation(models[name], scenario)
        return {phase: timing.of(phase) for phase in PHASES}

    with num_threads(threads):
        times_ms = time_in_turn(
            list(models),
            scenarios,
            time_ms,
            measurement=measurement,
            reporter=reporter,
            what="measuring rounds",
        )
    return Measurements(
        times_ms=times_ms,
        kv_bytes_per_token={
            name: kv_bytes_per_token(model.architecture, bytes_per_value=next(model.parameters()).element_size())
            for name, model in models.items()
        },
    )


def time_in_turn(
    names: Sequence[str],
    scenarios: Sequence[Scenario],
    time_ms: Callable[[str, Scenario], Mapping[Phase, float]],
    *,
    measurement: MeasurementConfig,
    reporter: Reporter,
    what: str,
) -> dict[tuple[str, str, Phase], tuple[float, ...]]:
    """Time every model in every scenario once per round and return the milliseconds by model, scenario and phase.

    The model that begins changes from round to round; `measurement.warmups` rounds are thrown away.
    """
    times: defaultdict[tuple[str, str, Phase], list[float]] = defaultdict(list)
    num_rounds = measurement.warmups + measurement.rounds
    for round_index in range(num_rounds):
        begin = round_index % len(names)
        for scenario in scenarios:
            for name in (*names[begin:], *names[:begin]):
                found = time_ms(name, scenario)
                if round_index >= measurement.warmups:
                    for phase, value in found.items():
                        times[name, scenario.name, phase].append(value)
        reporter.step(round_index + 1, num_rounds, what=what)
    return {key: tuple(values) for key, values in times.items()}


def median_interval(values: Sequence[float]) -> Interval:
    """Return the median of the values with its interval."""
    ordered = sorted(values)
    count = len(ordered)
    rank = 1
    while 2 * (rank + 1) <= count + 1 and _coverage(count, rank + 1) >= CONFIDENCE:
        rank += 1
    return Interval(
        median=statistics.median(ordered),
        low=ordered[rank - 1],
        high=ordered[count - rank],
        coverage=_coverage(count, rank),
        num_samples=count,
    )


def _coverage(count: int, rank: int) -> float:
    """Return the probability that the median lies between the rank-th smallest and the rank-th largest of `count`."""
    return max(0.0, 1 - 2 * sum(math.comb(count, successes) for successes in range(rank)) / 2**count)
