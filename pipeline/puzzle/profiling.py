"""Measured prefill and decode time of every subblock variant, on this machine, inside a running model.

All layers share their shapes, so each distinct variant is timed once. Variants are timed where they will run: a model
whose layers take them in turn generates behind a real KV cache while a clock reads before and after each subblock. So
each is measured with cold weights, in the company of the others, and with what the Python of its layer costs. In every
round the parent runs as well, once with the clock in its layers and once without: the first gives the parent's own
subblocks and the fixed part outside the layers, the second is what their sum is compared with.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.architecture import Architecture, AttentionSpec, BlockSpec, FFNSpec
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM, build_model
from pipeline.progress import Reporter
from pipeline.puzzle.calibration import PHASES, Calibration, Phase, calibrate, relative_residuals
from pipeline.puzzle.devices import num_threads, place
from pipeline.puzzle.predictions import FIXED
from pipeline.puzzle.search_space import SearchSpace
from pipeline.puzzle.timing import GenerationTiming, time_generation
from pipeline.recipe import ProfileConfig, Scenario

ProfileKey = tuple[str, Phase, str, str]  # scenario, phase, part, variant


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """The timings of one variant in one scenario and phase, one per round, in milliseconds."""

    times_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """The value that predictions use."""
        return statistics.median(self.times_ms)

    @property
    def spread_ms(self) -> float:
        """The interquartile range; 0 for a single timing."""
        if len(self.times_ms) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.times_ms, n=4, method="inclusive")
        return high - low


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """Everything measured in one sitting.

    `checked` holds sum and measurement of another model than the parent, where the parent's sum is its measurement by
    construction.
    """

    samples: Mapping[ProfileKey, Samples]
    parent: Mapping[tuple[str, Phase], Samples]
    sum_ms: Mapping[tuple[str, Phase], float]
    checked: Mapping[tuple[str, Phase], tuple[float, float]] | None = None

    @property
    def calibration(self) -> Calibration:
        """The factors under which the parent's prediction is its measurement."""
        measured_ms = {key: samples.median_ms for key, samples in self.parent.items()}
        return calibrate(sum_ms=self.sum_ms, measured_ms=measured_ms, parent_ms=measured_ms)

    @property
    def residuals(self) -> dict[tuple[str, Phase], float]:
        """|sum of blocks - measured| / measured, before calibration, of the parent or of `checked` if there."""
        if self.checked is not None:
            return relative_residuals(
                sum_ms={key: sum_ms for key, (sum_ms, _) in self.checked.items()},
                measured_ms={key: measured_ms for key, (_, measured_ms) in self.checked.items()},
            )
        measured_ms = {key: samples.median_ms for key, samples in self.parent.items()}
        return relative_residuals(sum_ms=self.sum_ms, measured_ms=measured_ms)

    @property
    def drift(self) -> dict[tuple[str, Phase], float]:
        """How much slower (or faster, below 0) the parent ran in the later half of the rounds than in the earlier."""
        return {
            key: statistics.median(half := samples.times_ms[len(samples.times_ms) // 2 :])
            / statistics.median(samples.times_ms[: -len(half)] or half)
            - 1
            for key, samples in self.parent.items()
        }


def profile_blocks(
    architecture: Architecture,
    space: SearchSpace,
    *,
    profile: ProfileConfig,
    device: torch.device,
    dtype: torch.dtype,
    reporter: Reporter,
) -> Profile:
    """Time every distinct variant of the space and the whole parent in every scenario.

    Weights are random: time does not depend on their values. Each round times everything once, so a change of the
    machine's load meets all alike; the median over rounds is kept.
    """
    parent = place(build_model(architecture, dtype=dtype, seed=0), device)
    mixed_architecture = architecture.with_blocks(
        mixed_blocks(space.distinct_attention, space.distinct_ffn, num_layers=architecture.num_hidden_layers)
    )
    mixed = place(build_model(mixed_architecture, dtype=dtype, seed=1), device)
    times: defaultdict[ProfileKey, list[float]] = defaultdict(list)
    whole: defaultdict[tuple[str, Phase], list[float]] = defaultdict(list)
    num_rounds = profile.warmups + profile.repeats
    with num_threads(profile.num_threads):
        for round_index in range(num_rounds):
            for scenario in profile.scenarios:
                timing, parent_times, mixed_times = _one_round(parent, mixed, scenario)
                if round_index < profile.warmups:
                    continue
                for phase in PHASES:
                    whole[scenario.name, phase].append(timing.of(phase))
                for key, time_ms in (mixed_times | parent_times).items():
                    times[key].append(time_ms)
            reporter.step(round_index + 1, num_rounds, what="profile rounds")
    samples = {key: Samples(times_ms=tuple(values)) for key, values in times.items()}
    return Profile(
        samples=samples,
        parent={key: Samples(times_ms=tuple(values)) for key, values in whole.items()},
        sum_ms={(name, phase): sum_of_blocks_ms(architecture, samples, name, phase) for name, phase in whole},
    )


class SubblockClock:
    """Reads the time before and after every subblock of a model while `watching`; one total per layer and phase."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, BlockSpec, Any, Any]] = []

    @contextmanager
    def watching(self, model: HeterogeneousLlamaForCausalLM) -> Iterator[None]:
        """Put the clock around each layer's two halves, and take it away again."""
        layers: list[Any] = list(model.model.layers)
        for layer in layers:
            layer.attend = self._timed("attention", layer.block, layer.attend)
            layer.feed_forward = self._timed("ffn", layer.block, layer.feed_forward)
        try:
            yield
        finally:
            for layer in layers:
                del layer.attend
                del layer.feed_forward

    def take(self) -> dict[tuple[str, str], list[float]]:
        """Return the milliseconds of every call since the last `take`, by part and variant."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        found: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
        for part, block, began, ended in self._marks:
            key = block.attention.key if part == "attention" else block.ffn.key
            found[part, key].append(
                began.elapsed_time(ended) if self._device.type == "cuda" else 1000 * (ended - began)
            )
        self._marks.clear()
        return dict(found)

    def _timed(self, part: str, block: BlockSpec, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def timed(*args: Any, **kwargs: Any) -> Tensor:
            began = self._mark()
            result = call(*args, **kwargs)
            self._marks.append((part, block, began, self._mark()))
            return result

        return timed

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _one_round(
    parent: HeterogeneousLlamaForCausalLM, mixed: HeterogeneousLlamaForCausalLM, scenario: Scenario
) -> tuple[GenerationTiming, dict[ProfileKey, float], dict[ProfileKey, float]]:
    """Return the whole parent's timing, the parent's subblocks with the fixed part, and all variants' subblocks."""
    whole = time_generation(parent, scenario)
    clocked, calls = _clocked_generation(parent, scenario)
    parent_times: dict[ProfileKey, float] = {}
    for phase in PHASES:
        num_passes = 1 if phase == "prefill" else clocked.num_decode_steps
        inside = 0.0
        for (part, variant), values in calls[phase].items():
            parent_times[scenario.name, phase, part, variant] = statistics.fmean(values)
            inside += sum(values) / num_passes
        parent_times[scenario.name, phase, FIXED, FIXED] = max(0.0, clocked.of(phase) - inside)
    _, calls = _clocked_generation(mixed, scenario)
    mixed_times: dict[ProfileKey, float] = {
        (scenario.name, phase, part, variant): statistics.fmean(values)
        for phase in PHASES
        for (part, variant), values in calls[phase].items()
    }
    return whole, parent_times, mixed_times


def _clocked_generation(
    model: HeterogeneousLlamaForCausalLM, scenario: Scenario
) -> tuple[GenerationTiming, dict[Phase, dict[tuple[str, str], list[float]]]]:
    clock = SubblockClock(next(model.parameters()).device)
    calls: dict[Phase, dict[tuple[str, str], list[float]]] = {}

    def keep_prefill(part: str) -> None:
        marked = clock.take()  # also empties the clock of the filling between the two phases
        if part == "prefill":
            calls["prefill"] = marked

    with clock.watching(model):
        timing = time_generation(model, scenario, after=keep_prefill)
    calls["decode"] = clock.take()
    return timing, calls


def mixed_blocks(attention: Sequence[AttentionSpec], ffn: Sequence[FFNSpec], *, num_layers: int) -> list[BlockSpec]:
    """Return layers that take the variants in turn, each at least twice, no shallower than the parent."""
    count = max(num_layers, 2 * len(attention), 2 * len(ffn))
    return [
        BlockSpec(attention=attention[index % len(attention)], ffn=ffn[index % len(ffn)], parent_layers=(index,))
        for index in range(count)
    ]


def sum_of_blocks_ms(
    architecture: Architecture, samples: Mapping[ProfileKey, Samples], scenario: str, phase: Phase
) -> float:
    """Return what a model's subblocks and the fixed part add up to, by their medians."""
    return samples[scenario, phase, FIXED, FIXED].median_ms + sum(
        samples[scenario, phase, "attention", block.attention.key].median_ms
        + samples[scenario, phase, "ffn", block.ffn.key].median_ms
        for block in architecture.blocks
    )
