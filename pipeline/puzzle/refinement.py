"""From a pool of answers to the child that is best as a whole model, and from there to better ones.

Sums of replace-1-block scores choose badly where many layers go: what a layer is worth depends on which others stay.
So the answers are scored as whole models, and around the best, x, every block is measured again with x's other blocks
in place. With d[i,j] = measure(x with block j in layer i) - measure(x), the programme

    min sum_ij d[i,j] y[i,j]    under the target's limits, at most r layers of y unlike x

is linear again and exact for one change; it is solved for r, r/2, r/4, ... 1, its answers are scored as whole models,
and the best of them becomes x while it is better. (The scoring is Puzzle's, section 4.2; the rounds are ours.)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from pipeline.architecture import BlockSpec
from pipeline.progress import Reporter
from pipeline.puzzle.divergence import Divergence
from pipeline.puzzle.mip import Problem, Solution, solve_near
from pipeline.puzzle.predictions import CostModel
from pipeline.puzzle.search import SolutionRecord, base_value, build_problem, record_solution
from pipeline.recipe import Objective, Requirements, SearchConfig

POOL = "pool"
"""What the origin of an answer to the programme over the parent's scores begins with."""

ScoreWholeModels = Callable[[Mapping[str, Sequence[BlockSpec]]], Mapping[str, Divergence]]
ScoreAround = Callable[[Sequence[BlockSpec], int], pl.DataFrame]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredSolution:
    """An answer, where it came from, and how far the child it describes is from the parent as a whole model."""

    origin: str
    record: SolutionRecord
    divergence: Divergence

    def value(self, objective: Objective) -> float:
        """Return the measure that the search minimises."""
        value = getattr(self.divergence, objective)
        assert value is not None, objective  # the recipe asks for the task whose error it minimises
        return value


@dataclass(frozen=True, kw_only=True, slots=True)
class Refinement:
    """Everything that was scored, in order, the best of it, and the scores around the last centre."""

    scored: tuple[ScoredSolution, ...]
    best: ScoredSolution
    scores: pl.DataFrame


def refine(
    pool: Sequence[SolutionRecord],
    scores: pl.DataFrame,
    *,
    score_whole_models: ScoreWholeModels,
    score_around: ScoreAround,
    costs: CostModel,
    requirements: Requirements,
    settings: SearchConfig,
    reporter: Reporter,
) -> Refinement:
    """Return the best child found from a pool of answers.

    Args:
        pool: answers to the programme over `scores`.
        scores: replace-1-block scores around the parent.
        score_whole_models: measures children.
        score_around: measures every block in the company of a child's other blocks, in the given round.
        costs: what blocks cost.
        requirements: the target's.
        settings: the recipe's search section.
        reporter: who listens.
    """
    objective = settings.objective

    def measure(records: Mapping[str, SolutionRecord]) -> list[ScoredSolution]:
        divergences = score_whole_models({origin: record.blocks for origin, record in records.items()})
        return [
            ScoredSolution(origin=origin, record=record, divergence=divergences[origin])
            for origin, record in records.items()
        ]

    scored = measure({f"{POOL} {number}": record for number, record in enumerate(pool)})
    best = min(scored, key=lambda one: one.value(objective))
    for number in range(1, settings.most_rounds(num_layers=len(best.record.blocks)) + 1):
        reporter.note(
            f"round {number}: {best.origin} has {objective} {best.value(objective):.4f} as a whole model, "
            f"{best.record.objective:.4f} by its sum"
        )
        scores = score_around(best.record.blocks, number)
        problem = build_problem(scores, costs=costs, requirements=requirements, settings=settings)
        proposals = {
            f"round {number}, at most {max_changed} layers changed": record_solution(
                solution,
                problem=problem,
                base_value=base_value(scores, objective),
                costs=costs,
                target_name=best.record.target_name,
                settings=settings,
            )
            for max_changed, solution in _proposals(problem, best.record.blocks, settings=settings).items()
        }
        if not proposals:
            break
        found = measure(proposals)
        scored += found
        better = min(found, key=lambda one: one.value(objective))
        if better.value(objective) >= best.value(objective):
            break
        best = better
    return Refinement(scored=tuple(scored), best=best, scores=scores)


def _proposals(problem: Problem, blocks: Sequence[BlockSpec], *, settings: SearchConfig) -> dict[int, Solution]:
    """Return the answers for shrinking numbers of layers that may change; none twice, and not `blocks` itself."""
    found: dict[int, Solution] = {}
    seen = {tuple(block.key for block in blocks)}
    max_changed = settings.refinement.max_changed_layers
    while max_changed:
        solution = solve_near(
            problem,
            blocks,
            max_changed_layers=max_changed,
            time_limit_s=settings.time_limit_s,
            relative_gap=settings.relative_gap,
        )
        if solution is not None:
            keys = tuple(block.key for block in solution.blocks)
            if keys not in seen:
                seen.add(keys)
                found[max_changed] = solution
        max_changed //= 2
    return found
