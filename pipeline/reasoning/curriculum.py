"""Which prompts a step trains on: by pass rate, easy ones left out, and from easy to hard. Pure, no torch.

At step t of N the share of pass rate p in a batch is proportional to exp(-(p - mu_t)^2 / (2 sigma^2)), with mu_t going
in a straight line from `start` to `end`. Where a pass rate has too few prompts left, the pass rate with the most left
fills in. Every prompt comes once before any comes again.

Source: Llama-Nemotron, section 5.1, which publishes the idea and no parameters: sigma, start and end are the recipe's.
"""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from pipeline.recipe import CurriculumConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """The prompts of one step by their place among all, and the pass rate that it aimed at."""

    places: tuple[int, ...]
    aimed_pass_rate: float


def worth_trying(pass_rates: Sequence[float], *, min_pass_rate: float, max_pass_rate: float) -> list[int]:
    """Return the places of prompts from `min_pass_rate` up to below `max_pass_rate`.

    Of replies none of which is right, or all, only form and instructions followed in part are left to learn from. The
    paper, with samples to spare, drops the easy prompts alone.
    """
    return [place for place, rate in enumerate(pass_rates) if min_pass_rate <= rate < max_pass_rate]


def plan_curriculum(
    pass_rates: Sequence[float], *, num_steps: int, prompts_per_step: int, config: CurriculumConfig, seed: int
) -> list[Batch]:
    """Return the batches of all steps.

    Where too few prompts are left for a batch, all of them go into it, and the rest comes from pools that are filled
    again; no batch holds a prompt twice.
    """
    generator = random.Random(f"curriculum/{seed}")
    pools: dict[float, list[int]] = {}
    batches: list[Batch] = []
    for step in range(num_steps):
        left: list[int] = []
        if sum(map(len, pools.values())) < prompts_per_step:
            left = list(chain.from_iterable(pools.values()))
            others = [place for place in generator.sample(range(len(pass_rates)), len(pass_rates)) if place not in left]
            pools = {}
            # Pools are drawn from at their ends: those left over come last.
            for place in (*left, *others):
                pools.setdefault(pass_rates[place], []).append(place)
        taken = Counter(pass_rates[place] for place in left)
        done = step / (num_steps - 1) if num_steps > 1 else 0.0
        aim = config.start + (config.end - config.start) * done
        counts = allocate(
            {rate: len(pool) - taken[rate] for rate, pool in pools.items()},
            size=prompts_per_step - len(left),
            aim=aim,
            sigma=config.sigma,
        )
        places = left + [pools[rate].pop() for rate, number in sorted(counts.items()) for _ in range(number)]
        batches.append(Batch(places=tuple(generator.sample(places, len(places))), aimed_pass_rate=aim))
    return batches


def allocate(available: dict[float, int], *, size: int, aim: float, sigma: float) -> dict[float, int]:
    """Return how many prompts of each pass rate a batch of `size` takes, fewer only where there are fewer in all.

    Shares are rounded down, then up by largest remainder; what a pass rate lacks comes from the one with the most left.
    """
    # Distances relative to the nearest rate: far from all of them every weight would underflow to zero.
    exponents = {rate: (rate - aim) ** 2 / (2 * sigma**2) for rate in available}
    nearest = min(exponents.values())
    weights = {rate: math.exp(nearest - exponent) for rate, exponent in exponents.items()}
    total = sum(weights.values())
    wanted = {rate: size * weight / total for rate, weight in weights.items()}
    counts = {rate: math.floor(number) for rate, number in wanted.items()}
    by_remainder = sorted(wanted, key=lambda rate: (counts[rate] - wanted[rate], rate))
    for rate in by_remainder[: size - sum(counts.values())]:
        counts[rate] += 1
    counts = {rate: min(number, available[rate]) for rate, number in counts.items()}
    while sum(counts.values()) < min(size, sum(available.values())):
        fullest = max(available, key=lambda rate: (available[rate] - counts[rate], rate))
        counts[fullest] += 1
    return counts
