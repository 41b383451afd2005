"""Searches that the integer programme is compared with, over the same tables. Pure."""

import statistics
from collections.abc import Sequence

from pipeline.puzzle.mip import Candidate, Problem, violated_limits


def greedy(problem: Problem) -> tuple[Candidate, ...] | None:
    """Choose layer by layer under an equal share of every budget (Puzzle, appendix F.2.2); None when a limit is missed.

    Layers go in ascending order of their candidates' mean score; each takes the lowest score that fits its share, and
    what it leaves goes to the next. A layer in which nothing fits takes its cheapest candidate and leaves a debt.
    """
    num_layers = len(problem.layers)
    share = [(limit.upper - limit.fixed) / num_layers for limit in problem.limits]
    saved = [0.0] * len(problem.limits)
    chosen: list[Candidate | None] = [None] * num_layers
    for layer in sorted(range(num_layers), key=lambda index: _mean_score(problem.layers[index])):
        budget = [one + left for one, left in zip(share, saved, strict=True)]

        def overrun(candidate: Candidate, budget: list[float] = budget) -> float:
            return sum(
                max(0.0, limit.cost[candidate.block.key] - available) / limit.upper
                for limit, available in zip(problem.limits, budget, strict=True)
            )

        pick = min(problem.layers[layer], key=lambda candidate: (overrun(candidate), candidate.score))
        chosen[layer] = pick
        saved = [
            available - limit.cost[pick.block.key] for limit, available in zip(problem.limits, budget, strict=True)
        ]
    complete = tuple(candidate for candidate in chosen if candidate is not None)
    return None if violated_limits([one.block for one in complete], problem.limits) else complete


def _mean_score(candidates: Sequence[Candidate]) -> float:
    return statistics.fmean(candidate.score for candidate in candidates)
