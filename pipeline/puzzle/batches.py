"""The batch of a swept scenario, which a programme takes as given: one programme each, and the best is kept. Pure.

A target whose limits name a swept scenario is solved at each of its batch sizes (Puzzle, appendix B). There its limits
are those of that batch, relative ones to the parent at the same batch, and a limit on cached tokens asks for room for
the batch's own tokens as well: a batch that does not fit beside the weights is no answer.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from pipeline.errors import InfeasibleError
from pipeline.puzzle.calibration import Phase
from pipeline.puzzle.predictions import CostModel, compared_phase
from pipeline.puzzle.programme import OutOfTimeError
from pipeline.recipe import BatchChoice, Limit, ProfileConfig, Requirements, Scenario

Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchAnswer(Generic[Answer]):
    """What was found at one batch: an answer, its summed scores and throughput, or the reason that there is none."""

    scenario: Scenario
    requirements: Requirements
    answer: Answer | None
    objective: float
    tokens_per_s: float
    reason: str


def swept_scenarios(limits: Sequence[Limit], profile: ProfileConfig) -> tuple[Scenario, ...]:
    """Return a target's scenario at each of its batch sizes; none where its limits name no swept scenario."""
    return next((profile.sweeps[limit.scenario] for limit in limits if limit.scenario in profile.sweeps), ())


def at_batch(requirements: Requirements, scenario: Scenario) -> Requirements:
    """Return a target's requirements at one batch of its swept scenario."""

    def of_batch(limit: Limit) -> Limit:
        if limit.quantity == "cached_tokens":
            return limit.model_copy(update={"bound": max(limit.bound, float(scenario.num_tokens))})
        return limit.model_copy(update={"scenario": scenario.name}) if limit.scenario == scenario.sweep else limit

    return requirements.model_copy(update={"limits": tuple(map(of_batch, requirements.limits))})


def solve_batches(
    requirements: Requirements,
    scenarios: Sequence[Scenario],
    *,
    solve: Callable[[Requirements], Answer],
    objective: Callable[[Answer], float],
    tokens_per_s: Callable[[Answer, Scenario], float],
) -> tuple[BatchAnswer[Answer], ...]:
    """Return what `solve` finds at each batch; one that meets no limits, or not in time, is an answer of its own.

    Raises:
        InfeasibleError: when no batch has an answer, with the reason of each.
    """
    found: list[BatchAnswer[Answer]] = []
    for scenario in scenarios:
        wanted = at_batch(requirements, scenario)
        try:
            answer = solve(wanted)
        except (InfeasibleError, OutOfTimeError) as err:
            found.append(
                BatchAnswer(
                    scenario=scenario,
                    requirements=wanted,
                    answer=None,
                    objective=math.inf,
                    tokens_per_s=0.0,
                    reason=str(err),
                )
            )
            continue
        found.append(
            BatchAnswer(
                scenario=scenario,
                requirements=wanted,
                answer=answer,
                objective=objective(answer),
                tokens_per_s=tokens_per_s(answer, scenario),
                reason="",
            )
        )
    if all(one.answer is None for one in found):
        reasons = " ".join(f"At batch {one.scenario.batch_size}: {one.reason}." for one in found)
        raise InfeasibleError(f"no batch size of {scenarios[0].sweep} has a child. {reasons}")
    return tuple(found)


def best_batch(found: Sequence[BatchAnswer[Answer]], choice: BatchChoice) -> BatchAnswer[Answer]:
    """Return the answer of the lowest summed score, or of the highest throughput; the other decides between equals."""

    def order(one: BatchAnswer[Answer]) -> tuple[float, float]:
        keys = one.objective, -one.tokens_per_s
        return keys if choice == "lowest_loss" else (keys[1], keys[0])

    return min((one for one in found if one.answer is not None), key=order)


def settle(requirements: Requirements, costs: CostModel, chosen: Sequence[Limit]) -> tuple[Requirements, CostModel]:
    """Return requirements and costs at the batch for which an answer with the limits `chosen` was found.

    The other batches of the sweep are left out of the cost model's scenarios: nothing is predicted or measured there.
    """
    limits = settled_limits(requirements.limits, costs.profile, chosen)
    profile = settled_profile(costs.profile, limits)
    return requirements.model_copy(update={"limits": limits}), replace(costs, profile=profile)


def settled_limits(limits: Sequence[Limit], profile: ProfileConfig, chosen: Sequence[Limit]) -> tuple[Limit, ...]:
    """Return a target's limits at the batch that was chosen: those of the answer where it was swept, else its own."""
    return tuple(chosen if swept_scenarios(limits, profile) else limits)


def compared_scenarios(limits: Sequence[Limit], profile: ProfileConfig) -> tuple[tuple[str, ...], Phase]:
    """Return phase and scenario in which a target's children are compared; of a swept scenario, every batch's name."""
    named = {limit.scenario for limit in limits}
    kept = tuple(one for one in profile.scenarios if one.sweep is None or one.sweep in named)
    scenario, phase = compared_phase(
        limits, profile=profile.model_copy(update={"scenarios": kept or profile.scenarios})
    )
    sweep = scenario if scenario in profile.sweeps else profile.scenario(scenario).sweep
    return ((scenario,) if sweep is None else tuple(one.name for one in profile.sweeps[sweep])), phase


def settled_profile(profile: ProfileConfig, limits: Sequence[Limit]) -> ProfileConfig:
    """Return a profile without the batches of swept scenarios that the limits of an answer do not name."""
    named = {limit.scenario for limit in limits}
    kept = tuple(one for one in profile.scenarios if one.sweep is None or one.name in named)
    return profile.model_copy(update={"scenarios": kept}) if kept else profile
